// PagedState: what attention reads through pages is what was appended, whatever was forked, cut off, freed or failed in
// between; and the pool's books stay right.
#include <capstan/ops.h>
#include <capstan/paged_state.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <random>

namespace capstan {
namespace {

constexpr std::int64_t kv_heads = 2, head_size = 8;
const std::string layer = "layers.0.attention";

std::vector<StateSpec> specs() { return {{StateSpec::Kind::paged, layer, {kv_heads, head_size}}}; }

class PagedStateTest : public testing::Test {
 protected:
  std::shared_ptr<Device> device = make_cpu_device(2);

  /// The key of token `t` of text `text`; values are keys + 1000.
  static float key(std::int64_t text, std::int64_t t, std::int64_t e) {
    return static_cast<float>(text * 100000 + t * 100 + e);
  }

  /// One forward in which each sequence gets its next tokens, named by the text that they come from.
  PagedKV forward(PagedState& state, const std::vector<std::int64_t>& ids, const std::vector<std::int32_t>& counts,
                  const std::vector<std::int64_t>& texts) {
    std::vector<float> k;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      for (std::int64_t t = state.length(ids[i]); t < state.length(ids[i]) + counts[i]; ++t) {
        for (std::int64_t e = 0; e < kv_heads * head_size; ++e) k.push_back(key(texts[i], t, e));
      }
    }
    const auto rows = static_cast<std::int64_t>(k.size()) / (kv_heads * head_size);
    const Tensor keys = Tensor::of<float>(k, {rows, kv_heads, head_size}, *device);
    for (float& x : k) x += 1000;
    const Tensor values = Tensor::of<float>(k, {rows, kv_heads, head_size}, *device);
    state.begin(ids, counts);
    const PagedKV past = state.append(layer, keys, values);
    state.end();
    return past;
  }

  /// Checks sequence `s` of `past`: token t has the key of texts[t].
  static void expect_holds(const PagedKV& past, std::int64_t s, const std::vector<std::int64_t>& texts) {
    ASSERT_EQ(past.lengths.data<std::int32_t>()[s], static_cast<std::int32_t>(texts.size()));
    const std::int32_t* blocks = past.blocks.data<std::int32_t>() + s * past.blocks.size(1);
    for (std::int64_t t = 0; t < static_cast<std::int64_t>(texts.size()); ++t) {
      const std::int64_t page = blocks[t / past.page], row = t % past.page;
      for (std::int64_t h = 0; h < kv_heads; ++h) {
        for (std::int64_t e = 0; e < head_size; ++e) {
          const std::int64_t at = ((page * kv_heads + h) * past.page + row) * head_size + e;
          const float expected = key(texts[static_cast<std::size_t>(t)], t, h * head_size + e);
          ASSERT_EQ(past.k.data<float>()[at], expected) << "sequence " << s << ", token " << t;
          ASSERT_EQ(past.v.data<float>()[at], expected + 1000) << "sequence " << s << ", token " << t;
        }
      }
    }
  }

