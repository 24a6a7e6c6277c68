// The whole model's gradient against finite differences, and what must not change it: recompute, micro-batching.
#include "tests/plugins/models/fixture.h"

#include <capstan/ops.h>

#include <cmath>

namespace capstan::test {
namespace {

const Overrides tiny{{"layers", "2"},   {"width", "8"},       {"heads", "2"}, {"kv_heads", "1"},
                     {"context", "16"}, {"vocabulary", "11"}, {"ffn", "12"}};

class GptTraining : public GptFixture {
 protected:
  std::shared_ptr<Device> device = make_cpu_device(1);  // tiny work: threads would only wait for each other

  /// Three sequences of unlike length; some rows without a target, unlike weights.
  Batch ragged() const {
    const std::vector<std::int32_t> lengths{5, 1, 3};
    std::vector<std::int32_t> targets = tokens(9, 11, 2);
    targets[3] = -1;
    const std::vector<float> weight{1, 0.5f, 2, 0, 1, 1, 0.25f, 1, 3};
    return make_batch(*device, tokens(9, 11), lengths, targets, weight);
  }

  double loss(Model& model, const Batch& batch, DType dtype) const {
    ForwardContext context(batch, *device, dtype);
    run_forward(model, context, true);
    EXPECT_EQ(context.losses().size(), 1u);
    return context.losses()[0].sum.item();
  }

