// The numerics contract, bit for bit in f32 and bf16: a position's logits are the same from one forward over the whole text,
// token by token, in chunks of any size, beside other requests, and on any number of threads. And: the check can fail.
#include "tests/plugins/models/fixture.h"

#include <capstan/ops.h>
#include <capstan/paged_state.h>

#include <algorithm>
#include <functional>

namespace capstan::test {
namespace {

const Overrides base{{"layers", "2"}, {"width", "48"}, {"heads", "4"}, {"context", "256"}, {"vocabulary", "97"}};

class Invariance : public GptFixture, public testing::WithParamInterface<std::pair<const char*, Overrides>> {
 protected:
  static constexpr std::int64_t length = 150, vocabulary = 97;
  const DType dtype = std::string(GetParam().first).ends_with("bf16") ? DType::bf16 : DType::f32;
  std::shared_ptr<Model> model = make(base + GetParam().second);
  std::vector<std::int32_t> text = tokens(length, vocabulary, 5);

  void place_on(const std::shared_ptr<Device>& d) {
    device = d;
    place(*model, *device, dtype, 0.2);
  }

  std::vector<unsigned char> all_logits(ForwardContext& context, std::int64_t first, std::int64_t rows) const {
    std::vector<std::int32_t> ids;
    for (std::int64_t i = 0; i < rows; ++i) ids.push_back(static_cast<std::int32_t>(first + i));
    return bits(model->head().logits(context, Tensor::of<std::int32_t>(ids, {rows}, *device)));
  }

  /// Logits of every position from one forward without a state, as training does it.
  std::vector<unsigned char> whole() const {
    const std::vector<std::int32_t> lengths{static_cast<std::int32_t>(length)};
    const Batch batch = make_batch(*device, text, lengths);
    ForwardContext context(batch, *device, dtype);
    run_forward(*model, context, false);
    return all_logits(context, 0, length);
  }

  struct Part {
    std::int64_t id;
    std::vector<std::int32_t> tokens;
  };

  /// One forward over a state; `use` sees the context before it is gone.
  void forward(PagedState& state, const std::vector<Part>& parts, const std::function<void(ForwardContext&)>& use) const {
    std::vector<std::int32_t> all, lengths, positions, past;
    std::vector<std::int64_t> ids;
    for (const Part& part : parts) {
      const auto held = static_cast<std::int32_t>(state.length(part.id));
      for (std::size_t i = 0; i < part.tokens.size(); ++i) positions.push_back(held + static_cast<std::int32_t>(i));
      all.insert(all.end(), part.tokens.begin(), part.tokens.end());
      lengths.push_back(static_cast<std::int32_t>(part.tokens.size()));
      past.push_back(held);
      ids.push_back(part.id);
    }
    Batch batch = make_batch(*device, all, lengths);
    Space& space = batch.spaces[0];
    space.past = past;
    space.positions = Tensor::of<std::int32_t>(positions, {static_cast<std::int64_t>(positions.size())}, *device);
    space.longest = 1 + *std::max_element(positions.begin(), positions.end());
    ForwardContext context(batch, *device, dtype);
    context.state = &state;
    state.begin(ids, lengths);
    run_forward(*model, context, false);
    use(context);
    state.end();
  }

  /// Logits of every position when the text comes in chunks; `others` more sequences run beside it, with texts, lengths
  /// and chunks of their own, before and after it in the batch. `meddle` may change the state between two chunks.
  std::vector<unsigned char> chunked(std::int64_t chunk, int others = 0,
                                     const std::function<void(PagedState&)>& meddle = {}) const {
    const std::vector<StateSpec> specs = model->state();
    PagedState state(*device, dtype, specs, 4096);
    std::vector<std::int64_t> other_ids;
    for (int i = 0; i < others; ++i) other_ids.push_back(state.open(0));
    const std::int64_t id = state.open(0);
    std::vector<unsigned char> out;
    for (std::int64_t at = 0, step = 0; at < length; at += chunk, ++step) {
      const std::int64_t rows = std::min(chunk, length - at);
      std::vector<Part> parts;
      std::int64_t first = 0;
      for (int i = 0; i < others; ++i) {
        const auto seed = static_cast<std::uint64_t>(100 + i);
        const std::int64_t count = 1 + (i * 5 + step * 3) % 11;
        if (state.length(other_ids[static_cast<std::size_t>(i)]) + count > 256) continue;
        const Part part{other_ids[static_cast<std::size_t>(i)],
                        tokens(count, vocabulary, seed + static_cast<std::uint64_t>(step) * 31)};
        if (i % 2 == 0) parts.push_back(part), first += count;
      }
      parts.push_back({id, {text.begin() + at, text.begin() + at + rows}});
      for (int i = 1; i < others; i += 2) {
        const std::int64_t other = other_ids[static_cast<std::size_t>(i)];
        if (state.length(other) < 250)
          parts.push_back({other, tokens(1 + i % 3, vocabulary, static_cast<std::uint64_t>(i + step))});
      }
      forward(state, parts, [&](ForwardContext& context) {
        for (const auto b : all_logits(context, first, rows)) out.push_back(b);
      });
      if (meddle) meddle(state);
    }
    return out;
  }

