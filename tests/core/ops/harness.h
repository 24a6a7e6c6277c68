// defines: Case, what is said about an op; the generic suite OpTest checks every Case (see harness.cpp).
#pragma once
#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <support/tolerance.h>

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <vector>

namespace capstan::testing {

using bounds::Tolerance, bounds::tolerance_of, bounds::finite_difference_tolerance;

/// A differentiable input: uniform in [low, high), addressed by seed.
struct Input {
  Dims shape;
  double low = -1, high = 1;
  bool rows = true;         ///< dimension 0 runs over the batch's rows
  bool parameter = false;   ///< the leaf is a parameter's
  std::uint64_t seed = 0;   ///< 0: its place among the inputs
};

/// Where and on which rows an op runs; makes its integer inputs.
struct Place {
  Device& device;
  DType dtype;
  std::int64_t first = 0, count = -1;  ///< rows taken; -1: all
  template <class T> Tensor whole(const std::vector<T>& values) const {
    return Tensor::of(std::span<const T>(values), Dims{static_cast<std::int64_t>(values.size())}, device);
  }
  template <class T> Tensor rows(const std::vector<T>& values) const {
    const std::int64_t n = count < 0 ? static_cast<std::int64_t>(values.size()) : count;
    return Tensor::of(std::span<const T>(values).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)), Dims{n}, device);
  }
};

using Function = std::function<Tensor(const Place&, std::span<const Tensor>)>;

struct Case {
  std::string name;
  std::vector<Input> inputs;
  Function op;
  Function plain;        ///< the composition that specifies it; may be empty
  bool by_rows = false;  ///< output row t depends on row t of the inputs alone
  bool gradient_by_rows = true;  ///< and so does the gradient, to the bit
};
inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

struct Result {
  Tensor out;
  std::vector<Tensor> grads;  ///< of the inputs
};

using Values = std::vector<std::vector<double>>;
Values values_of(const Case& c);

struct Options {
  std::int64_t first = 0, count = -1;
  bool backward = true, in_two_parts = false;
};

/// Runs `f` on the inputs rounded to `dtype`, then its backward from a fixed gradient.
Result evaluate(const Case& c, const Function& f, Device& device, DType dtype, const Values& values, Options options = {});

/// Largest |numeric - analytic| / (1 + |analytic|) over (a sample of) all inputs' elements, in f64.
double gradient_error(const Case& c);

std::vector<double> doubles(const Tensor& t);
std::vector<unsigned char> bits(const Tensor& t);
/// Tensor of `values` rounded to dtype; shapes only on the meta device.
Tensor make(Device& device, const std::vector<double>& values, const Dims& shape, DType dtype);
/// `n` numbers, uniform in [low, high).
std::vector<double> random_values(std::int64_t n, std::uint64_t seed, double low = -1, double high = 1);
/// What a test of ops runs on: the CPU, in the program of GPU tests a GPU (one for all of them).
std::shared_ptr<Device> tested_device(int threads = 2);
/// Fills what the device's pool will hand out next with the byte.
void poison(Device& device, unsigned char byte);

::testing::AssertionResult near(const std::vector<double>& got, const std::vector<double>& want, Tolerance tolerance);
::testing::AssertionResult near(const Tensor& got, const Tensor& want, DType dtype);
::testing::AssertionResult same_bits(const Tensor& a, const Tensor& b);
/// Of two forms of one result that share every bit on the CPU; on a GPU, whose fused forms sum or round elsewhere, they are near.
::testing::AssertionResult same_bits_on_the_cpu(const Tensor& a, const Tensor& b, DType dtype);

/// The text of what f throws; "" when it throws nothing.
std::string error_of(const std::function<void()>& f);

class OpTest : public ::testing::TestWithParam<Case> {};
inline std::string case_name(const ::testing::TestParamInfo<Case>& info) { return info.param.name; }

/// Registers cases with the generic suite.
#define CAPSTAN_OP_CASES(family, cases) \
  INSTANTIATE_TEST_SUITE_P(family, OpTest, ::testing::ValuesIn(cases), case_name)

}  // namespace capstan::testing
