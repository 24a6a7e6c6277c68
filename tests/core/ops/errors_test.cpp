// What ops say when they are used wrongly; and that the checks of the generic suite can fail.
#include "core/ops/harness.h"

#include <gmock/gmock.h>

namespace capstan::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class OpErrors : public ::testing::Test {
 protected:
  Tensor t(const Dims& shape, DType dtype = DType::f32) { return Tensor::zeros(shape, dtype, *device); }
  std::shared_ptr<Device> device = tested_device(1), meta = make_meta_device();
};

#define EXPECT_SAYS(statement, op, expected, got) \
  EXPECT_THAT(error_of([&] { (void)(statement); }), AllOf(StartsWith("[" op "]"), HasSubstr(expected), HasSubstr(got)))

TEST_F(OpErrors, NameTheOpAndBothShapes) {
  EXPECT_SAYS(ops::add(t({3, 4}), t({3, 5})), "add", "expected", "[3, 4] and [3, 5]");
  EXPECT_SAYS(ops::sum(t({3, 4}), 2), "sum", "[3, 4]", "got 2");
  EXPECT_SAYS(ops::max(t({3, 0}), 1), "max", "at least 1", "[3, 0]");
  EXPECT_SAYS(ops::softmax(t({})), "softmax", "at least one dimension", "[]");
  EXPECT_SAYS(ops::reshape(t({3, 4}), Dims{5, -1}), "reshape", "12 elements", "[5, -1]");
  EXPECT_SAYS(ops::transpose(t({3, 4}), 0, 3), "transpose", "[3, 4]", "3");
  EXPECT_SAYS(ops::slice(t({3, 4}), 1, 2, 3), "slice", "[0, 4)", "[2, 5)");
  EXPECT_SAYS(ops::rms_norm(t({3, 4}), t({5}), 1e-5), "rms_norm", "expected [4]", "got [5]");
  EXPECT_SAYS(ops::layer_norm(t({3, 4}), t({4}), t({3}), 1e-5), "layer_norm", "bias's shape: expected [4]", "got [3]");
  EXPECT_SAYS(ops::layer_norm(t({3, 4}), t({4}), {}, -1), "layer_norm", "epsilon", "-1");
  EXPECT_SAYS(ops::add_rms_norm(t({3, 4}), t({3, 5}), t({4}), 1e-5), "add_rms_norm", "residual's shape: expected [3, 4]", "got [3, 5]");
  EXPECT_SAYS(ops::add_layer_norm(t({3, 4}), t({3, 4}, DType::bf16), t({4}), {}, 1e-5), "add_layer_norm", "residual's element type: expected f32", "got bf16");
  EXPECT_SAYS(ops::cumsum(t({3, 4}), 2), "cumsum", "[3, 4]", "got 2");
  EXPECT_SAYS(ops::swiglu(t({3, 5})), "swiglu", "[T, 2F]", "[3, 5]");
  EXPECT_SAYS(ops::rope(t({3, 2, 6}), t({3, 8})), "rope", "[3, heads, 8]", "[3, 2, 6]");
  EXPECT_SAYS(ops::rope(t({3, 2, 6}), t({4, 6})), "rope", "[4, heads, 6]", "[3, 2, 6]");
  EXPECT_SAYS(ops::rope_table(t({3}, DType::i32), 5, 1e4, DType::f32), "rope_table", "even", "5");
  const Tensor parts[] = {t({2, 3}), t({2, 4})};
  EXPECT_SAYS(ops::concat(parts, 0), "concat", "[2, 3]", "[2, 4]");
  EXPECT_SAYS(ops::concat(std::span<const Tensor>(), 0), "concat", "at least one", "none");
}

TEST_F(OpErrors, NameElementTypesAndDevices) {
  EXPECT_SAYS(ops::add(t({2}), t({2}, DType::f64)), "add", "expected f32", "got f64");
  EXPECT_SAYS(ops::exp(t({2}, DType::i32)), "exp", "f64, f32 or bf16", "i32");
  EXPECT_SAYS(ops::gelu({}), "gelu", "a tensor", "undefined");
  EXPECT_SAYS(ops::mul(t({2}), {}), "mul", "a tensor", "undefined");
  EXPECT_SAYS(ops::add(t({2}), Tensor::empty(Dims{2}, DType::f32, *meta)), "add", device->kind() == DeviceKind::cuda ? "expected cuda" : "expected cpu", "got meta");
  EXPECT_SAYS(ops::rope(t({1, 1, 4}), t({1, 4}, DType::f64)), "rope", "expected f32", "got f64");
  EXPECT_SAYS(ops::cast(make_leaf(t({2}), false), DType::i32), "cast", "floating", "i32");
}

