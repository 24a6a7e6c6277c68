// The generic suite: what every op must hold, whatever it computes.
#include "core/ops/harness.h"

#include <algorithm>
#include <cmath>

namespace capstan::testing {

namespace {

std::uint64_t mix(std::uint64_t z) { return kernels::mix64(z + 0x9e3779b97f4a7c15ull); }

template <class T>
Tensor of_type(Device& device, const std::vector<double>& values, const Dims& shape) {
  std::vector<T> typed;
  typed.reserve(values.size());
  for (double v : values) {
    if constexpr (std::is_same_v<T, bf16>) typed.push_back(bf16(static_cast<float>(v)));
    else typed.push_back(static_cast<T>(v));
  }
  return Tensor::of(std::span<const T>(typed), shape, device);
}

std::vector<double> rounded(const std::vector<double>& values, DType dtype) {
  std::vector<double> out;
  for (double v : values)
    out.push_back(dtype == DType::f64 ? v : dtype == DType::f32 ? static_cast<double>(static_cast<float>(v)) : static_cast<double>(static_cast<float>(bf16(static_cast<float>(v)))));
  return out;
}

Dims cut(Dims shape, std::int64_t count) {
  shape[0] = count;
  return shape;
}

std::vector<double> cut(const std::vector<double>& values, const Dims& shape, std::int64_t first, std::int64_t count) {
  const std::int64_t row = shape.product() / shape[0];
  return {values.begin() + first * row, values.begin() + (first + count) * row};
}

}  // namespace

std::vector<double> random_values(std::int64_t n, std::uint64_t seed, double low, double high) {
  std::vector<double> out;
  for (std::int64_t i = 0; i < n; ++i)
    out.push_back(low + (high - low) * static_cast<double>(mix(mix(seed) + static_cast<std::uint64_t>(i)) >> 11) * 0x1p-53);
  return out;
}

Values values_of(const Case& c) {
  Values values;
  for (std::size_t i = 0; i < c.inputs.size(); ++i) {
    const Input& in = c.inputs[i];
    values.push_back(random_values(in.shape.product(), in.seed != 0 ? in.seed : i + 1, in.low, in.high));
  }
  return values;
}

Tensor make(Device& device, const std::vector<double>& values, const Dims& shape, DType dtype) {
  if (device.kind() == DeviceKind::meta) return Tensor::empty(shape, dtype, device);
  if (dtype == DType::f64) return of_type<double>(device, values, shape);
  if (dtype == DType::f32) return of_type<float>(device, values, shape);
  return of_type<bf16>(device, values, shape);
}

std::vector<double> doubles(const Tensor& t) {
  const Tensor wide = t.detach().contiguous().to(DType::f64);
  std::vector<double> out(static_cast<std::size_t>(wide.numel()));
  wide.copy_to_host(out.data(), wide.bytes());
  return out;
}

std::vector<unsigned char> bits(const Tensor& t) {
  const Tensor flat = t.detach().contiguous();
  std::vector<unsigned char> out(static_cast<std::size_t>(flat.bytes()));
  flat.copy_to_host(out.data(), flat.bytes());
  return out;
}

#if defined(CAPSTAN_TEST_CUDA)
std::shared_ptr<Device> tested_device(int) {
  static const std::shared_ptr<Device> device = make_cuda_device();  // its start takes longer than most tests
  return device;
}
#else
std::shared_ptr<Device> tested_device(int threads) { return make_cpu_device(threads); }
#endif

void poison(Device& device, unsigned char byte) {
  const std::vector<std::uint8_t> block(8 << 20, byte);
  Tensor::of(std::span<const std::uint8_t>(block), Dims{static_cast<std::int64_t>(block.size())}, device);
}

Result evaluate(const Case& c, const Function& f, Device& device, DType dtype, const Values& values, Options options) {
  const bool part = options.count >= 0;
  std::vector<Tensor> leaves;
  for (std::size_t i = 0; i < c.inputs.size(); ++i) {
    const Input& in = c.inputs[i];
    const bool sliced = part && in.rows;
    const Dims shape = sliced ? cut(in.shape, options.count) : in.shape;
    const Tensor t = make(device, sliced ? cut(values[i], in.shape, options.first, options.count) : values[i], shape, dtype);
    leaves.push_back(options.backward ? make_leaf(t, in.parameter) : t);
  }
  const Place setup{device, dtype, options.first, options.count};
  Result result;
  result.out = f(setup, leaves);
  if (!options.backward) return result;
  // The gradient of row t is the same whether the row comes alone or not.
  const std::int64_t numel = result.out.numel(), rows = result.out.rank() == 0 ? 1 : result.out.size(0);
  const std::int64_t skip = part && rows > 0 ? options.first * (numel / rows) : 0;
  std::vector<double> all = random_values(skip + numel, 99);
  const Tensor gradient = make(device, {all.begin() + skip, all.end()}, result.out.shape(), result.out.dtype());
  const std::vector<unsigned char> before = device.kind() == DeviceKind::meta ? std::vector<unsigned char>() : bits(gradient);
  const Tensor roots[] = {result.out}, gradients[] = {gradient};
  if (options.in_two_parts) backward(roots, gradients, Part::input).run();
  else backward(roots, gradients);
  if (device.kind() != DeviceKind::meta && before != bits(gradient)) throw std::logic_error("a backward wrote to the gradient it was given");
  for (const Tensor& t : leaves) result.grads.push_back(static_cast<Leaf*>(t.node().get())->grad());
  result.out = result.out.detach();
  return result;
}

double gradient_error(const Case& c) {
  auto device = make_cpu_device(1);
  Values values = values_of(c);
  const Result analytic = evaluate(c, c.op, *device, DType::f64, values);
  const std::vector<double> weights = random_values(analytic.out.numel(), 99);
  const auto loss = [&] {
    const std::vector<double> y = doubles(evaluate(c, c.op, *device, DType::f64, values, {.backward = false}).out);
    double sum = 0;
    for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * weights[i];
    return sum;
  };
  double worst = 0;
  for (std::size_t i = 0; i < c.inputs.size(); ++i) {
    const std::vector<double> got = doubles(analytic.grads[i]);
    if (got.size() != values[i].size()) return 1e300;
    const std::size_t size = values[i].size(), step = size / (size > 2000 ? 12 : 48) + 1;  // a sample of larger inputs
    for (std::size_t k = 0; k < got.size(); k += step) {
      const double x = values[i][k], h = 1e-3;
      const auto at = [&](double move) {
        values[i][k] = x + move;
        return loss();
      };
      const double numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
      values[i][k] = x;
      const double error = std::abs(numeric - got[k]) / (1 + std::abs(got[k]));
      if (!(error <= worst)) worst = error;
    }
  }
  return worst;
}

::testing::AssertionResult near(const std::vector<double>& got, const std::vector<double>& want, Tolerance tolerance) {
  if (got.size() != want.size()) return ::testing::AssertionFailure() << got.size() << " elements, expected " << want.size();
  double top = 0;
  for (double w : want) top = std::max(top, std::abs(w));
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - want[i]), bound = tolerance.relative * std::abs(want[i]) + tolerance.scale * top;
    if (!(error <= bound))
      return ::testing::AssertionFailure() << "element " << i << ": got " << got[i] << ", expected " << want[i] << ", error " << error << " over " << bound;
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult near(const Tensor& got, const Tensor& want, DType dtype) {
  if (!(got.shape() == want.shape())) return ::testing::AssertionFailure() << "shape " << to_string(got.shape()) << ", expected " << to_string(want.shape());
  return near(doubles(got), doubles(want), tolerance_of(dtype));
}

::testing::AssertionResult same_bits(const Tensor& a, const Tensor& b) {
  if (!(a.shape() == b.shape())) return ::testing::AssertionFailure() << "shapes " << to_string(a.shape()) << " and " << to_string(b.shape());
  if (a.dtype() != b.dtype()) return ::testing::AssertionFailure() << "types " << name_of(a.dtype()) << " and " << name_of(b.dtype());
  if (bits(a) == bits(b)) return ::testing::AssertionSuccess();
  const std::vector<double> x = doubles(a), y = doubles(b);
  for (std::size_t i = 0; i < x.size(); ++i)
    if (std::memcmp(&x[i], &y[i], 8) != 0) return ::testing::AssertionFailure() << "element " << i << ": " << x[i] << " and " << y[i];
  return ::testing::AssertionFailure() << "bits differ";
}

::testing::AssertionResult same_bits_on_the_cpu(const Tensor& a, const Tensor& b, DType dtype) {
  return a.device().kind() == DeviceKind::cpu ? same_bits(a, b) : near(a, b, dtype);
}

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::exception& e) {  // an Error, or what a GPU found when it was waited for
    return e.what();
  }
  return "";
}

