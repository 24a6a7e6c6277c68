// Tensors as values: views over one storage, copies and casts, what the devices count.
#include <capstan/tensor.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace capstan {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string error_of(Fault fault, const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& e) {
    EXPECT_EQ(static_cast<int>(e.fault()), static_cast<int>(fault)) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no Error";
  return "";
}

class Tensors : public ::testing::Test {
 protected:
  Tensor counting(const Dims& shape) {
    std::vector<float> values(static_cast<std::size_t>(shape.product()));
    std::iota(values.begin(), values.end(), 0.f);
    return Tensor::of<float>(values, shape, *device);
  }
  static std::vector<float> values(const Tensor& t) {
    const Tensor c = t.to(DType::f32).contiguous();
    std::vector<float> all(static_cast<std::size_t>(c.numel()));
    c.copy_to_host(all.data(), c.bytes());
    return all;
  }
  std::shared_ptr<Device> device = make_cpu_device(2);
};

TEST_F(Tensors, ViewsShareTheirStorage) {
  const Tensor t = counting({2, 3, 4});
  const Tensor v = t.view({6, -1});
  EXPECT_EQ(v.shape(), (Dims{6, 4}));
  const Tensor n = v.narrow(0, 2, 3).narrow(-1, 1, 2);
  EXPECT_THAT(values(n), ElementsAre(9, 10, 13, 14, 17, 18));
  EXPECT_FALSE(n.is_contiguous());
  n.fill(-1);
  EXPECT_THAT(values(t.narrow(0, 0, 1)), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, 11));
  EXPECT_EQ(t.storage(), n.storage());
  EXPECT_EQ(counting({1, 3}).view({3, 1}).shape(), (Dims{3, 1}));
  EXPECT_EQ(counting({0, 3}).view({-1, 3}).shape(), (Dims{0, 3}));
  EXPECT_TRUE(t.narrow(0, 1, 1).is_contiguous());
}

