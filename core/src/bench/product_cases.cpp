// Products of linear layers, as training asks for them: y = x W^T, dx = dy W, dW (+)= dy^T x summed in f32; what they take along
// (GELU, its slope, the bias's gradient); the same three in fp8. FLOP are those of the product alone.
#include "bench/cases.h"
#include "bench/operands.h"

#include <kernels/shared/fp8.h>

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace capstan::bench {

namespace {

using kernels::Backend;
using kernels::Num;

/// A linear layer of `rows` tokens.
struct Layer { const char* name; std::int64_t rows, out, in; };

double flop(const Layer& l) { return 2 * real(l.rows) * real(l.out) * real(l.in); }

kernels::Gemm forward_of(const Layer& l, DType dtype) {
  kernels::Gemm g;
  g.a = g.b = g.c = static_cast<Num>(dtype), g.trans_b = true;
  g.m = l.rows, g.n = g.ldc = l.out, g.k = g.lda = g.ldb = l.in;
  return g;
}
kernels::Gemm input_gradient_of(const Layer& l) {
  kernels::Gemm g;
  g.a = g.b = g.c = Num::bf16;
  g.m = l.rows, g.n = g.ldb = g.ldc = l.in, g.k = g.lda = l.out;
  return g;
}
kernels::Gemm weight_gradient_of(const Layer& l, bool added) {
  kernels::Gemm g;
  g.a = g.b = Num::bf16, g.c = Num::f32, g.trans_a = true, g.accumulate = added;
  g.m = g.lda = l.out, g.n = g.ldb = g.ldc = l.in, g.k = l.rows;
  return g;
}

DType type_of(Num num) { return static_cast<DType>(num); }

/// `g` as it is; op(A) and op(B) are stored as it says.
Case plain(Device& device, std::string name, const Layer& l, const kernels::Gemm& g) {
  return {std::move(name), Bound::products(type_of(g.a)), flop(l), [=, &device]() -> std::function<void()> {
            const Dims a = g.trans_a ? Dims{g.k, g.m} : Dims{g.m, g.k}, b = g.trans_b ? Dims{g.n, g.k} : Dims{g.k, g.n};
            return [g, a = random_tensor(device, a, type_of(g.a), 1), b = random_tensor(device, b, type_of(g.b), 2), c = random_tensor(device, {g.m, g.n}, type_of(g.c), 3), &device] {
              device.backend().gemm(g, a.raw(), b.raw(), c.raw());
            };
          }};
}

Case with_gelu(Device& device, const Layer& l) {
  return {fmt::format("  and GELU ({})", l.name), Bound::products(DType::bf16), flop(l), [=, &device]() -> std::function<void()> {
            return [l, x = random_tensor(device, {l.rows, l.in}, DType::bf16, 1), w = random_tensor(device, {l.out, l.in}, DType::bf16, 2),
                    before = Tensor::empty({l.rows, l.out}, DType::bf16, device), y = Tensor::empty({l.rows, l.out}, DType::bf16, device), &device] {
              kernels::Gemm g = forward_of(l, DType::bf16);
              g.before_gelu = before.raw();
              device.backend().gemm(g, x.raw(), w.raw(), y.raw());
            };
          }};
}

/// Where the device does not take the slope along, the pass behind it that training makes then.
Case with_slope(Device& device, const Layer& l) {
  return {fmt::format("  dx times GELU's slope ({})", l.name), Bound::products(DType::bf16), flop(l), [=, &device]() -> std::function<void()> {
            return [l, dy = random_tensor(device, {l.rows, l.out}, DType::bf16, 1), w = random_tensor(device, {l.out, l.in}, DType::bf16, 2),
                    before = random_tensor(device, {l.rows, l.in}, DType::bf16, 3), dx = Tensor::empty({l.rows, l.in}, DType::bf16, device), &device] {
              Backend& k = device.backend();
              kernels::Gemm g = input_gradient_of(l);
              const bool taken = k.takes_gelu_slope(g);
              if (taken) g.gelu_slope_of = before.raw();
              k.gemm(g, dy.raw(), w.raw(), dx.raw());
              if (!taken) k.unary_backward(kernels::UnaryOp::gelu, Num::bf16, dx.numel(), before.raw(), dx.raw(), dx.raw());
            };
          }};
}

/// So with the bias's gradient.
Case with_sums(Device& device, const Layer& l) {
  return {fmt::format("  dW and db, added in f32 ({})", l.name), Bound::products(DType::bf16), flop(l), [=, &device]() -> std::function<void()> {
            return [l, dy = random_tensor(device, {l.rows, l.out}, DType::bf16, 1), x = random_tensor(device, {l.rows, l.in}, DType::bf16, 2),
                    dw = random_tensor(device, {l.out, l.in}, DType::f32, 3), db = random_tensor(device, {l.out}, DType::f32, 4), &device] {
              Backend& k = device.backend();
              kernels::Gemm g = weight_gradient_of(l, true);
              const bool taken = k.takes_sums_of_a(g);
              if (taken) g.sums_of_a = db.raw();
              k.gemm(g, dy.raw(), x.raw(), dw.raw());
              if (!taken) k.column_sum(Num::bf16, dy.raw(), l.rows, l.out, l.out, Num::f32, db.raw(), true);
            };
          }};
}

/// A random matrix [rows, cols] in fp8 with one scale, straight and turned over.
struct Fp8Operand {
  Tensor bytes;
  kernels::Fp8Places at;
  Num num;
  Fp8Operand(Device& device, std::int64_t rows, std::int64_t cols, Num to, std::uint64_t key)
      : at(kernels::fp8_places(kernels::Scaling::tensor, rows, cols, true, true)), num(to) {
    bytes = Tensor::empty({at.bytes}, DType::u8, device);
    const Tensor x = random_tensor(device, {rows, cols}, DType::bf16, key);
    kernels::Quantize q;
    q.to = to, q.rows = rows, q.cols = q.stride = cols, q.x = x.raw();
    q.data = part(at.data), q.scale = q.turned_scale = part(at.scale), q.turned = part(at.turned);
    device.backend().quantize(q);
  }
  void* part(std::int64_t offset) const { return static_cast<std::uint8_t*>(bytes.raw()) + offset; }
};

/// The three products of a layer in fp8; each sums along the rows of what it reads, straight or turned over.
std::vector<Case> in_fp8(Device& device, const Layer& l) {
  const auto one = [&](std::string name, std::int64_t m, std::int64_t n, std::int64_t k, Num c, auto left, auto right, bool left_turned, bool right_turned) {
    return Case{std::move(name), Bound::products(DType::f8e4m3), flop(l), [=, &device]() -> std::function<void()> {
                  kernels::GemmFp8 g;
                  const Fp8Operand a = left(), b = right();
                  g.a = a.num, g.b = b.num, g.c = c, g.m = m, g.n = g.ldc = n, g.k = k, g.accumulate = c == Num::f32;
                  return [=, &device, to = random_tensor(device, {m, n}, type_of(c), 9)] {
                    kernels::GemmFp8 now = g;
                    now.a_scale = a.part(a.at.scale), now.b_scale = b.part(b.at.scale);
                    device.backend().gemm_fp8(now, a.part(left_turned ? a.at.turned : a.at.data), b.part(right_turned ? b.at.turned : b.at.data), to.raw(), nullptr, nullptr);
                  };
                }};
  };
  const auto x = [l, &device] { return Fp8Operand(device, l.rows, l.in, Num::f8e4m3, 1); };
  const auto w = [l, &device] { return Fp8Operand(device, l.out, l.in, Num::f8e4m3, 2); };
  const auto dy = [l, &device] { return Fp8Operand(device, l.rows, l.out, Num::f8e5m2, 3); };
  const std::string of = fmt::format(" ({})", l.name);
  return {one(fmt::format("product fp8 {} x {} x {}", l.rows, l.out, l.in) + of, l.rows, l.out, l.in, Num::bf16, x, w, false, false),
          one("  fp8 dx" + of, l.rows, l.in, l.out, Num::bf16, dy, w, false, true), one("  fp8 dW, added in f32" + of, l.out, l.in, l.rows, Num::f32, dy, x, true, true)};
}

}  // namespace

Case square_case(Device& device, Size size, DType dtype) {
  const std::int64_t n = fewer(size == Size::small, dtype == DType::bf16 ? 8192 : 4096, 64);
  const Layer square{"", n, n, n};
  return plain(device, fmt::format("product {} {} x {} x {}", name_of(dtype), n, n, n), square, forward_of(square, dtype));
}

std::vector<Case> product_cases(Device& device, Size size) {
  struct Shape { Layer layer; bool gelu_behind, gelu_ahead, bias, fp8; };
  const bool fp8 = device.backend().fp8_problem(kernels::Scaling::tensor).empty();
  std::vector<Case> all;
  for (const Shape& s : {Shape{{"GPT-2 124M qkv", 32768, 2304, 768}, false, false, true, false}, Shape{{"GPT-2 124M up", 32768, 3072, 768}, true, false, true, false},
                         Shape{{"GPT-2 124M down", 32768, 768, 3072}, false, true, true, false}, Shape{{"GPT-2 1.5B up", 16384, 6400, 1600}, true, false, true, true},
                         Shape{{"GPT-2 1.5B down", 16384, 1600, 6400}, false, true, true, true}, Shape{{"Qwen2.5-1.5B gate, up", 16384, 17920, 1536}, false, false, false, true},
                         Shape{{"Llama-3-8B gate, up", 16384, 28672, 4096}, false, false, false, true}, Shape{{"Llama-3-8B down", 16384, 4096, 14336}, false, false, false, true}}) {
    Layer l = s.layer;
    if (size == Size::small) l.rows /= 256, l.out = std::max<std::int64_t>(16, l.out / 256 / 16 * 16), l.in = std::max<std::int64_t>(16, l.in / 256 / 16 * 16);  // fp8's multiples
    const std::string of = fmt::format(" ({})", l.name);
    all.push_back(plain(device, fmt::format("product bf16 {} x {} x {}", l.rows, l.out, l.in) + of, l, forward_of(l, DType::bf16)));
    if (s.gelu_behind) all.push_back(with_gelu(device, l));
    all.push_back(plain(device, "  dx" + of, l, input_gradient_of(l)));
    if (s.gelu_ahead) all.push_back(with_slope(device, l));
    all.push_back(plain(device, "  dW, f32" + of, l, weight_gradient_of(l, false)));
    all.push_back(plain(device, "  dW, added in f32" + of, l, weight_gradient_of(l, true)));
    if (s.bias) all.push_back(with_sums(device, l));
    if (!s.fp8 || !fp8) continue;
    for (Case& c : in_fp8(device, l)) all.push_back(std::move(c));
  }
  return all;
}

}  // namespace capstan::bench
