// Timed choices of products: kept in a file, the same bits for whoever reads it, and nothing damaged is believed.
#include "support.h"

#include <capstan/ops.h>
#include <capstan/random.h>
#include <gmock/gmock.h>
#include <kernels/backend.h>
#include <kernels/queue.h>

#include <cstdlib>

namespace capstan::train::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class Products : public ::testing::Test {
 protected:
  ~Products() override { ::unsetenv("EMULATED_GPU_TIMES"); }
  Project project;
  const std::string file = (project / "choices/products.txt").string();

  /// Which of the emulated library's algorithms is the fastest from here on.
  static void fast(int algorithm) {
    const char* times[] = {"1,2,3", "3,1,2", "3,2,1"};
    ::setenv("EMULATED_GPU_TIMES", times[algorithm], 1);
  }
  static std::shared_ptr<Device> gpu() { return make_cuda_device(0, 2); }
  static std::string tune(Device& device, const std::string& file) { return device.backend().queue()->tune_products(file); }
  /// A product whose bits depend on the order in which it is summed.
  static std::vector<float> product(Device& device, std::int64_t rows = 3) {
    const auto random = [&](std::int64_t n, std::uint64_t seed) {
      std::vector<float> v(static_cast<std::size_t>(n));
      const Rng rng(seed, "products");
      for (std::int64_t i = 0; i < n; ++i) v[static_cast<std::size_t>(i)] = static_cast<float>(rng.bits(static_cast<std::uint64_t>(i))) * 0x1p-31f - 1.0f;
      return v;
    };
    const auto x = random(rows * 257, 1), w = random(5 * 257, 2);
    const Tensor y = ops::linear(Tensor::of(std::span<const float>(x), Dims{rows, 257}, device), Tensor::of(std::span<const float>(w), Dims{5, 257}, device));
    std::vector<float> host(static_cast<std::size_t>(y.numel()));
    y.copy_to_host(host.data(), y.bytes());
    return host;
  }
  /// The same of fp8 operands, in f32.
  static std::vector<float> fp8_product(Device& device) {
    constexpr std::int64_t rows = 3, out = 16, in = 272;
    const auto quantized = [&](std::int64_t n, std::uint64_t seed) {
      std::vector<float> v(static_cast<std::size_t>(n * in));
      const Rng rng(seed, "products");
      for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(rng.bits(i)) * 0x1p-31f - 1.0f;
      const Tensor x = Tensor::of(std::span<const float>(v), Dims{n, in}, device), bytes = Tensor::empty(Dims{n * in + 256}, DType::u8, device);
      kernels::Quantize q;
      q.from = kernels::Num::f32, q.rows = n, q.cols = q.stride = in, q.x = x.raw();
      q.scale = bytes.raw(), q.data = bytes.narrow(0, 256, n * in).raw();
      device.backend().quantize(q);
      return bytes;
    };
    const Tensor a = quantized(rows, 1), b = quantized(out, 2), c = Tensor::empty(Dims{rows, out}, DType::f32, device);
    kernels::GemmFp8 g;
    g.c = kernels::Num::f32, g.m = rows, g.n = g.ldc = out, g.k = in, g.a_scale = a.raw(), g.b_scale = b.raw();
    device.backend().gemm_fp8(g, a.narrow(0, 256, rows * in).raw(), b.narrow(0, 256, out * in).raw(), c.raw());
    std::vector<float> host(static_cast<std::size_t>(c.numel()));
    c.copy_to_host(host.data(), c.bytes());
    return host;
  }
  static std::string message_of(const std::function<void()>& f) {
    try {
      f();
    } catch (const std::exception& e) {
      return e.what();
    }
    return "";
  }
};

TEST_F(Products, AreTheFirstProposalUnlessChoicesAreKept) {
  std::vector<std::vector<float>> bits;
  for (int algorithm : {0, 1, 2}) {
    fast(algorithm);
    bits.push_back(product(*gpu()));
  }
  EXPECT_EQ(bits[1], bits[0]);
  EXPECT_EQ(bits[2], bits[0]);
}

TEST_F(Products, KeepTheFirstTimingForEveryLaterRun) {
  const auto first = product(*gpu());
  fast(2);
  const auto device = gpu();
  EXPECT_THAT(tune(*device, file), HasSubstr("0 known"));
  const auto tuned = product(*device);
  EXPECT_NE(tuned, first) << "the emulated algorithms must differ, or this proves nothing";
  fast(1);  // another day, another clock
  const auto later = gpu();
  EXPECT_THAT(tune(*later, file), HasSubstr("1 known"));
  EXPECT_EQ(product(*later), tuned);
  EXPECT_EQ(product(*device), tuned);
  const auto elsewhere = gpu();
  EXPECT_THAT(tune(*elsewhere, ""), HasSubstr("kept nowhere"));
  EXPECT_NE(product(*elsewhere), tuned);
  EXPECT_NE(product(*elsewhere), first);
}

TEST_F(Products, InFp8AreChosenAndKeptToo) {
  const auto first = fp8_product(*gpu());
  fast(2);
  const auto device = gpu();
  tune(*device, file);
  const auto tuned = fp8_product(*device);
  EXPECT_NE(tuned, first) << "the emulated algorithms must differ, or this proves nothing";
  EXPECT_THAT(read_file(file), HasSubstr("3 x 16 x 272 fp8"));
  fast(1);
  const auto later = gpu();
  EXPECT_THAT(tune(*later, file), HasSubstr("1 known"));
  EXPECT_EQ(fp8_product(*later), tuned);
}