namespace {

constexpr DType all_types[] = {DType::f64, DType::f32, DType::bf16};

void gradient_is_the_derivative(const Case& c) { EXPECT_LE(gradient_error(c), finite_difference_tolerance); }

void narrow_types_agree_with_f64(const Case& c) {
  auto device = make_cpu_device(2);
  for (DType dtype : {DType::f32, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    Values values = values_of(c);
    for (auto& v : values) v = rounded(v, dtype);
    const Result got = evaluate(c, c.op, *device, dtype, values);
    // The reference starts from the same rounded gradient.
    std::vector<Tensor> leaves;
    for (std::size_t i = 0; i < c.inputs.size(); ++i)
      leaves.push_back(make_leaf(make(*device, values[i], c.inputs[i].shape, DType::f64), c.inputs[i].parameter));
    const Tensor out = c.op(Place{*device, DType::f64}, leaves);
    EXPECT_TRUE(near(got.out, out.detach(), got.out.dtype()));
    const Tensor roots[] = {out};
    const Tensor gradients[] = {make(*device, rounded(random_values(out.numel(), 99), got.out.dtype()), out.shape(), out.dtype())};
    backward(roots, gradients);
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      EXPECT_TRUE(near(got.grads[i], static_cast<Leaf*>(leaves[i].node().get())->grad(), dtype)) << "gradient of input " << i;
    }
  }
}

void equals_its_plain_composition(const Case& c) {
  if (!c.plain) return;
  auto device = make_cpu_device(1);
  // In f64: narrow types are compared with it elsewhere.
  const Result fused = evaluate(c, c.op, *device, DType::f64, values_of(c)), plain = evaluate(c, c.plain, *device, DType::f64, values_of(c));
  EXPECT_TRUE(near(fused.out, plain.out, DType::f64));
  for (std::size_t i = 0; i < c.inputs.size(); ++i) EXPECT_TRUE(near(fused.grads[i], plain.grads[i], DType::f64)) << "gradient of input " << i;
}

void threads_do_not_change_bits(const Case& c) {
  const std::shared_ptr<Device> devices[] = {make_cpu_device(1), make_cpu_device(2), make_cpu_device(3)};
  for (DType dtype : all_types) {
    SCOPED_TRACE(name_of(dtype));
    const Result one = evaluate(c, c.op, *devices[0], dtype, values_of(c));
    for (int threads : {2, 3}) {
      const Result more = evaluate(c, c.op, *devices[threads - 1], dtype, values_of(c));
      EXPECT_TRUE(same_bits(one.out, more.out)) << threads << " threads";
      for (std::size_t i = 0; i < c.inputs.size(); ++i) EXPECT_TRUE(same_bits(one.grads[i], more.grads[i])) << threads << " threads, input " << i;
    }
  }
}

void a_row_does_not_depend_on_its_batch(const Case& c) {
  if (!c.by_rows) return;
  auto device = make_cpu_device(2);
  const std::int64_t rows = c.inputs[0].shape[0];
  for (DType dtype : all_types) {
    SCOPED_TRACE(name_of(dtype));
    const Values values = values_of(c);
    const Result all = evaluate(c, c.op, *device, dtype, values);
    std::vector<std::pair<std::int64_t, std::int64_t>> cuts = {{0, 1}, {rows - 1, 1}, {rows / 2, 1}, {rows / 3, rows - rows / 3}};
    for (auto [first, count] : cuts) {
      const Result some = evaluate(c, c.op, *device, dtype, values, {.first = first, .count = count});
      EXPECT_TRUE(same_bits(some.out, all.out.narrow(0, first, count).contiguous())) << "rows " << first << " + " << count;
      for (std::size_t i = 0; i < c.inputs.size(); ++i)
        if (c.inputs[i].rows && c.gradient_by_rows) {
          EXPECT_TRUE(same_bits(some.grads[i], all.grads[i].narrow(0, first, count).contiguous())) << "rows " << first << " + " << count << ", input " << i;
        }
    }
  }
}

void every_element_is_written(const Case& c) {
  auto clean = make_cpu_device(2), dirty = make_cpu_device(2);
  for (DType dtype : all_types) {
    poison(*clean, 0x11), poison(*dirty, 0xff);  // 0xff..: NaN in every type
    const Result a = evaluate(c, c.op, *clean, dtype, values_of(c)), b = evaluate(c, c.op, *dirty, dtype, values_of(c));
    EXPECT_TRUE(same_bits(a.out, b.out));
    for (std::size_t i = 0; i < c.inputs.size(); ++i) EXPECT_TRUE(same_bits(a.grads[i], b.grads[i])) << "input " << i;
  }
}

void meta_gives_the_same_shapes_and_costs(const Case& c) {
  auto real = make_cpu_device(1), meta = make_meta_device();
  real->record(true), meta->record(true);
  for (DType dtype : all_types) {
    real->clear_ledger(), meta->clear_ledger();
    const Result a = evaluate(c, c.op, *real, dtype, values_of(c)), b = evaluate(c, c.op, *meta, dtype, values_of(c));
    EXPECT_TRUE(b.out.is_meta());
    EXPECT_EQ(to_string(a.out.shape()), to_string(b.out.shape()));
    EXPECT_EQ(a.out.dtype(), b.out.dtype());
    for (std::size_t i = 0; i < c.inputs.size(); ++i) {
      ASSERT_TRUE(b.grads[i].defined()) << "input " << i;
      EXPECT_EQ(to_string(b.grads[i].shape()), to_string(c.inputs[i].shape));
      EXPECT_EQ(to_string(b.grads[i].shape()), to_string(a.grads[i].shape()));
      EXPECT_EQ(b.grads[i].dtype(), a.grads[i].dtype());
    }
    ASSERT_EQ(real->ledger().size(), meta->ledger().size());
    for (std::size_t i = 0; i < real->ledger().size(); ++i) {
      const OpRecord &x = real->ledger()[i], &y = meta->ledger()[i];
      EXPECT_EQ(x.name, y.name);
      EXPECT_EQ(x.calls, y.calls) << x.name;
      EXPECT_EQ(x.cost.flop, y.cost.flop) << x.name;
      EXPECT_EQ(x.cost.read, y.cost.read) << x.name;
      EXPECT_EQ(x.cost.write, y.cost.write) << x.name;
    }
  }
}

void input_and_weight_parts_make_the_whole(const Case& c) {
  auto device = make_cpu_device(1);
  const Result whole = evaluate(c, c.op, *device, DType::f32, values_of(c));
  const Result parts = evaluate(c, c.op, *device, DType::f32, values_of(c), {.in_two_parts = true});
  for (std::size_t i = 0; i < c.inputs.size(); ++i) EXPECT_TRUE(same_bits(whole.grads[i], parts.grads[i])) << "input " << i;
}

void nothing_stays_allocated(const Case& c) {
  auto device = make_cpu_device(1);
  { evaluate(c, c.op, *device, DType::f32, values_of(c)); }
  EXPECT_EQ(device->bytes_held(), 0);
}

#define CHECK(name)     \
  {                     \
    SCOPED_TRACE(#name); \
    name(GetParam());   \
  }
#if defined(CAPSTAN_TEST_CUDA)
Device& gpu() { return *tested_device(); }

/// Against the op in f64 on the CPU, from the same inputs rounded to the type: within the CPU's own tolerance, or (sums in another
/// order) by FlashAttention's rule: at most twice as far from it as a plain implementation in that type is.
::testing::AssertionResult near_enough(const Tensor& got, const Tensor& want, const Tensor& peer, DType dtype) {
  const ::testing::AssertionResult result = near(got, want, dtype);
  if (result || dtype == DType::f64) return result;
  const std::vector<double> g = doubles(got), w = doubles(want), p = doubles(peer);
  double mine = 0, other = 0, top = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    if (std::isnan(g[i]) != std::isnan(w[i])) return result;
    mine = std::max(mine, std::abs(g[i] - w[i])), other = std::max(other, std::abs(p[i] - w[i])), top = std::max(top, std::abs(w[i]));
  }
  if (mine <= 2 * other) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << result.message() << "; largest error " << mine << " against " << other << " of the plain one";
}

void the_gpu_agrees_with_f64(const Case& c) {
  auto cpu = make_cpu_device(2);
  for (DType dtype : all_types) {
    SCOPED_TRACE(name_of(dtype));
    Values values = values_of(c);
    for (auto& v : values) v = rounded(v, dtype);
    poison(gpu(), 0xff);  // NaN in every type
    const Result got = evaluate(c, c.op, gpu(), dtype, values), types = evaluate(c, c.op, *cpu, dtype, values);
    const Result plain = c.plain ? evaluate(c, c.plain, *cpu, dtype, values) : types;
    std::vector<Tensor> leaves;
    for (std::size_t i = 0; i < c.inputs.size(); ++i)
      leaves.push_back(make_leaf(make(*cpu, values[i], c.inputs[i].shape, DType::f64), c.inputs[i].parameter));
    const Tensor out = c.op(Place{*cpu, DType::f64}, leaves);
    ASSERT_EQ(to_string(got.out.shape()), to_string(out.shape()));
    EXPECT_EQ(got.out.dtype(), types.out.dtype());
    EXPECT_TRUE(near_enough(got.out, out.detach(), plain.out, got.out.dtype()));
    const Tensor roots[] = {out};
    const Tensor gradients[] = {make(*cpu, rounded(random_values(out.numel(), 99), got.out.dtype()), out.shape(), out.dtype())};
    backward(roots, gradients);
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      EXPECT_EQ(got.grads[i].dtype(), types.grads[i].dtype());
      EXPECT_TRUE(near_enough(got.grads[i], static_cast<Leaf*>(leaves[i].node().get())->grad(), plain.grads[i], dtype)) << "gradient of input " << i;
    }
  }
}

