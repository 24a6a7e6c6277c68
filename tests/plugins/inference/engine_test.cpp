// The basic engine: what it generates is a function of the request alone, and equals what a plain loop over whole-text
// forwards generates; limits, stop texts, errors.
#include "plugins/inference/basic/sampler.h"
#include "tests/plugins/models/fixture.h"

#include <capstan/inference.h>

#include <algorithm>
#include <cmath>
#include <functional>

namespace capstan::test {
namespace {

/// Token i is the letter 'a' + i, token 26 (a full stop) ends a document unless another does, 27 is half of a two-byte
/// character, 28 its other half.
class Letters : public Tokenizer {
 public:
  std::string_view name() const override { return "letters"; }
  std::int64_t vocabulary() const override { return 29; }
  std::int32_t end_of_document() const override { return eod; }
  void encode(std::string_view text, std::vector<std::int32_t>& out) const override {
    for (const char c : text) out.push_back(c - 'a');
  }
  std::string decode(std::span<const std::int32_t> tokens) const override {
    std::string text;
    for (const std::int32_t t : tokens) {
      if (t < 26)
        text += static_cast<char>('a' + t);
      else if (t == 27)
        text += "\xC3";
      else if (t == 28)
        text += "\xA9";
      else
        text += '.';
    }
    return text;
  }
  std::int32_t eod = 26;
};

class Engine : public GptFixture {
 protected:
  std::shared_ptr<Device> device = make_cpu_device(1);
  std::shared_ptr<Letters> letters = std::make_shared<Letters>();
  std::shared_ptr<Model> model = small(29);

  std::shared_ptr<Model> small(int vocabulary) {
    auto m = make(llama_form + Overrides{{"layers", "2"},
                                         {"width", "32"},
                                         {"heads", "4"},
                                         {"kv_heads", "2"},
                                         {"context", "200"},
                                         {"vocabulary", std::to_string(vocabulary)}});
    place(*m, *device, DType::f32, 0.15);
    return m;
  }

  std::shared_ptr<InferenceEngine> engine(const Overrides& options = {}) {
    const std::vector<std::pair<std::string, std::string>> list(options.begin(), options.end());
    auto e = host.make_as<InferenceEngine>(host.choice("inference", "basic", list));
    e->attach(model, letters, device, DType::f32, 1);
    return e;
  }

  static Request request(std::int64_t id, std::int64_t prompt, std::int64_t max_tokens = 40) {
    Request r;
    r.id = id;
    r.prompt = tokens(prompt, 26, static_cast<std::uint64_t>(1000 + id));
    r.sampling.seed = 5;
    r.sampling.max_tokens = max_tokens;
    r.sampling.logprobs = true;
    return r;
  }

  static std::map<std::int64_t, Completion> run(InferenceEngine& e, const std::vector<Request>& requests,
                                                std::map<std::int64_t, std::string>* streamed = nullptr) {
    for (const Request& r : requests) e.submit(r);
    const auto on_text = [&](std::int64_t id, const std::string& text) {
      if (streamed) (*streamed)[id] += text;
    };
    std::map<std::int64_t, Completion> out;
    int steps = 0;
    bool more = true;
    while (more) {
      more = e.step(on_text);
      for (Completion& c : e.finished()) out[c.id] = std::move(c);
      if (++steps > 100000) throw std::runtime_error("the engine does not come to an end");
    }
    return out;
  }

  static void expect_same(const Completion& a, const Completion& b) {
    EXPECT_EQ(a.tokens, b.tokens) << "request " << a.id;
    EXPECT_EQ(a.text, b.text) << "request " << a.id;
    EXPECT_EQ(a.finish, b.finish) << "request " << a.id;
    ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
    for (std::size_t i = 0; i < a.logprobs.size(); ++i) {
      EXPECT_EQ(a.logprobs[i], b.logprobs[i]) << "request " << a.id << ", token " << i;
    }
  }