// A product that ends in GELU is another kind than the same one without.
TEST_F(Products, AreKeptByHowTheyEnd) {
  const auto device = gpu();
  tune(*device, file);
  const Tensor x = Tensor::zeros(Dims{3, 64}, DType::bf16, *device), w = Tensor::zeros(Dims{16, 64}, DType::bf16, *device), b = Tensor::zeros(Dims{16}, DType::bf16, *device);
  ops::linear(x, w), ops::linear(x, w, b), ops::linear_gelu(x, w), ops::linear_gelu(x, w, b);
  const Tensor y = Tensor::zeros(Dims{3, 16}, DType::bf16, *device);
  kernels::Gemm g;
  g.a = g.b = g.c = kernels::Num::bf16, g.m = 3, g.n = g.ldb = g.ldc = 16, g.k = g.lda = 64, g.gelu_slope_of = y.raw();
  device->backend().gemm(g, x.raw(), w.raw(), Tensor::empty(Dims{3, 16}, DType::bf16, *device).raw());
  const std::string text = read_file(file);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1 + 5) << text;
  EXPECT_THAT(text, AllOf(HasSubstr(" bias\t"), HasSubstr(" gelu\t"), HasSubstr(" gelu slope\t"), HasSubstr(" gelu bias\t")));
}

TEST_F(Products, AreAgreedOnByWhoSharesTheFile) {
  const auto one = gpu(), two = gpu();
  tune(*one, file), tune(*two, file);
  fast(1);
  const auto bits = product(*one);
  fast(2);
  EXPECT_EQ(product(*two), bits);  // the other was first
  const auto more = product(*two, 4);
  fast(1);
  EXPECT_EQ(product(*one, 4), more);
}

TEST_F(Products, KeepWhatOtherGpusChose) {
  fast(2);
  tune(*gpu(), file);
  const auto device = gpu();
  tune(*device, file);
  product(*device);
  std::string text = read_file(file);
  const std::string mine = text.substr(text.find('\n') + 1);
  // The same line as another GPU's; its checksum is FNV-1a of what follows it.
  std::string other = mine.substr(mine.find('\t') + 1, mine.size() - mine.find('\t') - 2);
  other.replace(other.find("emulated GPU"), 12, "another GPU!");
  std::uint64_t h = 0xcbf29ce484222325u;
  for (const char c : other) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  char sum[20];
  std::snprintf(sum, sizeof sum, "%016llx", static_cast<unsigned long long>(h));
  write_file(file, text.substr(0, text.find('\n') + 1) + sum + "\t" + other + "\n");
  const auto again = gpu();
  EXPECT_THAT(tune(*again, file), AllOf(HasSubstr("0 known"), HasSubstr("1 of another GPU or cuBLASLt")));
  product(*again);
  EXPECT_THAT(read_file(file), AllOf(HasSubstr("another GPU!"), HasSubstr("emulated GPU")));
}

TEST_F(Products, RefuseADamagedFile) {
  fast(1);
  const auto device = gpu();
  tune(*device, file);
  product(*device), product(*device, 4);
  const std::string good = read_file(file);
  EXPECT_EQ(message_of([&] { tune(*gpu(), file); }), "");
  std::string flipped = good;
  flipped[good.size() - 20] ^= 1;
  for (const std::string& bad : {flipped, good.substr(0, good.size() - 1), good.substr(0, good.size() - 30), std::string(), "step,loss\n" + good}) {
    write_file(file, bad);
    const std::string text = message_of([&] { tune(*gpu(), file); });
    EXPECT_THAT(text, AllOf(HasSubstr(file + ":"), HasSubstr("delete it"))) << bad.size();
  }
}

TEST_F(Products, RefuseAnAlgorithmThatDoesNotRun) {
  fast(1);
  const auto device = gpu();
  tune(*device, file);
  product(*device);
  std::string text = read_file(file);
  const std::size_t begin = text.find('\n') + 1;
  std::string line = text.substr(begin + 17, text.size() - begin - 18);
  line.replace(line.find("0000000000000001"), 16, "0000000000000009");
  std::uint64_t h = 0xcbf29ce484222325u;
  for (const char c : line) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  char sum[20];
  std::snprintf(sum, sizeof sum, "%016llx", static_cast<unsigned long long>(h));
  write_file(file, text.substr(0, begin) + sum + "\t" + line + "\n");
  const auto again = gpu();
  tune(*again, file);
  EXPECT_THAT(message_of([&] { product(*again); }), AllOf(HasSubstr(file), HasSubstr("does not run here"), HasSubstr("gemm_choice")));
}

TEST_F(Products, SayWhereAChoiceCannotBeKept) {
  const auto device = gpu();
  tune(*device, "/proc/products.txt");
  EXPECT_THAT(message_of([&] { product(*device); }), AllOf(HasSubstr("/proc/products.txt"), HasSubstr("run.gemm_file")));
}

}  // namespace
}  // namespace capstan::train::testing
