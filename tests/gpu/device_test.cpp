// The CUDA device beside the CPU: what must be equal to the bit, what must be refused, and how.
#include "base/cuda_device.h"
#include "core/ops/harness.h"

#include <capstan/random.h>
#include <capstan/update.h>
#include <kernels/backend.h>
#include <kernels/queue.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

namespace capstan::testing {
namespace {

class Gpu : public ::testing::Test {
 protected:
  std::shared_ptr<Device> gpu = make_cuda_device(), cpu = make_cpu_device(2);
  Device* both[2] = {gpu.get(), cpu.get()};

  /// f(device) on both, compared bit by bit.
  void expect_equal(const char* what, const std::function<Tensor(Device&)>& f) {
    EXPECT_EQ(bits(f(*gpu)), bits(f(*cpu))) << what;
  }
  std::string message_of(const std::function<void()>& f) {
    try {
      f();
    } catch (const std::exception& e) {
      return e.what();
    }
    return "";
  }
};

TEST_F(Gpu, GivesTheCpusBitsWhereArithmeticIsTheSame) {
  for (DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    for (const Dims& shape : {Dims{1}, Dims{3, 17}, Dims{65, 130}}) {
      const auto input = [&](Device& d, std::uint64_t seed) { return make(d, random_values(shape.product(), seed, 0.25, 4), shape, dtype); };
      expect_equal("add", [&](Device& d) { return ops::add(input(d, 1), input(d, 2)); });
      expect_equal("div", [&](Device& d) { return ops::div(input(d, 1), input(d, 2)); });
      expect_equal("scale", [&](Device& d) { return ops::scale(input(d, 1), 1.7, -0.3); });
      expect_equal("sqrt", [&](Device& d) { return ops::sqrt(input(d, 1)); });
      for (DType to : {DType::f64, DType::f32, DType::bf16, DType::i32, DType::i64, DType::u8})
        expect_equal("cast", [&](Device& d) { return input(d, 1).to(to); });
      if (shape.size() == 2) {
        expect_equal("transposed", [&](Device& d) { return input(d, 1).transposed(0, 1).contiguous(); });
        expect_equal("slice", [&](Device& d) { return input(d, 1).narrow(1, 1, shape[1] - 2).contiguous(); });
        expect_equal("bias", [&](Device& d) { return ops::add(input(d, 1), input(d, 2).narrow(0, 0, 1)); });
      }
    }
  }
}

TEST_F(Gpu, DrawsTheCpusRandomNumbers) {
  for (DType dtype : {DType::f64, DType::f32, DType::bf16})
    for (bool normal : {false, true})
      for (std::uint64_t begin : {0u, 1u, 2u, 3u, 4093u})
        expect_equal("random", [&](Device& d) {
          const Tensor t = Tensor::empty(Dims{1001}, dtype, d);
          kernels::RandomFill fill;
          fill.key = 77, fill.step = 5, fill.begin = begin, fill.normal = normal, fill.scale = 0.02;
          d.backend().random(static_cast<kernels::Num>(dtype), fill, t.numel(), t.raw());
          return t;
        });
  for (std::int64_t cols : {1, 5, 64, 131})
    expect_equal("dropout", [&](Device& d) {
      const std::vector<std::int64_t> ids = {3, 0, 7, 1000000007, 8};
      const Tensor x = make(d, random_values(5 * cols, 3), Dims{5, cols}, DType::f32);
      return ops::dropout(x, 0.3, Rng(1, "drop", 9), Tensor::of(std::span<const std::int64_t>(ids), Dims{5}, d));
    });
}

TEST_F(Gpu, UpdatesWeightsAsTheCpuDoes) {
  for (auto [value_type, state_type] : {std::pair{DType::f32, DType::f32}, std::pair{DType::f64, DType::f64}, std::pair{DType::f64, DType::f32}})
    for (std::int64_t n : {1, 7, 1030}) {
      const auto tensors = [&](Device& d) {
        std::vector<Tensor> t;
        for (std::uint64_t i = 0; i < 4; ++i) t.push_back(make(d, random_values(n, i + 1, i == 3 ? 0 : -1, 1), Dims{n}, i < 2 ? value_type : state_type));
        return t;
      };
      for (std::size_t which : {0u, 2u, 3u})
        expect_equal("adamw", [&, t = tensors](Device& d) {
          const auto x = t(d);
          update::adamw({0.7, 0.99, 1e-2, 0.1, 0.95, 0.05, 1.3, 1e-8}, x[0], x[1], x[2], x[3]);
          return x[which];
        });
      for (bool nesterov : {false, true})
        expect_equal("sgd", [&](Device& d) {
          const auto x = tensors(d);
          update::sgd({0.7, 0.1, 0.9, 1e-2, nesterov}, x[0], x[1], x[2]);
          return x[0];
        });
      expect_equal("plain sgd", [&](Device& d) {
        const auto x = tensors(d);
        update::sgd({0.7, 0.1, 0, 1e-2, false}, x[0], x[1], Tensor());
        return x[0];
      });
    }
  for (bool nesterov : {false, true})
    expect_equal("momentum and axpby", [&](Device& d) {
      const auto matrix = [&](std::uint64_t seed) { return make(d, random_values(7 * 12, seed), Dims{7, 12}, DType::f32).narrow(1, 3, 5); };
      const Tensor grad = matrix(1), buffer = matrix(2), value = matrix(3), step = update::momentum(grad, buffer, 0.5, 0.9, nesterov);
      update::axpby(0.9, value, -0.1, step, value);
      return value.contiguous();
    });
}

TEST_F(Gpu, MeasuresGradientsInF64) {
  for (std::int64_t n : {1, 1000, 70001}) {
    const auto values = random_values(n, 4);
    double want = 0;
    for (double v : values) want += static_cast<double>(static_cast<float>(v)) * static_cast<double>(static_cast<float>(v));
    const Tensor t = make(*gpu, values, Dims{n}, DType::f32);
    const kernels::Piece one{kernels::Num::f32, t.raw(), n};
    const kernels::Piece twice[] = {one, one};
    EXPECT_NEAR(gpu->backend().sum_of_squares(std::span(&one, 1)), want, 1e-12 * want);
    EXPECT_EQ(gpu->backend().sum_of_squares(twice), 2 * gpu->backend().sum_of_squares(std::span(&one, 1)));
    EXPECT_EQ(gpu->backend().first_nonfinite(twice), -1);
    auto bad = values;
    bad.back() = std::numeric_limits<double>::infinity();
    const Tensor u = make(*gpu, bad, Dims{n}, DType::f32);
    const kernels::Piece second[] = {one, {kernels::Num::f32, u.raw(), n}};
    EXPECT_EQ(gpu->backend().first_nonfinite(second), 1);
    EXPECT_FALSE(std::isfinite(gpu->backend().sum_of_squares(second)));
    const Tensor unit = t.clone();
    update::normalize(unit, 1e-7);
    const kernels::Piece after{kernels::Num::f32, unit.raw(), n};
    EXPECT_NEAR(gpu->backend().sum_of_squares(std::span(&after, 1)), 1, 1e-5);
  }
}

TEST_F(Gpu, FindsIdsInAPartOfATableAsTheCpuDoes) {
  for (const std::int64_t count : {0, 1, 255, 256, 257, 1000})
    for (const auto& [begin, rows] : std::vector<std::pair<std::int64_t, std::int64_t>>{{0, 5}, {5, 4}, {9, 0}, {3, 100}})
      for (const DType dtype : {DType::f32, DType::f64})
        for (const int which : {0, 1, 2, 3})  // local, mine, others, local alone
          expect_equal("local_ids", [&, begin = begin, rows = rows](Device& d) {
            std::vector<std::int32_t> ids;
            for (std::int64_t t = 0; t < count; ++t) ids.push_back(static_cast<std::int32_t>((t * t + 3) % 11) - 1);
            const Tensor all = Tensor::of(std::span<const std::int32_t>(ids), Dims{count}, d), local = Tensor::full(Dims{count}, 77, DType::i32, d);
            const Tensor mine = Tensor::full(Dims{count}, 77, dtype, d), others = Tensor::full(Dims{count}, 77, dtype, d);
            d.backend().local_ids(count, all.data<std::int32_t>(), begin, rows, local.data<std::int32_t>(), static_cast<kernels::Num>(dtype),
                                  which == 3 ? nullptr : mine.raw(), which == 3 ? nullptr : others.raw());
            return which == 1 ? mine : which == 2 ? others : local;
          });
}

TEST_F(Gpu, NamesAnIdOutOfRangeAtTheNextWaitAndGoesOn) {
  const Tensor table = Tensor::zeros(Dims{5, 4}, DType::f32, *gpu);
  const std::vector<std::int32_t> ids = {0, 4, 9, 1};
  const Tensor at = Tensor::of(std::span<const std::int32_t>(ids), Dims{4}, *gpu);
  const Tensor rows = ops::gather(table, at);
  const std::string text = message_of([&] { gpu->synchronize(); });
  EXPECT_NE(text.find("gather"), std::string::npos) << text;
  EXPECT_NE(text.find("9"), std::string::npos) << text;
  EXPECT_EQ(message_of([&] { gpu->synchronize(); }), "");
  EXPECT_EQ(doubles(rows).size(), 16u);
}

/// Products are timed and kept in a file of this test's, as long as this lives.
class TunedProducts {
 public:
  TunedProducts(Device& gpu, const char* name) : file_(std::filesystem::temp_directory_path() / ("capstan-" + std::string(name) + "-" + std::to_string(getpid()) + ".txt")) {
    gpu.backend().queue()->tune_products(file_.string());
  }
  ~TunedProducts() { std::filesystem::remove(file_), std::filesystem::remove(file_.string() + ".lock"); }
  TunedProducts(const TunedProducts&) = delete;
  TunedProducts& operator=(const TunedProducts&) = delete;
  std::string text() const {
    std::ifstream file(file_);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  int that_say(const std::string& word) const {
    std::istringstream lines(text());
    int count = 0;
    for (std::string line; std::getline(lines, line);) count += line.find(word) != std::string::npos;
    return count;
  }

 private:
  std::filesystem::path file_;
};

// Of the sums before they are rounded where the library has the epilogue, else of what was stored; what it was taken of is there
// either way. Which it was, the file of products says: bits may agree.
TEST_F(Gpu, TakesGeluIntoTheProductWhereItCan) {
  const TunedProducts products(*gpu, "gelu");
  struct Shape { std::int64_t rows, in, out; };
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const bool biased : {false, true})
      for (const auto [rows, in, out] : {Shape{1, 64, 8}, {33, 64, 40}, {130, 48, 96}, {33, 64, 36}, {33, 17, 8}, {7, 17, 5}}) {
        SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << rows << " x " << in << " -> " << out << (biased ? " with a bias" : ""));
        const auto tensor = [&](const Dims& shape, std::uint64_t seed) { return make(*gpu, random_values(shape.product(), seed, -1, 1), shape, dtype); };
        const Tensor x = tensor(Dims{rows, in}, 1), w = tensor(Dims{out, in}, 2), b = tensor(Dims{out}, 3);
        const Tensor y = Tensor::empty(Dims{rows, out}, dtype, *gpu), before = Tensor::empty(Dims{rows, out}, dtype, *gpu), plain = Tensor::empty(Dims{rows, out}, dtype, *gpu);
        kernels::Gemm g;
        g.a = g.b = g.c = static_cast<kernels::Num>(dtype), g.trans_b = true;
        g.m = rows, g.n = g.ldc = out, g.k = g.lda = g.ldb = in;
        gpu->backend().gemm(g, x.raw(), w.raw(), plain.raw(), biased ? b.raw() : nullptr);
        g.before_gelu = before.raw();
        const int others = products.that_say(" gelu");
        gpu->backend().gemm(g, x.raw(), w.raw(), y.raw(), biased ? b.raw() : nullptr);
        EXPECT_TRUE(near(before, plain, dtype));
        std::vector<double> exact = doubles(x), weight = doubles(w), bias = doubles(b), want;
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t j = 0; j < out; ++j) {
            double sum = biased ? bias[static_cast<std::size_t>(j)] : 0;
            for (std::int64_t k = 0; k < in; ++k) sum += exact[static_cast<std::size_t>(i * in + k)] * weight[static_cast<std::size_t>(j * in + k)];
            want.push_back(0.5 * sum * (1 + std::tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum))));
          }
        EXPECT_TRUE(near(doubles(y), want, tolerance_of(dtype)));
        const bool taken = products.that_say(" gelu") > others;
        if (dtype != DType::bf16 || out % 8 != 0) {
          EXPECT_FALSE(taken);
        } else if (in % 8 == 0 && rows > 1) {
          EXPECT_TRUE(taken) << "GELU was a pass of its own";
        } else if (in % 8 != 0 && gpu->describe().find("emulated") != std::string::npos) {
          EXPECT_FALSE(taken) << "the library has no algorithm for it";
        }
      }
}