  static std::string message(const std::function<void()>& f, Fault fault) {
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

std::vector<std::int64_t> repeat(std::int64_t text, std::int64_t n) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(n), text);
}

TEST_F(PagedStateTest, SequencesGrowSideBySide) {
  PagedState state(*device, DType::f32, specs(), 512);
  const std::int64_t a = state.open(1), b = state.open(2);
  forward(state, {a, b}, {70, 3}, {1, 2});
  forward(state, {b, a}, {62, 1}, {2, 1});
  const PagedKV past = forward(state, {a, b}, {100, 1}, {1, 2});
  expect_holds(past, 0, repeat(1, 171));
  expect_holds(past, 1, repeat(2, 66));
  EXPECT_EQ(state.length(a), 171);
  EXPECT_EQ(state.pages_free(), 8 - 3 - 2);
  EXPECT_EQ(state.weights_version(a), 1u);
  EXPECT_EQ(state.weights_version(b), 2u);
}

TEST_F(PagedStateTest, AppendTakesStridedRows) {
  PagedState state(*device, DType::f32, specs(), 64);
  const std::int64_t width = kv_heads * head_size;
  std::vector<float> fused(5 * 3 * static_cast<std::size_t>(width));
  for (std::size_t i = 0; i < fused.size(); ++i) fused[i] = static_cast<float>(i);
  const Tensor qkv = Tensor::of<float>(fused, {5, 3 * kv_heads, head_size}, *device);
  const std::int64_t ids[] = {state.open(0)};
  const std::int32_t counts[] = {5};
  state.begin(ids, counts);
  const PagedKV past = state.append(layer, qkv.narrow(1, kv_heads, kv_heads), qkv.narrow(1, 2 * kv_heads, kv_heads));
  state.end();
  const std::int64_t page = past.blocks.data<std::int32_t>()[0];
  for (std::int64_t t = 0; t < 5; ++t) {
    for (std::int64_t h = 0; h < kv_heads; ++h) {
      const std::int64_t at = ((page * kv_heads + h) * past.page + t) * head_size + 3;
      EXPECT_EQ(past.k.data<float>()[at], static_cast<float>(t * 3 * width + width + h * head_size + 3));
      EXPECT_EQ(past.v.data<float>()[at], static_cast<float>(t * 3 * width + 2 * width + h * head_size + 3));
    }
  }
}

TEST_F(PagedStateTest, ForksShareUntilOneWrites) {
  PagedState state(*device, DType::f32, specs(), 64 * 10);
  const std::int64_t a = state.open(7);
  forward(state, {a}, {100}, {1});
  EXPECT_EQ(state.pages_free(), 8);
  const std::int64_t b = state.fork(a), c = state.fork(a);
  EXPECT_EQ(state.pages_free(), 8) << "a fork takes no page";
  EXPECT_EQ(state.weights_version(b), 7u);
  EXPECT_EQ(state.pages_needed(b, 1), 1) << "its copy of the shared last page";
  EXPECT_EQ(state.pages_needed(b, 29), 2) << "the copy and a new page";
  // Both write in one forward: the first copies, the last owner is left with the original.
  const PagedKV past = forward(state, {b, a}, {3, 2}, {2, 3});
  auto expected_b = repeat(1, 100), expected_a = repeat(1, 100);
  for (const auto t : repeat(2, 3)) expected_b.push_back(t);
  for (const auto t : repeat(3, 2)) expected_a.push_back(t);
  expect_holds(past, 0, expected_b);
  expect_holds(past, 1, expected_a);
  const PagedKV later = forward(state, {c}, {1}, {4});
  auto expected_c = repeat(1, 100);
  expected_c.push_back(4);
  expect_holds(later, 0, expected_c);
  EXPECT_EQ(state.pages_free(), 10 - 1 - 3) << "one shared page and three last pages";
  state.close(a);
  EXPECT_EQ(state.pages_free(), 10 - 1 - 2);
  state.close(b);
  state.close(c);
  EXPECT_EQ(state.pages_free(), 10);
  EXPECT_EQ(state.sequences(), 0);
}

TEST_F(PagedStateTest, AForkAtAPageBoundaryCopiesNothing) {
  PagedState state(*device, DType::f32, specs(), 64 * 4);
  const std::int64_t a = state.open(0);
  forward(state, {a}, {64}, {1});
  const std::int64_t b = state.fork(a);
  EXPECT_EQ(state.pages_needed(b, 1), 1);
  forward(state, {b}, {1}, {2});
  EXPECT_EQ(state.pages_free(), 2);
}

TEST_F(PagedStateTest, TruncatedTokensAreForgottenAndReplaced) {
  PagedState state(*device, DType::f32, specs(), 64 * 6);
  const std::int64_t a = state.open(0);
  forward(state, {a}, {150}, {1});
  const std::int64_t b = state.fork(a);
  state.truncate(a, 70);
  EXPECT_EQ(state.length(a), 70);
  EXPECT_EQ(state.pages_free(), 3) << "the fork still holds the third page";
  const PagedKV past = forward(state, {a, b}, {5, 1}, {2, 3});
  auto expected_a = repeat(1, 70), expected_b = repeat(1, 150);
  for (const auto t : repeat(2, 5)) expected_a.push_back(t);
  expected_b.push_back(3);
  expect_holds(past, 0, expected_a);
  expect_holds(past, 1, expected_b);
  state.truncate(b, 0);
  EXPECT_EQ(state.pages_free(), 6 - 2);
}

TEST_F(PagedStateTest, CommittedTokensCannotBeCutOff) {
  PagedState state(*device, DType::f32, specs(), 128);
  const std::int64_t a = state.open(0);
  forward(state, {a}, {20}, {1});
  state.commit(a, 10);
  state.truncate(a, 10);
  EXPECT_THAT(message([&] { state.truncate(a, 9); }, Fault::programming), testing::HasSubstr("10 (committed)"));
  EXPECT_THAT(message([&] { state.truncate(a, 11); }, Fault::programming), testing::HasSubstr("got 11"));
  EXPECT_THAT(message([&] { state.commit(a, 11); }, Fault::programming), testing::HasSubstr("10 (held)"));
}

TEST_F(PagedStateTest, AFullPoolChangesNothing) {
  PagedState state(*device, DType::f32, specs(), 64 * 3);
  const std::int64_t a = state.open(0), b = state.open(0);
  forward(state, {a}, {65}, {1});
  const std::vector<std::int64_t> ids{a, b};
  const std::vector<std::int32_t> counts{1, 65};
  const std::string text = message([&] { state.begin(ids, counts); }, Fault::runtime);
  EXPECT_THAT(text, testing::AllOf(testing::HasSubstr("expected 2 free pages"), testing::HasSubstr("got 1 of 3"),
                                   testing::HasSubstr("max_tokens_held")));
  EXPECT_EQ(state.pages_free(), 1);
  EXPECT_EQ(state.length(a), 65);
  expect_holds(forward(state, {a, b}, {1, 64}, {1, 2}), 0, repeat(1, 66));
}

TEST_F(PagedStateTest, ACancelledForwardLeavesSequencesAsTheyWere) {
  PagedState state(*device, DType::f32, specs(), 64 * 4);
  const std::int64_t a = state.open(0);
  forward(state, {a}, {60}, {1});
  const std::vector<std::int64_t> ids{a};
  const std::vector<std::int32_t> counts{100};
  state.begin(ids, counts);
  EXPECT_EQ(state.pages_free(), 1);
  state.cancel();
  EXPECT_EQ(state.pages_free(), 3);
  EXPECT_EQ(state.length(a), 60);
  expect_holds(forward(state, {a}, {10}, {1}), 0, repeat(1, 70));
}

TEST_F(PagedStateTest, RandomHistoriesKeepTheBooksAndTheTokens) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 10; ++trial) {
    const std::int64_t pages = 12;
    PagedState state(*device, DType::f32, specs(), 64 * pages);
    std::map<std::int64_t, std::vector<std::int64_t>> held;  // what each sequence should hold
    std::int64_t text = 1;
    for (int event = 0; event < 60; ++event) {
      std::vector<std::int64_t> ids;
      for (const auto& [id, tokens] : held) ids.push_back(id);
      const auto any = [&] { return ids[random() % ids.size()]; };
      switch (ids.empty() ? 0 : random() % 6) {
        case 0:
          held[state.open(0)] = {};
          break;
        case 1: {
          const std::int64_t id = any(), copy = state.fork(id);
          held[copy] = held[id];
          break;
        }
        case 2: {
          const std::int64_t id = any(), length = static_cast<std::int64_t>(random() % (held[id].size() + 1));
          state.truncate(id, length);
          held[id].resize(static_cast<std::size_t>(length));
          break;
        }
        case 3: {
          const std::int64_t id = any();
          state.close(id);
          held.erase(id);
          break;
        }
        default: {
          std::vector<std::int64_t> some, texts;
          std::vector<std::int32_t> counts;
          std::int64_t needed = 0;
          for (const std::int64_t id : ids) {
            const auto count = static_cast<std::int32_t>(1 + random() % 90);
            if (random() % 2 || needed + state.pages_needed(id, count) > state.pages_free()) continue;
            needed += state.pages_needed(id, count);
            some.push_back(id);
            counts.push_back(count);
            texts.push_back(text++);
          }
          if (some.empty()) break;
          const PagedKV past = forward(state, some, counts, texts);
          for (std::size_t i = 0; i < some.size(); ++i) {
            for (std::int32_t n = 0; n < counts[i]; ++n) held[some[i]].push_back(texts[i]);
            expect_holds(past, static_cast<std::int64_t>(i), held[some[i]]);
          }
        }
      }
      if (HasFatalFailure()) return;
      for (const auto& [id, tokens] : held) ASSERT_EQ(state.length(id), static_cast<std::int64_t>(tokens.size()));
    }
    for (const auto& [id, tokens] : held) state.close(id);
    EXPECT_EQ(state.pages_free(), pages);
  }
}

