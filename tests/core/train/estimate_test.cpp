// The header's memory and FLOPs come from a step on the meta device: held against what a real step takes.
#include "core/engine/sessions.h"
#include "train/estimate.h"

#include <gmock/gmock.h>

#include <cstdio>

namespace capstan::train {
namespace {

class EstimateOf : public engine_test::Sessions, public ::testing::WithParamInterface<std::vector<std::string>> {};

TEST_P(EstimateOf, AStepIsWithinFivePercentOfTheRealOne) {
  std::vector<std::string> words{"data.sequence_length=128", "data.batch_size=6", "data.micro_batch=3", "model.context=128", "model.width=96", "model.layers=3"};
  words.insert(words.end(), GetParam().begin(), GetParam().end());
  auto s = open(words);
  const Estimate e = estimate_step(*s);
  const std::int64_t weights = s->device->bytes_held();

  const std::vector<std::int32_t> tokens(3 * 128, 65), targets(3 * 128, 66), lengths(3, 128);
  const Batch batch = make_batch(*s->device, tokens, lengths, targets);
  s->engine->forward_backward(batch, 1);  // what a first step alone allocates is there to stay
  s->engine->gradient_norm();
  s->engine->discard();
  std::int64_t quantized = 0;
  for (const Parameter* p : s->model->parameters()) quantized += p->derived_bytes();
  s->device->reset_peak();
  s->device->record(true);
  s->engine->forward_backward(batch, 2);
  const std::int64_t activations = s->device->bytes_peak() - weights - quantized;
  const double flop = s->device->total_cost().flop;

  s->device->record(false);
  s->engine->update(2, 1, s->engine->gradient_norm(), 1);
  EXPECT_LE(s->device->bytes_peak() - weights - quantized, activations) << "the optimizer needs more than the backward";

  std::printf("weights %.0f of %.0f KiB, activations %.0f of %.0f KiB\n", static_cast<double>(e.weights_bytes) / 1024, static_cast<double>(weights) / 1024,
              static_cast<double>(e.activations_bytes) / 1024, static_cast<double>(activations) / 1024);
  EXPECT_NEAR(static_cast<double>(e.weights_bytes) / static_cast<double>(weights), 1, 0.05);
  EXPECT_NEAR(static_cast<double>(e.activations_bytes) / static_cast<double>(activations), 1, 0.05);
  EXPECT_NEAR(e.step_flop / (2 * flop), 1, 0.01);  // two microbatches
  EXPECT_EQ(e.parameters, s->engine->parameters());
  EXPECT_EQ(e.quantized_bytes, quantized);
  const bool fp8 = s->engine->options().linear.narrow();
  EXPECT_EQ(quantized > 0, fp8);
  EXPECT_EQ(e.fp8_flop > 0.4 * e.step_flop, fp8);
  // The usual count: six operations for each weight of a matrix product and token, attention apart.
  double matrices = 0;
  for (const Parameter* p : s->model->parameters())
    if (p->role() == Role::matrix || p->role() == Role::head || (p->role() == Role::embedding && s->options().plugin("model").options.flag("tied") && p->name() == "tokens.weight"))
      matrices += static_cast<double>(p->numel());
  EXPECT_GT(e.model_flop_per_token, 6 * matrices);
  EXPECT_LT(e.model_flop_per_token, 6 * matrices * 1.35);
  if (s->options().group("train").text("recompute") == "block") EXPECT_GT(e.step_flop, e.model_flop_per_token * 6 * 128 * 1.15);
  else EXPECT_NEAR(e.step_flop / (e.model_flop_per_token * 6 * 128), 1, 1e-9);
}

INSTANTIATE_TEST_SUITE_P(Forms, EstimateOf,
                         ::testing::Values(std::vector<std::string>{},
                                           std::vector<std::string>{"model.norm=layer", "model.positions=learned", "model.activation=gelu", "model.bias=true", "model.dropout=0.1"},
                                           std::vector<std::string>{"precision.compute=bf16", "model.kv_heads=1", "model.qk_norm=true"},
                                           std::vector<std::string>{"train.recompute=block", "model.tied=false"},
                                           std::vector<std::string>{"precision.compute=f64", "optimizer=muon"},
                                           std::vector<std::string>{"precision.compute=bf16", "precision.linear=fp8"},
                                           std::vector<std::string>{"precision.linear=mxfp8", "train.recompute=block"}));

// All of its batches are made at once; then one forward after the other, and the bigram model once.
TEST_F(EstimateOf, AValidationIsWithinFivePercentOfTheRealOne) {
  const auto with = [&](std::vector<std::string> more) {
    std::vector<std::string> words{"data.sequence_length=128", "data.batch_size=6", "data.micro_batch=3", "model.context=128", "model.width=96", "model.layers=3"};
    words.insert(words.end(), more.begin(), more.end());
    return open(words);
  };
  auto s = with({"train.validate_every=1", "train.validate_batches=20", "data.validation=0.1"});
  const std::int64_t weights = s->device->bytes_held();
  std::vector<Batch> all;
  const std::vector<std::int32_t> tokens(3 * 128, 65), targets(3 * 128, 66), lengths(3, 128);
  for (int i = 0; i < 40; ++i) all.push_back(make_batch(*s->device, tokens, lengths, targets));
  s->engine->evaluate(all[0]);
  const std::int64_t batches = s->device->bytes_held() - weights;
  s->device->reset_peak();
  s->engine->evaluate(std::span<const Batch>(all));
  const std::int64_t forward = s->device->bytes_peak() - weights - batches;
  const Validation v = validation_of(*s, s->micro_batch());
  EXPECT_EQ(v.microbatches, 40);
  EXPECT_EQ(v.bigram_bytes, 257 * 258 * 8 + 40 * 3 * 128 * 20);
  const Estimate e = estimate_step(*s);
  EXPECT_NEAR(static_cast<double>(e.validation_bytes) / static_cast<double>(batches + std::max(forward, v.bigram_bytes)), 1, 0.05);
  EXPECT_THAT(describe_memory(e, false), ::testing::HasSubstr(" between steps for validation"));
  s.reset();

  s = with({"train.validate_every=1", "train.validate_batches=100000", "data.validation=0.1"});
  const Estimate many = estimate_step(*s);
  EXPECT_EQ(many.total_bytes(), many.weights_bytes + many.validation_bytes + many.staging_bytes);
  EXPECT_GT(many.validation_bytes, 200000 * 3 * 128 * 24ll);
  s.reset();
  for (const char* none : {"train.validate_every=0", "data.validation=0"}) {
    s = none[0] == 't' ? with({none, "data.validation=0.1"}) : with({none});
    EXPECT_EQ(estimate_step(*s).validation_bytes, 0) << none;
    s.reset();
  }
}

TEST_F(EstimateOf, ARunThatFitsNoMachineIsEstimatedAtOnce) {
  auto s = open({});
  auto big = open_session(recipe(), {"model.layers=2", "model.width=64", "data.batch_size=1000000", "data.sequence_length=32"}, CAPSTAN_PROGRAM, train::Placement::gradients);
  big->device.reset();
  EXPECT_GT(estimate_step(*big).activations_bytes, std::int64_t{1} << 37);
  EXPECT_GT(estimate_step(*s).activations_bytes, 0);
}

}  // namespace
}  // namespace capstan::train