// The gradient through GELU: the product times the slope, whether the library has such an epilogue or a pass follows.
TEST_F(Gpu, TakesGeluSlopeOfAProduct) {
  const TunedProducts products(*gpu, "slope");
  struct Shape { std::int64_t rows, out, in; };
  for (const auto [rows, out, in] : {Shape{1, 64, 8}, {33, 64, 40}, {130, 48, 96}, {33, 17, 8}}) {
    SCOPED_TRACE(::testing::Message() << rows << " x " << out << " -> " << in);
    const auto tensor = [&](const Dims& shape, std::uint64_t seed) { return make(*gpu, random_values(shape.product(), seed, -1, 1), shape, DType::bf16); };
    const Tensor dy = tensor(Dims{rows, out}, 1), w = tensor(Dims{out, in}, 2), at = tensor(Dims{rows, in}, 3), dx = Tensor::empty(Dims{rows, in}, DType::bf16, *gpu);
    kernels::Gemm g;
    g.a = g.b = g.c = kernels::Num::bf16, g.m = rows, g.n = g.ldb = g.ldc = in, g.k = g.lda = out;
    ASSERT_TRUE(gpu->backend().takes_gelu_slope(g));
    g.gelu_slope_of = at.raw();
    gpu->backend().gemm(g, dy.raw(), w.raw(), dx.raw());
    const std::vector<double> grad = doubles(dy), weight = doubles(w), x = doubles(at);
    std::vector<double> want;
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < in; ++j) {
        double sum = 0;
        for (std::int64_t k = 0; k < out; ++k) sum += grad[static_cast<std::size_t>(i * out + k)] * weight[static_cast<std::size_t>(k * in + j)];
        const double v = x[static_cast<std::size_t>(i * in + j)], t = std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v));
        want.push_back(sum * (0.5 * (1 + t) + 0.5 * v * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * v * v)));
      }
    EXPECT_TRUE(near(doubles(dx), want, tolerance_of(DType::bf16)));
    const std::string text = products.text();
    if (out % 8 == 0) {
      EXPECT_NE(text.find(std::to_string(rows) + "x" + std::to_string(in) + "x" + std::to_string(out) + " nn"), std::string::npos) << text;
      EXPECT_NE(text.find(" gelu slope"), std::string::npos) << "the slope was a pass of its own: " << text;
    }
  }
  kernels::Gemm wide;
  wide.m = wide.n = wide.k = wide.lda = wide.ldb = wide.ldc = 8;
  EXPECT_FALSE(gpu->backend().takes_gelu_slope(wide)) << "f32: nothing says how closely the epilogue's tanh is computed";
}