TEST_F(PagedStateTest, MisuseIsNamed) {
  PagedState state(*device, DType::f32, specs(), 128);
  const std::int64_t a = state.open(0);
  const std::vector<std::int64_t> ids{a}, twice{a, a}, unknown{42};
  const std::vector<std::int32_t> one{1}, two{1, 1}, none{0};
  const auto programming = [&](const std::function<void()>& f) { return message(f, Fault::programming); };
  EXPECT_THAT(programming([&] { state.begin(unknown, one); }), testing::HasSubstr("42"));
  EXPECT_THAT(programming([&] { state.begin(twice, two); }), testing::HasSubstr("twice"));
  EXPECT_THAT(programming([&] { state.begin(ids, none); }), testing::HasSubstr("got 0"));
  EXPECT_THAT(programming([&] { state.slot(layer); }), testing::HasSubstr("pages only"));
  const Tensor k = Tensor::zeros({1, kv_heads, head_size}, DType::f32, *device);
  EXPECT_THAT(programming([&] { state.append(layer, k, k); }), testing::HasSubstr("outside"));
  state.begin(ids, one);
  EXPECT_THAT(programming([&] { state.append("other", k, k); }), testing::HasSubstr("[other]"));
  const Tensor wide = Tensor::zeros({1, kv_heads, head_size + 1}, DType::f32, *device);
  EXPECT_THAT(programming([&] { state.append(layer, wide, k); }), testing::HasSubstr("[1, 2, 9]"));
  EXPECT_THAT(programming([&] { state.append(layer, k, k.to(DType::f64)); }), testing::HasSubstr("f64"));
  EXPECT_THAT(programming([&] { state.fork(a); }), testing::HasSubstr("between begin() and end()"));
  state.end();
  EXPECT_THAT(programming([&] { state.end(); }), testing::HasSubstr("no forward"));

  std::vector<StateSpec> recurrent = specs();
  recurrent[0].kind = StateSpec::Kind::slot;
  EXPECT_THAT(message([&] { PagedState(*device, DType::f32, recurrent, 64); }, Fault::input), testing::HasSubstr(layer));
}

