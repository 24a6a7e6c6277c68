// Kernels that memory holds back: norms, softmax, scores, elements, rows by id, optimizers, casts. Bytes are those that any
// implementation has to move: each operand once.
#include "bench/cases.h"
#include "bench/operands.h"

#include <fmt/format.h>
#include <kernels/queue.h>
#include <kernels/shared/fp8.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

namespace capstan::bench {

namespace {

using kernels::Backend;
using kernels::Num;
constexpr Num bf16 = Num::bf16;

/// Adds cases whose operands are made when they run: each case keeps it alive until then.
class Cases : public std::enable_shared_from_this<Cases> {
 public:
  Cases(Device& device, Size size) : device_(device), small_(size == Size::small) {}

  template <class Prepare>
  void add(std::string name, double bytes, Prepare prepare) {
    all.push_back({std::move(name), Bound::memory(), bytes, [self = shared_from_this(), prepare = std::move(prepare)]() -> std::function<void()> { return prepare(); }});
  }
  Tensor make(const Dims& shape, DType dtype, std::uint64_t key, double spread = 1) const { return random_tensor(device_, shape, dtype, key, spread); }
  Tensor empty(const Dims& shape, DType dtype) const { return Tensor::empty(shape, dtype, device_); }
  std::int64_t few(std::int64_t n, std::int64_t when_small) const { return fewer(small_, n, when_small); }

  void rows(std::int64_t rows, std::int64_t cols);
  void scores(std::int64_t rows, std::int64_t cols);
  void elements();
  void rows_by_id();
  void optimizers();
  void copies();
  void quantizers();
  std::vector<Case> all;