// The bias's gradient beside the weight's, stored or added to what is there, in the product's epilogue or in a pass of its own.
TEST_F(Gpu, TakesSumsOfAWithTheProductThatReadsIt) {
  const TunedProducts products(*gpu, "sums");
  struct Shape { std::int64_t rows, out, in; };
  for (const auto [rows, out, in] : {Shape{8, 8, 8}, {64, 40, 24}, {136, 96, 48}, {64, 5, 7}, {17, 33, 8}, {1, 16, 16}}) {
    const auto tensor = [&](const Dims& shape, std::uint64_t seed, DType type) { return make(*gpu, random_values(shape.product(), seed, -1, 1), shape, type); };
    const Tensor wide = tensor(Dims{rows, out + 8}, 1, DType::bf16), dy = wide.narrow(1, 8, out), x = tensor(Dims{rows, in}, 2, DType::bf16);
    for (const bool accumulate : {false, true}) {
      SCOPED_TRACE(::testing::Message() << rows << " rows, " << out << " x " << in << (accumulate ? ", added" : ""));
      const Tensor dw = tensor(Dims{out, in}, 3, DType::f32), db = tensor(Dims{out}, 4, DType::f32);
      const std::vector<double> g = doubles(dy.contiguous()), input = doubles(x), dw_before = doubles(dw), db_before = doubles(db);
      kernels::Gemm p;
      p.a = p.b = kernels::Num::bf16, p.c = kernels::Num::f32, p.trans_a = true, p.accumulate = accumulate;
      p.m = out, p.n = p.ldb = p.ldc = in, p.k = rows, p.lda = out + 8;
      ASSERT_TRUE(gpu->backend().takes_sums_of_a(p));
      p.sums_of_a = db.raw();
      gpu->backend().gemm(p, dy.raw(), x.raw(), dw.raw());
      std::vector<double> want_dw, want_db;
      for (std::int64_t o = 0; o < out; ++o) {
        double sum = accumulate ? db_before[static_cast<std::size_t>(o)] : 0;
        for (std::int64_t r = 0; r < rows; ++r) sum += g[static_cast<std::size_t>(r * out + o)];
        want_db.push_back(sum);
        for (std::int64_t i = 0; i < in; ++i) {
          double product = accumulate ? dw_before[static_cast<std::size_t>(o * in + i)] : 0;
          for (std::int64_t r = 0; r < rows; ++r) product += g[static_cast<std::size_t>(r * out + o)] * input[static_cast<std::size_t>(r * in + i)];
          want_dw.push_back(product);
        }
      }
      EXPECT_TRUE(near(doubles(db), want_db, tolerance_of(DType::f32)));
      EXPECT_TRUE(near(doubles(dw), want_dw, tolerance_of(DType::f32)));
    }
    const std::string text = products.text();
    if (rows % 8 == 0 && out % 8 == 0 && in % 8 == 0) {
      EXPECT_NE(text.find(std::to_string(out) + "x" + std::to_string(in) + "x" + std::to_string(rows) + " tn"), std::string::npos) << text;
      EXPECT_NE(text.find(" sums of a"), std::string::npos) << "they were a pass of their own: " << text;
    }
  }
  kernels::Gemm f32;
  f32.trans_a = true, f32.m = f32.n = f32.k = f32.lda = f32.ldb = f32.ldc = 8;
  EXPECT_FALSE(gpu->backend().takes_sums_of_a(f32));
}