  /// Gradients of every parameter by name.
  std::map<std::string, Tensor> gradients(Model& model, const Batch& batch, DType dtype, bool recompute = false) const {
    for (Parameter* p : model.parameters()) p->leaf()->clear();
    ForwardContext context(batch, *device, dtype);
    context.grad = true;
    context.training = true;
    context.seed = 4;
    context.step = 6;
    forward_backward(model, context, {}, recompute);
    std::map<std::string, Tensor> out;
    for (Parameter* p : model.parameters()) {
      EXPECT_TRUE(p->leaf()->has_grad()) << p->name() << " got no gradient";
      out[p->name()] = p->leaf()->grad().clone();
    }
    return out;
  }
};

class GptGradient : public GptTraining, public testing::WithParamInterface<std::pair<const char*, Overrides>> {};

TEST_P(GptGradient, AgreesWithFiniteDifferences) {
  const auto model = make(tiny + GetParam().second);
  place(*model, *device, DType::f64, 0.3, true);
  const Batch batch = ragged();
  const auto grads = gradients(*model, batch, DType::f64);
  for (Parameter* p : model->parameters()) {
    const std::vector<double> grad = values(grads.at(p->name()));
    const Tensor local = p->local().detach();
    double* v = local.data<double>();
    // A spread of elements: all of small parameters, every 7th of others.
    for (std::int64_t i = 0; i<local.numel(); i += local.numel()> 40 ? 7 : 1) {
      const double kept = v[i], h = 1e-5;
      v[i] = kept + h;
      p->changed();
      const double up = loss(*model, batch, DType::f64);
      v[i] = kept - h;
      p->changed();
      const double down = loss(*model, batch, DType::f64);
      v[i] = kept;
      p->changed();
      // Central differences are off by about h^2 = 1e-10 and by rounding, 1e-16 / h = 1e-11.
      ASSERT_NEAR(grad[static_cast<std::size_t>(i)], (up - down) / (2 * h), 2e-8) << p->name() << "[" << i << "]";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, GptGradient,
                         testing::Values(std::pair{"gpt2", gpt2_form}, std::pair{"llama", llama_form},
                                         std::pair{"qwen", qwen_form},
                                         std::pair{"window", llama_form + Overrides{{"window", "3"}, {"global_every", "2"}}},
                                         std::pair{"gpt2_untied", gpt2_form + Overrides{{"tied", "false"}}}),
                         [](const auto& info) { return std::string(info.param.first); });

TEST_F(GptTraining, RecomputeChangesNoBit) {
  for (const Overrides& form : {gpt2_form, llama_form, qwen_form}) {
    const auto model = make(tiny + form + Overrides{{"dropout", "0.2"}});
    place(*model, *device, DType::f32, 0.1, true);
    const Batch batch = ragged();
    const auto plain = gradients(*model, batch, DType::f32);
    const auto again = gradients(*model, batch, DType::f32, true);
    for (const auto& [name, grad] : plain) EXPECT_EQ(bits(grad), bits(again.at(name))) << name;
  }
}

TEST_F(GptTraining, DropoutDoesNotDependOnMicroBatching) {
  const auto model = make(tiny + llama_form + Overrides{{"dropout", "0.3"}});
  place(*model, *device, DType::f32, 0.1);
  const std::vector<std::int32_t> all = tokens(12, 11);
  const auto hidden = [&](const Batch& batch, std::uint64_t step, bool training) {
    ForwardContext context(batch, *device, DType::f32);
    context.training = training;
    context.seed = 3;
    context.step = step;
    run_forward(*model, context, false);
    return context.get("h");
  };
  const std::vector<std::int32_t> both{7, 5}, first{7}, second{5};
  const Tensor whole = hidden(make_batch(*device, all, both, {}, {}, 100), 2, true);
  const Tensor a = hidden(make_batch(*device, std::span(all).first(7), first, {}, {}, 100), 2, true);
  const Tensor b = hidden(make_batch(*device, std::span(all).subspan(7), second, {}, {}, 107), 2, true);
  EXPECT_EQ(bits(whole.narrow(0, 0, 7)), bits(a));
  EXPECT_EQ(bits(whole.narrow(0, 7, 5)), bits(b));
  // It can fail: other token ids, another step and no dropout at all give other values.
  EXPECT_NE(bits(whole.narrow(0, 7, 5)),
            bits(hidden(make_batch(*device, std::span(all).subspan(7), second, {}, {}, 100), 2, true)));
  EXPECT_NE(bits(whole), bits(hidden(make_batch(*device, all, both, {}, {}, 100), 3, true)));
  EXPECT_NE(bits(whole), bits(hidden(make_batch(*device, all, both, {}, {}, 100), 2, false)));
}

TEST_F(GptTraining, SequencesDoNotSeeEachOther) {
  const auto model = make(tiny + llama_form);
  place(*model, *device, DType::f32, 0.1);
  std::vector<std::int32_t> all = tokens(12, 11);
  const std::vector<std::int32_t> lengths{7, 5};
  const auto hidden = [&] {
    const Batch batch = make_batch(*device, all, lengths);
    ForwardContext context(batch, *device, DType::f32);
    run_forward(*model, context, false);
    return bits(context.get("h"));
  };
  const auto before = hidden();
  all[3] = (all[3] + 1) % 11;
  const auto after = hidden();
  const std::size_t row = 8 * sizeof(float);
  const auto rows = [&](const auto& v, std::size_t from, std::size_t to) {
    return std::vector<unsigned char>(v.begin() + static_cast<std::ptrdiff_t>(from * row),
                                      v.begin() + static_cast<std::ptrdiff_t>(to * row));
  };
  EXPECT_EQ(rows(before, 0, 3), rows(after, 0, 3)) << "the past does not see the future";
  for (std::size_t t = 3; t < 7; ++t) EXPECT_NE(rows(before, t, t + 1), rows(after, t, t + 1)) << "row " << t;
  EXPECT_EQ(rows(before, 7, 12), rows(after, 7, 12)) << "another sequence";
}

TEST_F(GptTraining, LogitsAndScoresOfARowDoNotDependOnTheOthers) {
  const auto model = make(tiny + qwen_form);
  place(*model, *device, DType::f32, 0.3);
  const Batch batch = ragged();
  ForwardContext context(batch, *device, DType::f32);
  run_forward(*model, context, false);
  const std::vector<std::int32_t> rows{0, 1, 2, 3, 4, 5, 6, 7, 8}, some{7, 2};
  const Tensor all = model->head().logits(context, Tensor::of<std::int32_t>(rows, {9}, *device));
  const Tensor two_rows = Tensor::of<std::int32_t>(some, {2}, *device);
  const Tensor two = model->head().logits(context, two_rows);
  EXPECT_EQ(all.dtype(), DType::f32);
  EXPECT_EQ(bits(two.narrow(0, 0, 1)), bits(all.narrow(0, 7, 1)));
  EXPECT_EQ(bits(two.narrow(0, 1, 1)), bits(all.narrow(0, 2, 1)));

  const Tensor targets = batch.stream("targets");
  const Score score = model->head().score(context, targets, nullptr, nullptr);
  const std::int32_t picked[] = {targets.data<std::int32_t>()[7], targets.data<std::int32_t>()[2]};
  const Tensor of_rows = Tensor::of<std::int32_t>(picked, {2}, *device);
  ForwardContext rows_only(batch, *device, DType::f32);
  rows_only.set("h", ops::gather(context.get("h"), two_rows));
  const Score of_two = model->head().score(rows_only, of_rows, nullptr, nullptr);
  EXPECT_EQ(bits(of_two.logprob.narrow(0, 0, 1)), bits(score.logprob.narrow(0, 7, 1)));
  EXPECT_EQ(bits(of_two.logprob.narrow(0, 1, 1)), bits(score.logprob.narrow(0, 2, 1)));
  for (std::int64_t t = 0; t < 9; ++t) {
    const std::int32_t target = targets.data<std::int32_t>()[t];
    double sum = 0;
    for (std::int64_t v = 0; v < 11; ++v) sum += std::exp(static_cast<double>(all.data<float>()[t * 11 + v]));
    const double expected = target < 0 ? 0 : static_cast<double>(all.data<float>()[t * 11 + target]) - std::log(sum);
    EXPECT_NEAR(score.logprob.data<float>()[t], expected, 1e-5) << "row " << t;
  }
}

}  // namespace
}  // namespace capstan::test