TEST_F(Tensors, TransposedViewsCopyInTheirOrder) {
  const Tensor t = counting({2, 3}).transposed(0, -1);
  EXPECT_EQ(t.shape(), (Dims{3, 2}));
  EXPECT_FALSE(t.is_contiguous());
  EXPECT_THAT(values(t), ElementsAre(0, 3, 1, 4, 2, 5));
  const Tensor target = Tensor::zeros({2, 3}, DType::f32, *device);
  target.transposed(0, 1).copy_from(t);
  EXPECT_THAT(values(target), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(values(counting({2, 2, 3}).transposed(0, 2).narrow(0, 1, 1)), ElementsAre(1, 7, 4, 10));
}

// Sizes around every turn in the copy: small and large, rows of 4096, of 64 and of neither.
TEST_F(Tensors, CopiesAndCastsOfEverySize) {
  for (const std::int64_t n : {1, 63, 64, 4096, 70'000, 64 * 1100, 4096 * 70, 300'001}) {
    const Tensor t = counting({n});
    const Tensor d = t.to(DType::f64), back = d.to(DType::f32), clone = t.clone();
    for (std::int64_t i = 0; i < n; i += std::max<std::int64_t>(1, n / 97)) {
      ASSERT_EQ(d.data<double>()[i], static_cast<double>(i));
      ASSERT_EQ(back.data<float>()[i], static_cast<float>(i));
      ASSERT_EQ(clone.data<float>()[i], static_cast<float>(i));
    }
    ASSERT_EQ(clone.data<float>()[n - 1], static_cast<float>(n - 1));
    ASSERT_EQ(d.data<double>()[n - 1], static_cast<double>(n - 1));
  }
}

// bf16 rounds to the nearest, ties to even; NaN and infinities stay what they are.
TEST_F(Tensors, Bf16Rounds) {
  const std::vector<float> in{1.f, 1.00390625f, 1.01171875f, 3.4e38f, std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()};
  const std::vector<float> out = values(Tensor::of<float>(in, {6}, *device).to(DType::bf16));
  EXPECT_EQ(out[0], 1.f);
  EXPECT_EQ(out[1], 1.f);          // halfway between 1 and 1.0078125
  EXPECT_EQ(out[2], 1.015625f);    // halfway between 1.0078125 and 1.015625
  EXPECT_TRUE(std::isinf(out[3]));
  EXPECT_TRUE(std::isnan(out[4]));
  EXPECT_EQ(out[5], -std::numeric_limits<float>::infinity());
}

TEST_F(Tensors, IntegersAndEmptyOnes) {
  const std::vector<std::int32_t> ids{-1, 7, 2'000'000'000};
  const Tensor t = Tensor::of<std::int32_t>(ids, {3}, *device).to(DType::i64);
  EXPECT_EQ(t.data<std::int64_t>()[0], -1);
  EXPECT_EQ(t.data<std::int64_t>()[2], 2'000'000'000);
  const Tensor none = Tensor::zeros({0, 5}, DType::f32, *device);
  EXPECT_EQ(none.numel(), 0);
  none.fill(1);
  EXPECT_EQ(none.clone().shape(), (Dims{0, 5}));
  EXPECT_FALSE(Tensor().defined());
  EXPECT_EQ(Tensor().numel(), 0);
  EXPECT_EQ(Tensor::full({}, 2.5, DType::f32, *device).item(), 2.5);
}

TEST_F(Tensors, MisuseIsAnErrorThatSaysHow) {
  const Tensor t = counting({2, 3});
  const auto f = Fault::programming;
  EXPECT_THAT(error_of(f, [&] { t.view({4, 2}); }), AllOf(HasSubstr("[2, 3]"), HasSubstr("[4, 2]")));
  EXPECT_THAT(error_of(f, [&] { t.transposed(0, 1).view({6}); }), HasSubstr("strided"));
  EXPECT_THAT(error_of(f, [&] { t.narrow(1, 2, 2); }), AllOf(HasSubstr("[2, 4)"), HasSubstr("[2, 3]")));
  EXPECT_THAT(error_of(f, [&] { t.narrow(2, 0, 1); }), HasSubstr("dimension 2"));
  EXPECT_THAT(error_of(f, [&] { t.transposed(0, 3); }), HasSubstr("0, 3"));
  EXPECT_THAT(error_of(f, [&] { t.data<double>(); }), AllOf(HasSubstr("expected f64"), HasSubstr("got f32")));
  EXPECT_THAT(error_of(f, [&] { t.size(2); }), HasSubstr("[2, 3]"));
  EXPECT_THAT(error_of(f, [&] { t.item(); }), HasSubstr("one element"));
  EXPECT_THAT(error_of(f, [&] { t.copy_from(counting({3, 2})); }), AllOf(HasSubstr("expected [2, 3]"), HasSubstr("got [3, 2]")));
  EXPECT_THAT(error_of(f, [&] { t.copy_from_host("", 1); }), HasSubstr("24 contiguous bytes"));
  EXPECT_THAT(error_of(f, [] { Tensor().device(); }), HasSubstr("undefined"));
  EXPECT_THAT(error_of(f, [&] { Tensor::empty({2, -3}, DType::f32, *device); }), HasSubstr("[2, -3]"));
  EXPECT_THAT(error_of(f, [] { Dims{1, 1, 1, 1, 1, 1, 1}; }), HasSubstr("more than 6"));
}

TEST_F(Tensors, WrapKeepsItsKeeper) {
  auto keeper = std::make_shared<std::vector<float>>(std::vector<float>{1, 2, 3, 4});
  std::weak_ptr<std::vector<float>> watch = keeper;
  {
    const Tensor t = Tensor::wrap(keeper->data(), {2, 2}, DType::f32, *device, keeper);
    keeper.reset();
    const Tensor row = t.narrow(0, 1, 1);
    EXPECT_THAT(values(row), ElementsAre(3, 4));
    EXPECT_EQ(device->bytes_held(), 0);
    EXPECT_FALSE(watch.expired());
  }
  EXPECT_TRUE(watch.expired());
}

TEST_F(Tensors, DevicesCountWhatTheyHandOut) {
  for (const auto& d : {make_cpu_device(1), make_meta_device()}) {
    EXPECT_EQ(d->bytes_held(), 0);
    {
      const Tensor a = Tensor::zeros({100}, DType::f32, *d);  // 400 bytes: seven lines of 64
      EXPECT_EQ(d->bytes_held(), 448);
      const Tensor view = a.narrow(0, 0, 50), same = a;
      EXPECT_EQ(d->bytes_held(), 448);
      {
        const Tensor b = Tensor::empty({1000}, DType::f64, *d);
        EXPECT_EQ(d->bytes_held(), 448 + 8000);
      }
      EXPECT_EQ(d->bytes_held(), 448);
      EXPECT_EQ(d->bytes_peak(), 448 + 8000);
      d->reset_peak();
      EXPECT_EQ(d->bytes_peak(), 448);
    }
    EXPECT_EQ(d->bytes_held(), 0);
  }
}

TEST_F(Tensors, ThePoolGivesMemoryAgainWithoutAskingForMore) {
  std::vector<Tensor> held;
  for (int i = 0; i < 64; ++i) held.push_back(Tensor::empty({(i % 7 + 1) * 10'000}, DType::f32, *device));
  const std::int64_t reserved = device->bytes_reserved();
  EXPECT_GE(reserved, device->bytes_held());
  for (int round = 0; round < 20; ++round) {
    for (std::size_t i = round % 2; i < held.size(); i += 2) held[i] = Tensor();
    for (std::size_t i = round % 2; i < held.size(); i += 2) held[i] = Tensor::empty({static_cast<std::int64_t>(i % 7 + 1) * 10'000}, DType::f32, *device);
  }
  EXPECT_EQ(device->bytes_reserved(), reserved);
  // All of it together again: freed neighbors have joined.
  held.clear();
  EXPECT_EQ(device->bytes_held(), 0);
  const Tensor whole = Tensor::empty({reserved / 4}, DType::f32, *device);
  EXPECT_EQ(device->bytes_reserved(), reserved);
}

TEST_F(Tensors, LiveTensorsDoNotOverlap) {
  std::vector<Tensor> held;
  for (int i = 0; i < 200; ++i) {
    const Tensor t = Tensor::full({i * 37 % 1001 + 1}, i, DType::f32, *device);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.raw()) % 64, 0u);
    if (i % 3 != 0) held.push_back(t);
  }
  std::size_t k = 0;
  for (int i = 0; i < 200; ++i) {
    if (i % 3 == 0) continue;
    for (const float x : values(held[k])) ASSERT_EQ(x, static_cast<float>(i));
    ++k;
  }
}

TEST_F(Tensors, OutOfMemorySaysWhatWasAskedAndHeld) {
  const Tensor held = Tensor::zeros({1000}, DType::f32, *device);
  const std::string text = error_of(Fault::runtime, [&] { Tensor::empty({std::int64_t{1} << 50}, DType::f32, *device); });
  EXPECT_THAT(text, AllOf(HasSubstr("cannot allocate 4503599627370496 bytes"), HasSubstr("4032 bytes are held"), HasSubstr("data.micro_batch"),
                          HasSubstr("train.recompute=block")));
  EXPECT_EQ(device->bytes_held(), 4032);
  EXPECT_EQ(Tensor::zeros({10}, DType::f32, *device).numel(), 10);  // and life goes on
}

TEST_F(Tensors, MetaTensorsHaveShapesAndNoMemory) {
  const auto meta = make_meta_device();
  const Tensor t = Tensor::full({1 << 20, 1 << 20}, 1, DType::f32, *meta);
  EXPECT_TRUE(t.is_meta());
  EXPECT_EQ(t.raw(), nullptr);
  EXPECT_EQ(meta->bytes_held(), std::int64_t{1} << 42);
  EXPECT_EQ(t.narrow(0, 1, 2).transposed(0, 1).clone().shape(), (Dims{1 << 20, 2}));
  EXPECT_THAT(error_of(Fault::programming, [&] { t.narrow(0, 0, 1).narrow(1, 0, 1).item(); }), HasSubstr("[1, 1]"));
  EXPECT_THAT(error_of(Fault::programming, [&] { meta->cpu(); }), HasSubstr("meta"));
}

TEST_F(Tensors, TheLedgerAddsUpOpsByName) {
  device->record(true, true);
  for (int i = 0; i < 3; ++i) OpScope scope(*device, "one", {10, 20, 30, 0});
  { OpScope scope(*device, "two", {1, 2, 3, 4}); }
  device->record(false);
  { OpScope scope(*device, "two", {1, 2, 3, 4}); }
  ASSERT_EQ(device->ledger().size(), 2u);
  EXPECT_EQ(device->ledger()[0].calls, 3);
  EXPECT_EQ(device->ledger()[0].cost.write, 90);
  EXPECT_EQ(device->total_cost().flop, 31);
  EXPECT_EQ(device->total_cost().comm, 4);
  device->clear_ledger();
  EXPECT_TRUE(device->ledger().empty());
}

TEST(Tensor, SizesWhoseBytesDoNotFitANumberAreRefused) {
  const std::shared_ptr<Device> meta = make_meta_device();
  const std::string text = error_of(Fault::input, [&] { Tensor::empty({std::int64_t{1} << 40, std::int64_t{1} << 40}, DType::f32, *meta); });
  EXPECT_THAT(text, AllOf(HasSubstr("[1099511627776, 1099511627776]"), HasSubstr("has more than 36028797018963968 bytes")));
  EXPECT_EQ(Tensor::empty({std::int64_t{1} << 40, 0, std::int64_t{1} << 40}, DType::f32, *meta).bytes(), 0);
  EXPECT_EQ(Tensor::empty({std::int64_t{1} << 53}, DType::f32, *meta).bytes(), std::int64_t{1} << 55);
}

}  // namespace
}  // namespace capstan