TEST_F(Gpu, SaysWhatIsHeldWhenMemoryRunsOut) {
  const Tensor held = Tensor::zeros(Dims{1 << 20}, DType::f32, *gpu);
  const std::int64_t before = gpu->bytes_held();
  EXPECT_GE(before, 4 << 20);
  const std::string text = message_of([&] { Tensor::empty(Dims{std::int64_t{1} << 50}, DType::f32, *gpu); });
  for (const char* part : {"cuda memory", "cannot allocate", "tensors hold", "data.micro_batch", "train.recompute"})
    EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
  EXPECT_EQ(gpu->bytes_held(), before);
}

TEST_F(Gpu, SaysWhatMemoryIsForWhenItRunsOut) {
  const auto text = [&] { return message_of([&] { Tensor::empty(Dims{std::int64_t{1} << 50}, DType::f32, *gpu); }); };
  const auto expect = [&](const std::string& part) { EXPECT_NE(text().find(part), std::string::npos) << part << " is not in: " << text(); };
  const auto take = [&](Holding what, std::int64_t mib) {
    const HoldingAs holding(*gpu, what);
    return Tensor::empty(Dims{mib << 18}, DType::f32, *gpu);
  };
  Tensor weights = take(Holding::weights, 40);
  const Tensor gradients = take(Holding::gradients, 20), state = take(Holding::optimizer, 80), other = Tensor::empty(Dims{10 << 18}, DType::f32, *gpu);
  expect("tensors hold 150 MiB (weights 40.0 MiB, gradients 20.0 MiB, optimizer state 80.0 MiB, activations and the rest 10.0 MiB)");
  weights = Tensor();
  expect("tensors hold 110 MiB (weights 0 B, gradients 20.0 MiB");
}