/// Bits of a tensor's values, so that -0 and NaN count.
std::vector<std::uint32_t> bits(const Tensor& t) {
  std::vector<std::uint32_t> out(static_cast<std::size_t>(t.numel()));
  t.contiguous().copy_to_host(out.data(), t.bytes());
  return out;
}

TEST_F(PagedStateTest, AttentionOverPagesEqualsAttentionOverTheWholeTextBitForBit) {
  const std::int64_t heads = 4, T = 150;
  const ops::AttentionShape shape{heads, kv_heads, head_size, 0};
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto matrix = [&](std::int64_t cols) {
    std::vector<float> v(static_cast<std::size_t>(T * cols));
    for (float& x : v) x = normal(random);
    return Tensor::of<float>(v, {T, cols}, *device);
  };
  const Tensor q = matrix(heads * head_size), k = matrix(kv_heads * head_size), v = matrix(kv_heads * head_size);
  Space whole;
  whole.host_starts = {0, static_cast<std::int32_t>(T)};
  whole.capacity = whole.longest = T;
  const auto expected = bits(ops::attention(q, k, v, whole, shape));

  for (const std::int64_t chunk : {1, 7, 64, 100}) {
    PagedState state(*device, DType::f32, specs(), 64 * 5);
    // What no token was written to must not matter.
    for (const std::int64_t id : {state.open(0)}) {
      const std::vector<std::int64_t> ids{id};
      const std::vector<std::int32_t> counts{64 * 5};
      const Tensor nan =
          Tensor::full({64 * 5, kv_heads, head_size}, std::numeric_limits<double>::quiet_NaN(), DType::f32, *device);
      state.begin(ids, counts);
      state.append(layer, nan, nan);
      state.end();
      state.close(id);
    }
    const std::vector<std::int64_t> ids{state.open(0)};
    std::vector<std::uint32_t> got;
    for (std::int64_t at = 0; at < T; at += chunk) {
      const std::int64_t rows = std::min(chunk, T - at);
      const std::vector<std::int32_t> counts{static_cast<std::int32_t>(rows)};
      Space space;
      space.host_starts = {0, static_cast<std::int32_t>(rows)};
      space.past = {static_cast<std::int32_t>(at)};
      space.capacity = rows;
      space.longest = at + rows;
      const Dims per_head{rows, kv_heads, head_size};
      state.begin(ids, counts);
      const PagedKV past = state.append(layer, k.narrow(0, at, rows).view(per_head), v.narrow(0, at, rows).view(per_head));
      for (const auto b : bits(ops::attention_paged(q.narrow(0, at, rows), past, space, shape))) got.push_back(b);
      state.end();
    }
    EXPECT_EQ(got, expected) << "chunks of " << chunk;
  }
}

}  // namespace
}  // namespace capstan
