// nn::Linear in fp8 and mxfp8: values and gradients against f64 on the dequantized operands, what depends on nothing, what
// is cached.
#include "core/ops/fp8_check.h"

#include <gmock/gmock.h>

namespace capstan::testing {
namespace {

using Kind = LinearPrecision::Kind;

TEST(LinearFp8, IsThePlainProductOfTheDequantizedOperands) {
  auto device = make_cpu_device(2);
  for (const Kind kind : {Kind::fp8, Kind::mxfp8})
    for (const Fp8Linear& c : fp8_linears(kind)) expect_linear(run_linear(*device, c), c);
}

TEST(LinearFp8, IsNotThatOfTheOperandsThemselves) {  // the test above would see a layer that rounds nothing
  auto device = make_cpu_device(1);
  Fp8Linear c{37, 64, 96, DType::f32, {Kind::compute, DType::f8e5m2}};
  const LinearResult plain = run_linear(*device, c);
  c.precision.kind = Kind::mxfp8;
  const LinearResult rounded = run_linear(*device, c);
  EXPECT_FALSE(near(rounded.y, plain.y, DType::f32));
  EXPECT_FALSE(near(rounded.dx, plain.dx, DType::f32));
  EXPECT_FALSE(near(rounded.dw, plain.dw, DType::f32));
  EXPECT_TRUE(near(doubles(rounded.y), doubles(plain.y), {0.1, 0.1}));
}

TEST(LinearFp8, IsFollowedByGelu) {
  auto device = make_cpu_device(2);
  for (const Kind kind : {Kind::fp8, Kind::mxfp8})
    for (const Fp8Linear& c : fp8_linears(kind)) expect_gelu(*device, c);
}

TEST(LinearFp8, GivesTheSameBitsInTwoPartsAndOnAnyThreads) {
  auto one = make_cpu_device(1), three = make_cpu_device(3);
  for (const Kind kind : {Kind::fp8, Kind::mxfp8}) {
    const Fp8Linear c{130, 64, 96, DType::bf16, {kind, DType::f8e5m2}};
    const LinearResult a = run_linear(*one, c), b = run_linear(*three, c), parts = run_linear(*one, c, true);
    for (const LinearResult* other : {&b, &parts})
      for (const auto part : {&LinearResult::y, &LinearResult::dx, &LinearResult::dw, &LinearResult::db})
        EXPECT_TRUE(same_bits(a.*part, other->*part));
  }
}

TEST(LinearFp8, ShowsInfinitiesAndNaNs) {  // saturating would hide them from the check of the gradient
  auto device = make_cpu_device(1);
  for (const Kind kind : {Kind::fp8, Kind::mxfp8})
    for (const double special : {static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
      nn::Linear layer("layer", {Segment{"wide", 32}}, {Segment{"hidden", 64}}, false, 0.02);
      layer.weight().place(make(*device, random_values(32 * 64, 1), Dims{32, 64}, DType::f32));
      std::vector<double> values = random_values(40 * 64, 2);
      values[100] = special;
      Batch batch;
      ForwardContext context(batch, *device, DType::f32);
      context.linear.kind = kind;
      const std::vector<double> y = doubles(layer(context, make(*device, values, Dims{40, 64}, DType::f32)));
      EXPECT_TRUE(std::all_of(y.begin() + 32, y.begin() + 64, [](double v) { return std::isnan(v); }))
          << "the row that holds it";
    }
}

TEST(LinearFp8, RowsInBlocksDoNotDependOnTheirBatchAndThoseOfATensorDo) {
  auto device = make_cpu_device(2);
  for (const Kind kind : {Kind::fp8, Kind::mxfp8}) {
    nn::Linear layer("layer", {Segment{"wide", 96}}, {Segment{"hidden", 64}}, true, 0.02);
    layer.parameters()[0]->place(make(*device, uneven(96, 64, 1, DType::bf16), Dims{96, 64}, DType::bf16));
    layer.parameters()[1]->place(make(*device, random_values(96, 2), Dims{96}, DType::bf16));
    std::vector<double> values = uneven(53, 64, 3, DType::bf16);
    for (std::size_t i = 7 * 64; i < 8 * 64; ++i)
      values[i] *= 0x1p18;  // a row so large that others fall below e4m3's normal numbers
    const Tensor x = make(*device, values, Dims{53, 64}, DType::bf16);
    Batch batch;
    ForwardContext context(batch, *device, DType::bf16);
    context.linear.kind = kind;
    const Tensor all = layer(context, x);
    int differ = 0;
    for (std::int64_t row = 0; row < 53; ++row)
      differ += same_bits(layer(context, x.narrow(0, row, 1)), all.narrow(0, row, 1)) ? 0 : 1;
    if (kind == Kind::mxfp8) {
      EXPECT_EQ(differ, 0);
    } else {
      EXPECT_GT(differ, 0) << "then docs/maintainers/numerics.md may promise more";
    }
  }
}

TEST(LinearFp8, QuantizesAWeightOnceForEachVersion) {
  auto device = make_cpu_device(1);
  nn::Linear layer("layer", {Segment{"wide", 32}}, {Segment{"hidden", 64}}, false, 0.02);
  Parameter& w = layer.weight();
  w.place(make(*device, random_values(32 * 64, 1), Dims{32, 64}, DType::f32));
  const Tensor x = make(*device, random_values(3 * 64, 2), Dims{3, 64}, DType::f32);
  Batch batch;
  ForwardContext context(batch, *device, DType::f32);
  context.linear.kind = Kind::fp8;
  const auto quantized = [&] {
    for (const OpRecord& r : device->ledger())
      if (r.name == "quantize") return r.calls;
    return std::int64_t{0};
  };
  device->record(true);
  const Tensor first = layer(context, x);
  EXPECT_EQ(quantized(), 2);  // the weight, x
  EXPECT_TRUE(same_bits(layer(context, x), first));
  EXPECT_EQ(quantized(), 3);
  EXPECT_GE(w.derived_bytes(), 2 * 32 * 64);
  w.local().fill(0.5);
  w.changed();
  EXPECT_FALSE(same_bits(layer(context, x), first));
  EXPECT_EQ(quantized(), 5);
  w.forget_derived();
  EXPECT_EQ(w.derived_bytes(), 0);
}

TEST(LinearFp8, LeavesShapesThatDoNotFitToTheComputeType) {
  auto device = make_cpu_device(1);
  device->record(true);
  const auto ran = [&](Kind kind, std::int64_t out, std::int64_t in) {
    device->clear_ledger();
    nn::Linear layer("layer", {Segment{"wide", out}}, {Segment{"hidden", in}}, false, 0.02);
    layer.weight().place(make(*device, random_values(out * in, 1), Dims{out, in}, DType::f32));
    Batch batch;
    ForwardContext context(batch, *device, DType::f32);
    context.linear.kind = kind;
    layer(context, make(*device, random_values(2 * in, 2), Dims{2, in}, DType::f32));
    return device->ledger().back().name;
  };
  EXPECT_EQ(ran(Kind::fp8, 16, 48), "linear fp8");
  EXPECT_EQ(ran(Kind::fp8, 16, 40), "linear");
  EXPECT_EQ(ran(Kind::fp8, 8, 48), "linear");
  EXPECT_EQ(ran(Kind::mxfp8, 32, 96), "linear fp8");
  EXPECT_EQ(ran(Kind::mxfp8, 32, 48), "linear");
  EXPECT_EQ(ran(Kind::mxfp8, 16, 96), "linear");
  EXPECT_EQ(ran(Kind::compute, 32, 96), "linear");
}

TEST(LinearFp8, CountsOnTheMetaDeviceWhatItTakes) {
  auto cpu = make_cpu_device(1), meta = make_meta_device();
  for (const Kind kind : {Kind::fp8, Kind::mxfp8}) {
    const Fp8Linear c{37, 64, 96, DType::bf16, {kind, DType::f8e5m2}};
    std::vector<std::vector<OpRecord>> ledgers;
    for (Device* device : {cpu.get(), meta.get()}) {
      device->record(true);
      device->clear_ledger();
      run_linear(*device, c);
      ledgers.push_back(device->ledger());
    }
    ASSERT_EQ(ledgers[0].size(), ledgers[1].size());
    for (std::size_t i = 0; i < ledgers[0].size(); ++i) {
      EXPECT_EQ(ledgers[0][i].name, ledgers[1][i].name);
      EXPECT_EQ(ledgers[0][i].cost.flop, ledgers[1][i].cost.flop);
      if (ledgers[0][i].name.starts_with("linear fp8")) {
        EXPECT_EQ(ledgers[0][i].cost.flop, 2.0 * 37 * 64 * 96);
      }
    }
  }
}

}  // namespace
}  // namespace capstan::testing