  std::shared_ptr<Device> device;
};

TEST_P(Invariance, DecodingTokenByTokenEqualsOneForward) {
  place_on(make_cpu_device(1));
  EXPECT_EQ(chunked(1), whole());
}

TEST_P(Invariance, ChunksOfAnySizeEqualOneForward) {
  place_on(make_cpu_device(1));
  const auto expected = whole();
  for (const std::int64_t chunk : {7, 64, 100, 150}) EXPECT_EQ(chunked(chunk), expected) << "chunks of " << chunk;
}

TEST_P(Invariance, OtherRequestsInTheBatchChangeNothing) {
  place_on(make_cpu_device(1));
  const auto expected = whole();
  for (const std::int64_t chunk : {1, 7, 64})
    EXPECT_EQ(chunked(chunk, 5), expected) << "chunks of " << chunk << " beside 5 others";
}

TEST_P(Invariance, ThreadsChangeNothing) {
  place_on(make_cpu_device(1));
  const auto expected = whole();
  for (const int threads : {2, 3}) {
    place_on(make_cpu_device(threads));
    EXPECT_EQ(whole(), expected) << threads << " threads";
    EXPECT_EQ(chunked(1), expected) << threads << " threads, token by token";
    EXPECT_EQ(chunked(7, 5), expected) << threads << " threads, in chunks beside others";
  }
}

TEST_P(Invariance, TrainingsForwardWithAGraphGivesTheSameBits) {
  place_on(make_cpu_device(1));
  const auto expected = whole();
  place(*model, *device, dtype, 0.2, true);
  const std::vector<std::int32_t> lengths{20, static_cast<std::int32_t>(length)};
  std::vector<std::int32_t> both = tokens(20, vocabulary, 9);
  both.insert(both.end(), text.begin(), text.end());
  const Batch batch = make_batch(*device, both, lengths);
  ForwardContext context(batch, *device, dtype);
  context.grad = true;
  context.training = true;
  run_forward(*model, context, false);
  EXPECT_EQ(all_logits(context, 20, length), expected);
}

TEST_P(Invariance, ForkedAndTruncatedSequencesContinueAsIfAlone) {
  place_on(make_cpu_device(1));
  const auto expected = whole();
  const std::size_t row = vocabulary * sizeof(float);
  const auto last_rows = [&](std::int64_t from) {
    return std::vector<unsigned char>(expected.begin() + static_cast<std::ptrdiff_t>(row * static_cast<std::size_t>(from)),
                                      expected.end());
  };
  const std::vector<StateSpec> specs = model->state();
  PagedState state(*device, dtype, specs, 4096);
  const std::int64_t a = state.open(0);
  const auto nothing = [](ForwardContext&) {};
  const auto piece = [&](std::int64_t from, std::int64_t to) {
    return std::vector<std::int32_t>(text.begin() + from, text.begin() + to);
  };
  forward(state, {{a, piece(0, 100)}}, nothing);
  const std::int64_t b = state.fork(a);
  // One branch goes astray, the other goes on with the text; then the first is cut back and goes on too.
  std::vector<unsigned char> got;
  forward(state, {{a, tokens(40, vocabulary, 77)}, {b, piece(100, 150)}},
          [&](ForwardContext& context) { got = all_logits(context, 40, 50); });
  EXPECT_EQ(got, last_rows(100));
  state.truncate(a, 90);
  forward(state, {{a, piece(90, 150)}}, [&](ForwardContext& context) { got = all_logits(context, 0, 60); });
  EXPECT_EQ(got, last_rows(90));
}

/// Whether the comparisons above can fail.
class InvarianceCheck : public Invariance {};

TEST_P(InvarianceCheck, TheCheckSeesOneChangedBitOfTheState) {
  place_on(make_cpu_device(1));
  const auto expected = whole();
  int step = 0;
  const auto meddle = [&](PagedState& state) {
    if (++step != 1) return;
    // The lowest bit of one held number, through the door that attention uses, after the first token, so that the next ones
    // weigh it by a half, a third ...
    const std::int64_t probe = state.open(0);
    const std::int64_t ids[] = {probe};
    const std::int32_t counts[] = {1};
    const Dims shape = model->state()[0].shape;
    const Tensor zero = Tensor::zeros({1, shape[0], shape[1]}, DType::f32, *device);
    state.begin(ids, counts);
    const PagedKV past = state.append(model->state()[0].name, zero, zero);
    state.cancel();
    state.close(probe);
    // Sequence "id" opened first in chunked(), so it has the first page.
    auto* first = static_cast<std::uint32_t*>(past.v.raw());
    *first ^= 1u;
  };
  EXPECT_NE(chunked(1, 0, meddle), expected);
}

TEST_P(InvarianceCheck, TheCheckSeesAnotherOrderOfSummation) {
  place_on(make_cpu_device(1));
  // The last step, written out plainly: a sum from the first column to the last, in f32. Equal within rounding, and yet
  // the comparison of bits tells it from the model's own.
  const std::vector<std::int32_t> lengths{static_cast<std::int32_t>(length)};
  const Batch batch = make_batch(*device, text, lengths);
  ForwardContext context(batch, *device, DType::f32);
  run_forward(*model, context, false);
  std::vector<Parameter*> parameters = model->parameters();
  const auto named = [&](const std::string& name) -> Parameter* {
    for (Parameter* p : parameters)
      if (p->name() == name) return p;
    return nullptr;
  };
  const Parameter* table = named("head.weight") ? named("head.weight") : named("tokens.weight");
  const Tensor norm = named("norm.weight")->local(), weight = table->local(), h = context.get("h");
  const Tensor x =
      named("norm.bias") ? ops::layer_norm(h, norm, named("norm.bias")->local(), 1e-5) : ops::rms_norm(h, norm, 1e-5);
  const Tensor plain = Tensor::empty({length, vocabulary}, DType::f32, *device);
  for (std::int64_t t = 0; t < length; ++t) {
    for (std::int64_t n = 0; n < vocabulary; ++n) {
      float sum = 0;
      for (std::int64_t c = 0; c < 48; ++c) sum += x.data<float>()[t * 48 + c] * weight.data<float>()[n * 48 + c];
      plain.data<float>()[t * vocabulary + n] = sum;
    }
  }
  const std::vector<unsigned char> expected = whole();
  const auto* model_logits = reinterpret_cast<const float*>(expected.data());
  for (std::int64_t i = 0; i < length * vocabulary; ++i) ASSERT_NEAR(plain.data<float>()[i], model_logits[i], 1e-4);
  EXPECT_NE(bits(plain), expected);
}

const auto forms =
    testing::Values(std::pair{"gpt2", gpt2_form}, std::pair{"llama", llama_form + Overrides{{"kv_heads", "2"}}},
                    std::pair{"qwen", qwen_form + Overrides{{"kv_heads", "1"}, {"head_size", "20"}}});
const auto windowed_forms =
    testing::Values(std::pair{"window", llama_form + Overrides{{"kv_heads", "2"}, {"window", "45"}}},
                    std::pair{"local_and_global", qwen_form + Overrides{{"window", "10"}, {"global_every", "2"}}});
const auto name_of_form = [](const auto& info) { return std::string(info.param.first); };
INSTANTIATE_TEST_SUITE_P(Forms, Invariance, forms, name_of_form);
INSTANTIATE_TEST_SUITE_P(Windowed, Invariance, windowed_forms, name_of_form);
INSTANTIATE_TEST_SUITE_P(Forms, InvarianceCheck, forms, name_of_form);
INSTANTIATE_TEST_SUITE_P(Bf16, Invariance,
                         testing::Values(std::pair{"gpt2_bf16", gpt2_form},
                                         std::pair{"qwen_bf16", qwen_form + Overrides{{"kv_heads", "1"}}}),
                         name_of_form);

}  // namespace
}  // namespace capstan::test