TEST_F(OpErrors, RefuseIdsOutsideTheTable) {
  const Place s{*device, DType::f32};
  const Tensor table = t({5, 2});
  // A GPU's ids are looked at there: what they hold is said when the device is next waited for.
  const bool cpu = device->kind() == DeviceKind::cpu;
  EXPECT_SAYS((ops::embedding(table, s.whole(std::vector<std::int32_t>{1, 5})), device->synchronize()), "embedding",
              cpu ? "ids[1]: expected a row of [0, 5)" : "element 1", cpu ? "got 5" : "is 5, out of range");
  EXPECT_SAYS((ops::gather(table, s.whole(std::vector<std::int32_t>{-1})), device->synchronize()), "gather", cpu ? "ids[0]" : "element 0",
              cpu ? "got -1" : "is -1, out of range");
  EXPECT_SAYS(ops::embedding(table, s.whole(std::vector<std::int64_t>{1})), "embedding", "expected i32", "got i64");
  EXPECT_SAYS(ops::embedding(t({5}), s.whole(std::vector<std::int32_t>{1})), "embedding", "[V, C]", "[5]");
}

TEST_F(OpErrors, RefuseProbabilitiesThatAreNone) {
  const Place s{*device, DType::f32};
  const Tensor ids = s.whole(std::vector<std::int64_t>{0, 1});
  for (double p : {1.0, -0.1, 1.5}) EXPECT_SAYS(ops::dropout(t({2, 3}), p, Rng(1, "d"), ids), "dropout", "[0, 1)", std::to_string(p));
  EXPECT_SAYS(ops::dropout(t({3, 3}), 0.1, Rng(1, "d"), ids), "dropout", "[3]", "[2]");
}

TEST_F(OpErrors, AreProgrammingFaults) {
  try {
    ops::add(t({2}), t({3}));
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), Fault::programming);
  }
}

TEST_F(OpErrors, AFreedGraphSaysSo) {
  const Tensor x = make_leaf(t({3}), false), y = ops::sum_all(ops::exp(x));
  backward(y);
  EXPECT_THAT(error_of([&] { backward(y); }), HasSubstr("freed"));
}

#if !defined(CAPSTAN_TEST_CUDA)  // of the checks, not of a device
// A node whose gradient is 0.01 % off.
class Wrong final : public Node {
 public:
  std::string_view name() const override { return "wrong"; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part) override { return {ops::scale(grads[0].detach(), 3.0003)}; }
};

TEST(Harness, SeesAWrongGradient) {
  const auto times3 = [](bool wrong) {
    return Case{"wrong", {{{3, 5}}}, [wrong](const Place&, std::span<const Tensor> x) {
                  if (!wrong) return ops::scale(x[0], 3);
                  Tensor y = ops::scale(x[0].detach(), 3);
                  record(std::make_shared<Wrong>(), {&x[0]}, {&y});
                  return y;
                }, {}};
  };
  EXPECT_LE(gradient_error(times3(false)), finite_difference_tolerance);
  EXPECT_GT(gradient_error(times3(true)), 10 * finite_difference_tolerance);
}

TEST(Harness, SeesAWrongValueAndAMissingOne) {
  const Tolerance f32 = tolerance_of(DType::f32);
  EXPECT_TRUE(near({1, 2}, {1, 2}, f32));
  EXPECT_FALSE(near({1, 2.0001}, {1, 2}, f32));
  EXPECT_FALSE(near({1}, {1, 2}, f32));
  EXPECT_FALSE(near({1, std::numeric_limits<double>::quiet_NaN()}, {1, 2}, f32));
}

TEST(Harness, SeesAnUnwrittenElement) {
  auto clean = make_cpu_device(1), dirty = make_cpu_device(1);
  poison(*clean, 0x11), poison(*dirty, 0xff);
  EXPECT_FALSE(same_bits(Tensor::empty(Dims{7}, DType::f32, *clean), Tensor::empty(Dims{7}, DType::f32, *dirty)));
}
#endif

}  // namespace
}  // namespace capstan::testing