TEST_F(Gpu, SaysItForTheKernelsOwnMemoryToo) {
  if (gpu->describe().find("emulated") == std::string::npos) GTEST_SKIP() << "only the emulated GPU can be made as small";
  const Tensor x = Tensor::zeros(Dims{1 << 16}, DType::f32, *gpu);
  ::setenv("EMULATED_GPU_BYTES", "0", 1);
  std::vector<Tensor> all;
  for (std::int64_t size = std::int64_t{1} << 30; size >= 256; size /= 2)
    while (message_of([&] { all.push_back(Tensor::empty(Dims{size}, DType::u8, *gpu)); }).empty()) {}
  const kernels::Piece piece{kernels::Num::f32, x.raw(), x.numel()};
  const std::string text = message_of([&] { gpu->backend().sum_of_squares(std::span(&piece, 1)); });
  ::unsetenv("EMULATED_GPU_BYTES");
  for (const char* part : {"cuda memory", "bytes of scratch memory: tensors hold", "train.recompute"}) EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
}

TEST_F(Gpu, CopiesBetweenDevices) {
  const Tensor here = make(*cpu, random_values(3000000, 8), Dims{1500, 2000}, DType::f32), there = Tensor::empty(here.shape(), DType::f32, *gpu);
  there.copy_from(here);  // more than the staging memory holds
  EXPECT_EQ(bits(there), bits(here));
  const Tensor part = Tensor::zeros(Dims{1500, 2000}, DType::bf16, *gpu);
  part.narrow(1, 7, 100).copy_from(here.narrow(1, 3, 100));
  const Tensor back = Tensor::empty(Dims{1500, 100}, DType::bf16, *cpu);
  back.copy_from(part.narrow(1, 7, 100));
  EXPECT_EQ(bits(back), bits(here.narrow(1, 3, 100).contiguous().to(DType::bf16)));
  EXPECT_EQ(Tensor::full(Dims{}, 2.5, DType::bf16, *gpu).item(), 2.5);
}

}  // namespace
}  // namespace capstan::testing