 private:
  Backend& kernels() const { return device_.backend(); }
  Device& device_;
  bool small_;
};

void Cases::rows(std::int64_t rows, std::int64_t cols) {
  const Dims shape{rows, cols};
  const std::string of = fmt::format(" bf16 {} x {}", rows, cols);
  const double one = 2 * real(rows) * real(cols);
  struct Operands { Tensor x, g, sum, y, w, b, mean, inverse, partial, partial_b; };
  const auto operands = [this, shape, rows, cols] {
    const std::int64_t blocks = kernels().norm_blocks(rows, cols);
    return Operands{make(shape, DType::bf16, 1), make(shape, DType::bf16, 2), make(shape, DType::bf16, 7), empty(shape, DType::bf16), make({cols}, DType::f32, 3), make({cols}, DType::f32, 4),
                    make({rows}, DType::f32, 5), make({rows}, DType::f32, 6), empty({blocks, cols}, DType::f32), empty({blocks, cols}, DType::f32)};
  };
  const double sums = 4 * real(kernels().norm_blocks(rows, cols)) * real(cols);
  Backend& k = kernels();
  for (const bool centre : {false, true}) {
    const std::string name = centre ? "layer_norm" : "rms_norm";
    for (const bool added : {false, true}) {
      add((added ? "add_" : "") + name + of, (added ? 4 : 2) * one, [=, &k] {
        return [o = operands(), rows, cols, centre, added, &k] {
          kernels::NormRows n{.centre = centre, .rows = rows, .cols = cols, .epsilon = 1e-5};
          n.x = o.x.raw(), n.w = o.w.raw(), n.b = centre ? o.b.raw() : nullptr, n.residual = added ? o.g.raw() : nullptr, n.sum = added ? o.sum.raw() : nullptr;
          n.y = o.y.raw(), n.mean = o.mean.raw(), n.inverse = o.inverse.raw();
          k.norm(bf16, n);
        };
      });
      add((added ? "add_" : "") + name + "_backward" + of, (added ? 4 : 3) * one + (centre ? 2 : 1) * sums, [=, &k] {
        return [o = operands(), rows, cols, centre, added, &k] {
          kernels::NormRowsBackward n{.centre = centre, .rows = rows, .cols = cols};
          n.x = o.x.raw(), n.w = o.w.raw(), n.mean = o.mean.raw(), n.inverse = o.inverse.raw(), n.g = o.g.raw(), n.g_sum = added ? o.sum.raw() : nullptr;
          n.dx = o.y.raw(), n.partial_w = o.partial.raw(), n.partial_b = centre ? o.partial_b.raw() : nullptr;
          k.norm_backward(bf16, n);
        };
      });
    }
  }
  add("softmax" + of, 2 * one, [=, &k] { return [o = operands(), rows, cols, &k] { k.softmax(bf16, rows, cols, o.x.raw(), o.y.raw(), false); }; });
  add("softmax_backward" + of, 3 * one, [=, &k] {
    return [o = operands(), rows, cols, &k] { k.softmax_backward(bf16, rows, cols, o.x.raw(), o.g.raw(), o.y.raw(), false); };
  });
}

void Cases::scores(std::int64_t rows, std::int64_t cols) {
  const std::string of = fmt::format(" f32 {} x {}", rows, cols);
  const double n = real(rows) * real(cols);
  Backend& k = kernels();
  enum class Form { plain, to_bf16, in_place, backward };
  const auto form = [&](const char* name, double bytes, Form f) {
    add(name + of, bytes, [=, this, &k]() {
      struct Operands { Tensor logits, narrow, logprob, logsumexp, entropy, weights, targets; };
      Operands o{make({rows, cols}, DType::f32, 1, 2), empty({rows, cols}, DType::bf16), make({rows}, DType::f32, 2), make({rows}, DType::f32, 3), make({rows}, DType::f32, 4),
                 make({rows}, DType::f32, 5), Tensor::of<std::int32_t>(std::vector<std::int32_t>(static_cast<std::size_t>(rows), static_cast<std::int32_t>(cols / 3)), {rows}, device_)};
      kernels::ScoreRows s;
      s.rows = rows, s.cols = cols, s.stride = cols, s.logits = o.logits.raw(), s.targets = o.targets.template data<std::int32_t>();
      s.logprob = o.logprob.raw(), s.logsumexp = o.logsumexp.raw(), s.entropy = o.entropy.raw();
      if (f == Form::to_bf16 || f == Form::in_place) s.weights = o.weights.template data<float>();
      if (f == Form::to_bf16 || f == Form::backward) s.narrow = o.narrow.raw();
      if (f == Form::backward) s.g_logprob = o.weights.raw();
      return [o, s, f, &k] { f == Form::backward ? k.score_rows_backward(s) : k.score_rows(s); };
    });
  };
  form("score_rows", 4 * n, Form::plain);
  form("score_rows to bf16 gradient", 6 * n, Form::to_bf16);
  form("score_rows gradient in place", 8 * n, Form::in_place);
  form("score_rows_backward", 6 * n, Form::backward);
}

void Cases::elements() {
  const std::int64_t rows = few(16384, 32), cols = few(8192, 64), n = rows * cols;
  const Dims shape{rows, cols};
  const std::string of = fmt::format(" bf16 {} x {}", rows, cols);
  const double one = 2 * real(n);
  Backend& k = kernels();
  struct Operands { Tensor x, g, y; };
  const auto operands = [this, shape, rows, cols] { return Operands{make(shape, DType::bf16, 1), make(shape, DType::bf16, 2), empty({rows, 2 * cols}, DType::bf16)}; };
  add("gelu" + of, 2 * one, [=, &k] { return [o = operands(), n, &k] { k.unary(kernels::UnaryOp::gelu, bf16, n, o.x.raw(), o.y.raw()); }; });
  add("gelu_backward" + of, 3 * one, [=, &k] {
    return [o = operands(), n, &k] { k.unary_backward(kernels::UnaryOp::gelu, bf16, n, o.x.raw(), o.g.raw(), o.y.raw()); };
  });
  add("add" + of, 3 * one, [=, &k] { return [o = operands(), n, &k] { k.add(bf16, n, o.x.raw(), o.g.raw(), o.y.raw()); }; });
  const std::int64_t half = cols / 2;
  add("swiglu" + of, 1.5 * one, [=, &k] { return [o = operands(), rows, half, &k] { k.swiglu(bf16, rows, half, o.x.raw(), o.y.raw()); }; });
  add("swiglu_backward" + of, 2.5 * one, [=, &k] { return [o = operands(), rows, half, &k] { k.swiglu_backward(bf16, rows, half, o.x.raw(), o.g.raw(), o.y.raw()); }; });
  const std::int64_t size = few(128, 16), heads = cols / size;
  add(fmt::format("rope bf16 {} x {} heads of {}", rows, heads, size), 2 * one + 4 * real(rows) * real(size), [=, this, &k] {
    return [o = operands(), table = make({rows, size}, DType::f32, 7), rows, heads, size, &k] {
      k.rope(bf16, rows, heads, size, o.x.raw(), heads * size, table.raw(), o.y.raw(), false);
    };
  });
  add("column_sum" + of + " to f32", one + 4 * real(cols), [=, this, &k] {
    return [o = operands(), to = empty({cols}, DType::f32), rows, cols, &k] { k.column_sum(bf16, o.x.raw(), rows, cols, cols, Num::f32, to.raw(), false); };
  });
}

void Cases::rows_by_id() {
  const std::int64_t count = few(65536, 64), cols = few(1600, 32), table_rows = few(50304, 100);
  // Words follow Zipf's law: a few ids make up most of a text.
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const double u = static_cast<double>((i * 2654435761u) % 65536) / 65536;
    ids[i] = static_cast<std::int32_t>(std::min<double>(real(table_rows) - 1, std::pow(real(table_rows), u) - 1));
  }
  const std::string of = fmt::format(" bf16 {} x {} of {}", count, cols, table_rows);
  const double rows = 2 * real(count) * real(cols), table = real(table_rows) * real(cols);
  Backend& k = kernels();
  struct Operands { Tensor ids, rows, table, grad; };
  const auto operands = [this, ids, count, cols, table_rows] {
    return Operands{Tensor::of<std::int32_t>(ids, {count}, device_), make({count, cols}, DType::bf16, 1), make({table_rows, cols}, DType::bf16, 2),
                    empty({table_rows, cols}, DType::f32)};
  };
  add("embedding" + of, 2 * rows, [=, &k] {
    return [o = operands(), count, cols, table_rows, &k] { k.gather_rows(count, cols * 2, o.table.raw(), table_rows, o.ids.template data<std::int32_t>(), o.rows.raw()); };
  });
  add("embedding_backward" + of + ", Zipf", rows + 4 * table, [=, &k] {
    return [o = operands(), count, cols, table_rows, &k] {
      k.scatter_add_rows(bf16, count, cols, o.ids.template data<std::int32_t>(), o.rows.raw(), table_rows, Num::f32, o.grad.raw(), true);
    };
  });
}

void Cases::optimizers() {
  const std::int64_t n = few(std::int64_t{1} << 27, 1000);
  Backend& k = kernels();
  add(fmt::format("adamw f32 {:.0f} M weights", real(n) * 1e-6), 28 * real(n), [=, this, &k] {
    kernels::AdamWStep s;
    s.rate = 1e-4, s.beta1_rest = 0.1, s.beta2 = 0.95, s.beta2_rest = 0.05, s.epsilon = 1e-8;
    return [s, n, value = make({n}, DType::f32, 1), grad = make({n}, DType::f32, 2), m = Tensor::zeros({n}, DType::f32, device_), v = Tensor::zeros({n}, DType::f32, device_), &k] {
      k.adamw(s, Num::f32, Num::f32, n, value.raw(), grad.raw(), m.raw(), v.raw());
    };
  });
  // As training asks for it: nobody waits for the result.
  if (kernels::Queue* const queue = k.queue())
    add("gradient_norm f32", 4 * real(n), [=, this] {
      return [x = make({n}, DType::f32, 1), losses = Tensor::zeros({1}, DType::f64, device_), part = Tensor::empty({static_cast<std::int64_t>(sizeof(kernels::GatePart))}, DType::u8, device_), n, queue] {
        const kernels::Piece pieces[] = {{Num::f32, x.raw(), n}};
        queue->measure(pieces, losses.data<double>(), 1, static_cast<kernels::GatePart*>(part.raw()));
      };
    });
}

void Cases::copies() {
  const std::int64_t rows = few(16384, 32), cols = few(8192, 64);
  const double n = real(rows) * real(cols);
  const auto copying = [this](std::string name, double bytes, std::function<std::pair<Tensor, Tensor>()> make_pair) {
    add(std::move(name), bytes, [make_pair = std::move(make_pair)] { return [p = make_pair()] { p.first.copy_from(p.second); }; });
  };
  const Dims shape{rows, cols};
  copying("cast f32 to bf16", 6 * n, [=, this] { return std::pair{empty(shape, DType::bf16), make(shape, DType::f32, 1)}; });
  copying("cast bf16 to f32", 6 * n, [=, this] { return std::pair{empty(shape, DType::f32), make(shape, DType::bf16, 1)}; });
  copying("column slice bf16, a quarter", n, [=, this] { return std::pair{empty({rows, cols / 4}, DType::bf16), make(shape, DType::bf16, 1).narrow(1, cols / 8, cols / 4)}; });
  copying("transpose bf16", 4 * n, [=, this] { return std::pair{empty({cols, rows}, DType::bf16), make(shape, DType::bf16, 1).transposed(0, 1)}; });
}

void Cases::quantizers() {
  const std::int64_t rows = few(16384, 32), cols = few(8192, 64);
  const double n = real(rows) * real(cols);
  Backend& k = kernels();
  // Read twice: the scale is known only when every number was seen.
  for (const bool turned : {false, true})
    add(turned ? "quantize bf16 to e4m3, straight and turned" : "quantize bf16 to e4m3", (turned ? 6 : 5) * n, [=, this, &k] {
      kernels::Quantize q;
      q.rows = rows, q.cols = q.stride = cols;
      const kernels::Fp8Places at = kernels::fp8_places(q.scaling, rows, cols, true, true);
      return [=, &k, x = make({rows, cols}, DType::bf16, 1), bytes = Tensor::empty(Dims{at.bytes}, DType::u8, device_)] {
        kernels::Quantize now = q;
        auto* base = static_cast<std::uint8_t*>(bytes.raw());
        now.x = x.raw(), now.data = base + at.data, now.scale = base + at.scale;
        if (turned) now.turned = base + at.turned, now.turned_scale = base + at.turned_scale;
        k.quantize(now);
      };
    });
}

}  // namespace

Case copy_case(Device& device, Size size) {
  const std::int64_t n = fewer(size == Size::small, std::int64_t{1} << 28, 4096);
  return {fmt::format("copy of {} MiB, read and written", n >> 18), Bound::memory(), 8 * real(n), [n, &device]() -> std::function<void()> {
            return [from = random_tensor(device, {n}, DType::f32, 1), to = Tensor::empty({n}, DType::f32, device)] { to.copy_from(from); };
          }};
}

std::vector<Case> memory_cases(Device& device, Size size) {
  const auto made = std::make_shared<Cases>(device, size);
  Cases& cases = *made;
  const bool small = size == Size::small;
  if (small) {
    cases.rows(48, 96), cases.scores(8, 512);
  } else {
    for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{65536, 768}, {32768, 1600}, {16384, 4096}, {8192, 8192}, {524288, 128}}) cases.rows(rows, cols);
    for (const std::int64_t cols : {50304, 128256, 151936}) cases.scores(2048, cols);
  }
  cases.elements(), cases.rows_by_id(), cases.optimizers(), cases.copies(), cases.quantizers();
  return std::move(cases.all);
}

}  // namespace capstan::bench