  std::string refusal(const std::function<void()>& f, Fault fault = Fault::input) {
    try {
      f();
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), fault) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "no error";
    return "";
  }
};

TEST_F(Engine, EqualsAPlainLoopOverWholeTexts) {
  letters->eod = -1;
  const Request r = request(3, 20, 60);
  const Completion c = run(*engine(), {r}).at(3);
  ASSERT_EQ(c.tokens.size(), 60u);
  EXPECT_EQ(c.finish, "length");
  std::vector<std::int32_t> text = r.prompt;
  for (std::size_t i = 0; i < c.tokens.size(); ++i) {
    const auto rows = static_cast<std::int32_t>(text.size());
    const std::vector<std::int32_t> lengths{rows}, last{rows - 1};
    const Batch batch = make_batch(*device, text, lengths);
    ForwardContext context(batch, *device, DType::f32);
    run_forward(*model, context, false);
    const Tensor logits = model->head().logits(context, Tensor::of<std::int32_t>(last, {1}, *device));
    const std::int32_t token = basic::sample(std::span(logits.data<float>(), 29), r.sampling, r.id, rows);
    ASSERT_EQ(c.tokens[i], token) << "token " << i;
    std::vector<std::int32_t> targets(text.size(), -1);
    targets.back() = token;
    const Score score = model->head().score(context, Tensor::of<std::int32_t>(targets, {rows}, *device), nullptr, nullptr);
    ASSERT_EQ(c.logprobs[i], score.logprob.data<float>()[rows - 1]) << "training scores token " << i << " otherwise";
    text.push_back(token);
  }
}

TEST_F(Engine, ARequestsResultDoesNotDependOnTheOthers) {
  std::vector<Request> requests;
  for (int i = 0; i < 6; ++i) requests.push_back(request(i, 1 + 23 * i, 20 + i));
  const auto together = run(*engine(), requests);
  ASSERT_EQ(together.size(), 6u);
  for (const Request& r : requests) expect_same(run(*engine(), {r}).at(r.id), together.at(r.id));
  std::reverse(requests.begin(), requests.end());
  for (const auto& [id, c] : run(*engine(), requests)) expect_same(c, together.at(id));
}

TEST_F(Engine, BudgetsAndPreemptionDoNotChangeResults) {
  std::vector<Request> requests;
  for (int i = 0; i < 6; ++i) requests.push_back(request(i, 1 + 23 * i, 45));
  const auto expected = run(*engine(), requests);
  for (const Overrides& options :
       {Overrides{{"max_batch_tokens", "1"}}, Overrides{{"max_batch_tokens", "7"}}, Overrides{{"max_batch_tokens", "64"}},
        Overrides{{"max_batch", "1"}}, Overrides{{"max_batch", "2"}, {"max_batch_tokens", "33"}},
        // Room for 5 pages: six requests of up to 3 pages each push one another out.
        Overrides{{"max_tokens_held", "320"}}, Overrides{{"max_tokens_held", "256"}, {"max_batch_tokens", "50"}}}) {
    const auto got = run(*engine(options), requests);
    ASSERT_EQ(got.size(), expected.size());
    for (const auto& [id, c] : got) expect_same(c, expected.at(id));
  }
}

TEST_F(Engine, RequestsMayComeWhileOthersRun) {
  const auto e = engine();
  const auto expected_a = run(*engine(), {request(1, 30)}).at(1), expected_b = run(*engine(), {request(2, 70)}).at(2);
  e->submit(request(1, 30));
  for (int i = 0; i < 5; ++i) e->step({});
  const auto got = run(*e, {request(2, 70)});
  expect_same(got.at(1), expected_a);
  expect_same(got.at(2), expected_b);
  EXPECT_FALSE(e->step({}));
  EXPECT_TRUE(e->finished().empty());
}

TEST_F(Engine, SeedAndIdAddressTheRandomness) {
  letters->eod = -1;
  Request a = request(1, 10), b = a;
  b.id = 2;
  const auto first = run(*engine(), {a, b});
  EXPECT_NE(first.at(1).tokens, first.at(2).tokens);
  a.sampling.seed = 6;
  EXPECT_NE(run(*engine(), {a}).at(1).tokens, first.at(1).tokens);
  a.sampling.temperature = b.sampling.temperature = 0;
  const auto greedy = run(*engine(), {a, b});
  EXPECT_EQ(greedy.at(1).tokens, greedy.at(2).tokens);
}

TEST_F(Engine, StopTextsEndACompletionAndAreNotShown) {
  letters->eod = -1;
  Request r = request(4, 10, 60);
  const Completion open = run(*engine(), {r}).at(4);
  // Stop at what is known to come: three letters from the middle, across token boundaries.
  const std::string all = open.text;
  std::size_t at = 20;
  while (at < 50 && all.substr(at, 3).find('\xC3') != std::string::npos) ++at;
  r.sampling.stop = {"never there", all.substr(at, 3)};
  std::map<std::int64_t, std::string> streamed;
  const Completion c = run(*engine(), {r}, &streamed).at(4);
  EXPECT_EQ(c.finish, "stop");
  EXPECT_EQ(c.text, all.substr(0, all.find(all.substr(at, 3))));
  EXPECT_EQ(streamed[4], c.text);
  ASSERT_LE(c.tokens.size(), open.tokens.size());
  EXPECT_TRUE(std::equal(c.tokens.begin(), c.tokens.end(), open.tokens.begin()))
      << "sampled tokens stay, the stop text's too";
  EXPECT_EQ(c.logprobs.size(), c.tokens.size());
}

TEST_F(Engine, TheEndOfADocumentEndsACompletion) {
  letters->eod = -1;
  Request r = request(5, 10, 60);
  const Completion open = run(*engine(), {r}).at(5);
  letters->eod = open.tokens[12];
  const auto first = std::find(open.tokens.begin(), open.tokens.end(), letters->eod) - open.tokens.begin();
  const Completion c = run(*engine(), {r}).at(5);
  EXPECT_EQ(c.finish, "end_of_document");
  EXPECT_EQ(c.tokens.size(), static_cast<std::size_t>(first) + 1);
  EXPECT_EQ(c.tokens.back(), letters->eod);
}

TEST_F(Engine, StreamedTextIsTheCompletionsText) {
  std::vector<Request> requests;
  for (int i = 0; i < 5; ++i) requests.push_back(request(i, 5 + i, 80));
  std::map<std::int64_t, std::string> streamed;
  for (const auto& [id, c] : run(*engine(), requests, &streamed)) EXPECT_EQ(streamed[id], c.text);
}

TEST_F(Engine, GenerationEndsWhereTheModelsContextDoes) {
  letters->eod = -1;
  const Completion c = run(*engine(), {request(1, 150, 500)}).at(1);
  EXPECT_EQ(c.finish, "length");
  // The model reads 200 tokens; one more is sampled from the last.
  EXPECT_EQ(c.tokens.size(), 51u);
  EXPECT_EQ(run(*engine(), {request(1, 200, 500)}).at(1).tokens.size(), 1u);
  // A pool smaller than the context limits likewise.
  EXPECT_EQ(run(*engine({{"max_tokens_held", "128"}}), {request(1, 100, 500)}).at(1).tokens.size(), 29u);
}

TEST_F(Engine, LogprobsComeOnlyWhenAskedFor) {
  Request r = request(1, 10, 5);
  r.sampling.logprobs = false;
  EXPECT_TRUE(run(*engine(), {r}).at(1).logprobs.empty());
}

TEST_F(Engine, TokensThatTheTokenizerDoesNotHaveAreNotSampled) {
  model = small(300);
  letters->eod = -1;
  Request r = request(1, 10, 100);
  r.sampling.temperature = 100;  // nearly uniform over all that may be sampled
  const Completion c = run(*engine(), {r}).at(1);
  ASSERT_EQ(c.tokens.size(), 100u);
  for (const std::int32_t t : c.tokens) EXPECT_LT(t, 29);
}

TEST_F(Engine, WhatCannotBeMetIsRefusedAtOnce) {
  using testing::AllOf;
  using testing::HasSubstr;
  const auto e = engine();
  Request r = request(8, 0);
  EXPECT_THAT(refusal([&] { e->submit(r); }), AllOf(HasSubstr("request 8"), HasSubstr("no tokens")));
  EXPECT_THAT(refusal([&] { e->submit(request(8, 201)); }), AllOf(HasSubstr("at most 200"), HasSubstr("got 201")));
  r.prompt = {1, 29};
  EXPECT_THAT(refusal([&] { e->submit(r); }), AllOf(HasSubstr("token 1"), HasSubstr("got 29")));
  r.prompt = {-1};
  EXPECT_THAT(refusal([&] { e->submit(r); }), HasSubstr("got -1"));
  r = request(8, 5);
  r.sampling.top_p = 0;
  EXPECT_THAT(refusal([&] { e->submit(r); }), HasSubstr("top_p"));
  EXPECT_FALSE(e->step({})) << "nothing was taken";
  e->submit(request(8, 5));
  EXPECT_THAT(refusal([&] { e->submit(request(8, 6)); }), HasSubstr("in progress"));
  EXPECT_THAT(refusal([&] { e->attach(model, letters, device, DType::f32, 2); }, Fault::programming),
              HasSubstr("in progress"));

  model = small(20);
  EXPECT_THAT(refusal([&] { engine(); }), AllOf(HasSubstr("letters"), HasSubstr("29"), HasSubstr("20")));
}

TEST_F(Engine, BrokenWeightsAreAnErrorAndAStepCanBeRepeated) {
  const auto e = engine();
  const Completion expected = run(*engine(), {request(1, 10)}).at(1);
  e->submit(request(1, 10));
  for (int i = 0; i < 4; ++i) e->step({});
  Parameter* norm = nullptr;
  for (Parameter* p : model->parameters()) {
    if (p->name() == "norm.weight") norm = p;
  }
  const Tensor kept = norm->local().clone();
  norm->local().fill(std::nan(""));
  norm->changed();
  EXPECT_THAT(refusal([&] { e->step({}); }, Fault::runtime), testing::HasSubstr("not a number"));
  norm->local().copy_from(kept);
  norm->changed();
  expect_same(run(*e, {}).at(1), expected);
}

}  // namespace
}  // namespace capstan::test