void runs_on_the_gpu_give_the_same_bits(const Case& c) {
  for (DType dtype : all_types) {
    SCOPED_TRACE(name_of(dtype));
    poison(gpu(), 0x11);
    const Result a = evaluate(c, c.op, gpu(), dtype, values_of(c));
    const std::vector<unsigned char> out = bits(a.out);
    poison(gpu(), 0xff);
    const Result b = evaluate(c, c.op, gpu(), dtype, values_of(c));
    EXPECT_EQ(out, bits(b.out));
    for (std::size_t i = 0; i < c.inputs.size(); ++i) EXPECT_TRUE(same_bits(a.grads[i], b.grads[i])) << "input " << i;
  }
}

void parts_make_the_whole_on_the_gpu(const Case& c) {
  const Result whole = evaluate(c, c.op, gpu(), DType::f32, values_of(c));
  const Result parts = evaluate(c, c.op, gpu(), DType::f32, values_of(c), {.in_two_parts = true});
  for (std::size_t i = 0; i < c.inputs.size(); ++i) EXPECT_TRUE(same_bits(whole.grads[i], parts.grads[i])) << "input " << i;
}

void nothing_stays_allocated_on_the_gpu(const Case& c) {
  const std::int64_t before = gpu().bytes_held();
  { evaluate(c, c.op, gpu(), DType::f32, values_of(c)); }
  EXPECT_EQ(gpu().bytes_held(), before);
}

TEST_P(OpTest, HoldsTheContract) {
  CHECK(the_gpu_agrees_with_f64)
  CHECK(runs_on_the_gpu_give_the_same_bits)
  CHECK(parts_make_the_whole_on_the_gpu)
  CHECK(nothing_stays_allocated_on_the_gpu)
}
#else
// One test a case: the programs that run tests start a process for each.
TEST_P(OpTest, HoldsTheContract) {
  CHECK(gradient_is_the_derivative)
  CHECK(narrow_types_agree_with_f64)
  CHECK(equals_its_plain_composition)
  CHECK(threads_do_not_change_bits)
  CHECK(a_row_does_not_depend_on_its_batch)
  CHECK(every_element_is_written)
  CHECK(meta_gives_the_same_shapes_and_costs)
  CHECK(input_and_weight_parts_make_the_whole)
  CHECK(nothing_stays_allocated)
}
#endif
#undef CHECK

}  // namespace
}  // namespace capstan::testing
