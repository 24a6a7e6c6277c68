// The training data's meaning: what is a row, a target, a sequence, an epoch; that it resumes exactly.
#include "data/loader.h"
#include "data/shuffle.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <map>
#include <set>

#include "helpers.h"

namespace capstan::data {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr std::int64_t vocabulary = 100000;

/// Documents of random lengths whose tokens are all different: begin, begin + 1, ... So a token tells its document.
Documents counting(int documents, unsigned seed, std::int32_t begin = 0, int longest = 40) {
  std::mt19937 random(seed);
  Documents result;
  for (int d = 0; d < documents; ++d) {
    std::vector<std::int32_t> document(1 + random() % static_cast<unsigned>(longest));
    std::iota(document.begin(), document.end(), begin);
    begin += static_cast<std::int32_t>(document.size());
    result.push_back(document);
  }
  return result;
}

template <class T>
std::vector<T> host(const Tensor& tensor) {
  std::vector<T> values(static_cast<std::size_t>(tensor.numel()));
  tensor.copy_to_host(values.data(), tensor.bytes());
  return values;
}

/// Everything that a model could see of some batches, rows end to end.
struct Seen {
  std::vector<std::int32_t> tokens, targets, positions;
  std::vector<float> weight;
  std::vector<std::int64_t> ids;
  std::vector<double> step_weights;
  bool operator==(const Seen&) const = default;
  void add(const std::vector<Batch>& batches) {
    const auto extend = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    for (const auto& batch : batches) {
      extend(tokens, host<std::int32_t>(batch.stream("tokens")));
      extend(targets, host<std::int32_t>(batch.stream("targets")));
      extend(weight, host<float>(batch.stream("weight")));
      extend(positions, host<std::int32_t>(batch.space().positions));
      extend(ids, host<std::int64_t>(batch.space().sample_ids));
    }
    step_weights.push_back(batches.at(0).step_weight);
  }
};

class Loader : public ::testing::Test {
 protected:
  void SetUp() override {
    documents_ = counting(60, 1);
    write_dataset(folder_ / "a", documents_);
    options_.sets = {{folder_ / "a", 1}};
    options_.sequence_length = 16, options_.batch_size = 3, options_.micro_batch = 2;
    options_.prefetch = 0, options_.seed = 9;
  }
  std::unique_ptr<DataSource> source() {
    return std::make_unique<DataSource>(options_, TokenizerIdentity{"t", vocabulary}, device_);
  }
  Seen run(int steps) {
    const auto s = source();
    Seen seen;
    for (int i = 0; i < steps; ++i) seen.add(s->next());
    return seen;
  }
  std::string refusal() {
    return error_of(Fault::input, [&] { source(); });
  }
  std::int64_t total() const {
    std::int64_t n = 0;
    for (const auto& d : documents_) n += static_cast<std::int64_t>(d.size());
    return n;
  }
  TempFolder folder_;
  Documents documents_;
  DataOptions options_;
  std::shared_ptr<Device> device_ = make_cpu_device(1);
};

TEST_F(Loader, ABatchIsWellFormed) {
  const auto s = source();
  const auto batches = s->next();
  ASSERT_EQ(batches.size(), 2u);
  double weight = 0;
  std::int64_t id = 0;
  for (std::size_t b = 0; b < 2; ++b) {
    const Space& space = batches[b].space();
    const std::int64_t rows = b == 0 ? 32 : 16;  // 3 samples in microbatches of 2
    EXPECT_EQ(space.capacity, rows);
    EXPECT_EQ(space.used(), rows);
    EXPECT_EQ(space.longest, 16);
    EXPECT_EQ(host<std::int32_t>(space.starts), space.host_starts);
    EXPECT_EQ(space.past, std::vector<std::int32_t>(static_cast<std::size_t>(space.sequences()), 0));
    EXPECT_TRUE(std::is_sorted(space.host_starts.begin(), space.host_starts.end()));
    const auto positions = host<std::int32_t>(space.positions);
    for (std::int64_t q = 0; q < space.sequences(); ++q) {
      const auto i = static_cast<std::size_t>(q);
      EXPECT_GT(space.host_starts[i + 1], space.host_starts[i]);
      for (std::int32_t t = space.host_starts[i]; t < space.host_starts[i + 1]; ++t) {
        EXPECT_EQ(positions[static_cast<std::size_t>(t)], t - space.host_starts[i]);
      }
    }
    for (const std::int64_t got : host<std::int64_t>(space.sample_ids)) EXPECT_EQ(got, id++);
    for (const float w : host<float>(batches[b].stream("weight"))) weight += w;
    EXPECT_EQ(batches[b].stream("tokens").shape(), Dims{rows});
    EXPECT_EQ(batches[b].stream("targets").dtype(), DType::i32);
  }
  EXPECT_EQ(batches[0].step_weight, weight);
  EXPECT_EQ(batches[1].step_weight, weight);
}

// A period of samples is cut from one epoch and holds no token twice; over periods every token comes equally often, give
// or take one. A token's target is its successor in the document, or nothing at the end of one.
TEST_F(Loader, AnEpochCoversEveryTargetOnce) {
  const Seen seen = run(300);
  const auto period = static_cast<std::size_t>(total() / 16 * 16);
  constexpr std::size_t periods = 3;
  ASSERT_GT(seen.tokens.size(), periods * period);
  std::set<std::int32_t> last;
  for (const auto& d : documents_) last.insert(d.back());
  std::map<std::int32_t, int> count;
  std::vector<std::vector<std::int32_t>> orders;
  for (std::size_t e = 0; e < periods; ++e) {
    const auto begin = seen.tokens.begin() + static_cast<std::ptrdiff_t>(e * period);
    orders.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(period));
    for (const std::int32_t token : orders.back()) ++count[token];
    if (e == 0) { EXPECT_EQ(count.size(), period); }
  }
  EXPECT_EQ(count.size(), static_cast<std::size_t>(total()));
  for (const auto& [token, n] : count) EXPECT_TRUE(n == 2 || n == 3) << token << " came " << n << " times";
  EXPECT_NE(orders[0], orders[1]);
  for (std::size_t t = 0; t < seen.tokens.size(); ++t) {
    const bool end = last.contains(seen.tokens[t]);
    EXPECT_EQ(seen.targets[t], end ? -1 : seen.tokens[t] + 1);
    EXPECT_EQ(seen.weight[t], end ? 0.0f : 1.0f);
  }
}

// Tokens of one long document tell where in it they stand: samples of a batch must come from all over it.
TEST_F(Loader, ABatchComesFromAllOverAnEpoch) {
  write_dataset(folder_ / "long", counting(2, 3, 0, 60000));
  options_.sets = {{folder_ / "long", 1}};
  options_.batch_size = options_.micro_batch = 32;
  const Seen seen = run(1);
  int neighbours = 0;
  for (std::size_t t = 16; t < seen.tokens.size(); t += 16) neighbours += std::abs(seen.tokens[t] - seen.tokens[t - 16]) <= 32;
  EXPECT_LE(neighbours, 3);
}

TEST(Shuffled, IsAPermutationThatItsNameFixes) {
  for (const std::int64_t n : {1, 2, 3, 16, 17, 100, 4097}) {
    std::set<std::int64_t> seen;
    int moved = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t to = shuffled(Rng(5, "a"), n, i);
      EXPECT_TRUE(to >= 0 && to < n && seen.insert(to).second) << n << " " << i;
      moved += to != shuffled(Rng(6, "a"), n, i);
    }
    if (n >= 16) { EXPECT_GT(moved, n / 2); }
  }
}

TEST_F(Loader, SequencesAreDocumentsCutAtSamples) {
  const auto s = source();
  std::set<std::int32_t> first;
  for (const auto& d : documents_) first.insert(d.front());
  for (int i = 0; i < 30; ++i) {
    for (const auto& batch : s->next()) {
      const auto tokens = host<std::int32_t>(batch.stream("tokens"));
      const auto& starts = batch.space().host_starts;
      const std::set<std::int32_t> begins(starts.begin(), starts.end());
      for (std::int32_t t = 0; t < static_cast<std::int32_t>(tokens.size()); ++t) {
        const std::int32_t token = tokens[static_cast<std::size_t>(t)];
        EXPECT_EQ(begins.contains(t), t % 16 == 0 || first.contains(token)) << "row " << t;
        if (!begins.contains(t)) {
          EXPECT_EQ(token, tokens[static_cast<std::size_t>(t) - 1] + 1);
        }
      }
    }
  }
}

TEST_F(Loader, AcrossDocumentsTheStreamIsOne) {
  options_.attend_across_documents = true;
  const auto s = source();
  Seen seen;
  for (int i = 0; i < 100; ++i) {
    const auto batches = s->next();
    for (const auto& batch : batches) {
      std::vector<std::int32_t> expected;
      for (std::int32_t t = 0; t <= batch.space().capacity; t += 16) expected.push_back(t);
      EXPECT_EQ(batch.space().host_starts, expected);
    }
    seen.add(batches);
  }
  ASSERT_GT(seen.tokens.size(), static_cast<std::size_t>(2 * total()));
  std::set<std::int32_t> first;
  for (const auto& d : documents_) first.insert(d.front());
  for (std::size_t t = 0; t < seen.tokens.size(); ++t) {
    if (t % 16 != 15) {
      EXPECT_EQ(seen.targets[t], seen.tokens[t + 1]) << t;
    } else {  // its successor is in another sample
      EXPECT_TRUE(seen.targets[t] == seen.tokens[t] + 1 || first.contains(seen.targets[t])) << t;
    }
  }
  EXPECT_EQ(std::count(seen.weight.begin(), seen.weight.end(), 1.0f), static_cast<std::ptrdiff_t>(seen.weight.size()));
}

TEST_F(Loader, SamplesDoNotDependOnTheCutIntoBatches) {
  options_.batch_size = 12, options_.micro_batch = 12;
  const Seen reference = run(10);
  for (const std::int64_t micro : {1, 5, 7, 100}) {
    options_.micro_batch = micro;
    EXPECT_EQ(run(10) == reference, true) << micro;
  }
  options_.batch_size = 3;
  Seen small = run(40);
  EXPECT_EQ(std::accumulate(small.step_weights.begin(), small.step_weights.end(), 0.0),
            std::accumulate(reference.step_weights.begin(), reference.step_weights.end(), 0.0));
  small.step_weights = reference.step_weights;
  EXPECT_EQ(small == reference, true);
}

TEST_F(Loader, TheSeedDecidesTheOrder) {
  const Seen a = run(20), again = run(20);
  EXPECT_EQ(a == again, true);
  options_.seed = 10;
  EXPECT_EQ(run(20) == a, false);
}

TEST_F(Loader, BlendsKeepTheirProportions) {
  write_dataset(folder_ / "b", counting(30, 2, 10000)), write_dataset(folder_ / "c", counting(30, 3, 20000));
  options_.sets = {{folder_ / "a", 3}, {folder_ / "b", 1}, {folder_ / "c", 0.5}};
  options_.batch_size = 1;
  const auto s = source();
  std::vector<std::int64_t> counts(3);
  std::vector<std::vector<std::int32_t>> streams(3);
  for (int n = 1; n <= 900; ++n) {
    const auto tokens = host<std::int32_t>(s->next().at(0).stream("tokens"));
    const auto set = static_cast<std::size_t>(tokens[0] / 10000);
    for (const std::int32_t token : tokens)
      EXPECT_EQ(static_cast<std::size_t>(token / 10000), set);  // a sample is of one set
    ++counts[set];
    streams[set].insert(streams[set].end(), tokens.begin(), tokens.end());
    for (std::size_t d = 0; d < 3; ++d) {
      EXPECT_NEAR(static_cast<double>(counts[d]), n * options_.sets[d].weight / 4.5, 1.5) << n;
    }
  }
  EXPECT_EQ(s->cursor().counts, counts);
  // Each set goes on where it stopped: the same samples as alone, where it is set 0 (the order is by place in the list).
  options_.sets = {{folder_ / "a", 1}};
  const auto alone = run(static_cast<int>(counts[0])).tokens;
  EXPECT_EQ(alone == streams[0], true);
}

TEST_F(Loader, TheSplitIsDisjointAndFixed) {
  options_.validation = 0.1;
  const auto s = source();
  EXPECT_EQ(s->validation_documents(), 6);
  EXPECT_EQ(s->train_documents(), 54);
  EXPECT_EQ(s->train_tokens() + s->validation_tokens(), total());
  EXPECT_THAT(s->describe(), AllOf(HasSubstr("in 54 documents"), HasSubstr("in 6 for validation")));
  Seen validation, train;
  const auto batches = s->validation(1000);
  const std::int64_t micro = options_.micro_batch, all = (s->validation_samples() + micro - 1) / micro;
  EXPECT_EQ(static_cast<std::int64_t>(batches.size()), all);
  validation.add(batches);
  std::set<std::int32_t> held_out;
  double weight = 0;
  for (std::size_t t = 0; t < validation.tokens.size(); ++t) {
    const bool dead = static_cast<std::int64_t>(t) >= s->validation_tokens();
    if (!dead) {
      EXPECT_TRUE(held_out.insert(validation.tokens[t]).second);  // each once
    } else {
      EXPECT_EQ(validation.weight[t], 0.0f);
      EXPECT_EQ(validation.targets[t], -1);
    }
    weight += validation.weight[t];
  }
  EXPECT_EQ(static_cast<std::int64_t>(held_out.size()), s->validation_tokens());
  EXPECT_EQ(batches.back().step_weight, weight);
  EXPECT_EQ(weight, static_cast<double>(s->validation_tokens() - 6));  // all but the documents' ends
  EXPECT_EQ(batches.back().space().capacity, 32);
  EXPECT_EQ(batches.back().space().used(), s->validation_tokens() - 32 * (all - 1));
  for (int i = 0; i < 60; ++i) train.add(s->next());
  for (const std::int32_t token : train.tokens) EXPECT_FALSE(held_out.contains(token));

  // Neither the seed nor what training has done changes it; fewer samples are the first ones.
  Seen again, first, other;
  again.add(s->validation(1000));
  EXPECT_EQ(again == validation, true);
  first.add(s->validation(2 * micro));
  EXPECT_EQ(std::equal(first.tokens.begin(), first.tokens.end(), validation.tokens.begin()), true);
  EXPECT_EQ(first.tokens.size(), 64u);
  options_.seed = 77;
  other.add(source()->validation(1000));
  EXPECT_EQ(other == validation, true);
}

TEST_F(Loader, ValidationBlendsUntilSetsEnd) {
  write_dataset(folder_ / "b", counting(200, 2, 10000));
  options_.sets = {{folder_ / "a", 1}, {folder_ / "b", 1}};
  options_.validation = 0.2;
  const auto s = source();
  Seen seen;
  seen.add(s->validation(s->validation_samples()));
  EXPECT_EQ(static_cast<double>(std::count(seen.weight.begin(), seen.weight.end(), 1.0f)),
            static_cast<double>(s->validation_tokens() - s->validation_documents()));
  EXPECT_TRUE(s->validation(0).empty());
  options_.validation = 0;
  EXPECT_TRUE(source()->validation(5).empty());
  EXPECT_EQ(source()->validation_tokens(), 0);
}

TEST_F(Loader, ACursorResumesExactly) {
  write_dataset(folder_ / "b", counting(30, 2, 10000));
  options_.sets = {{folder_ / "a", 2}, {folder_ / "b", 1}};
  options_.validation = 0.1;
  const Seen straight = run(80);  // beyond one epoch
  for (const int prefetch : {0, 1, 4}) {
    options_.prefetch = prefetch;
    EXPECT_EQ(run(80) == straight, true) << prefetch;
    Seen parts;
    std::string cursor;
    {
      const auto s = source();
      for (int i = 0; i < 40; ++i) parts.add(s->next());
      EXPECT_EQ(s->cursor().sample, 40 * 3);  // not what the thread has fetched
      cursor = s->cursor().to_json();
      for (int i = 0; i < 5; ++i) s->next();  // lost work
    }
    const auto s = source();
    s->next();
    s->validation(3);
    s->seek(DataCursor::from_json(cursor));
    EXPECT_EQ(s->cursor().to_json(), cursor);
    for (int i = 0; i < 40; ++i) parts.add(s->next());
    EXPECT_EQ(parts == straight, true) << prefetch;
  }
}

// A run may go on with another batch size: the cursor counts samples.
TEST_F(Loader, ACursorOutlivesTheBatchSize) {
  const Seen straight = run(40);
  const auto before = source();
  Seen parts;
  for (int i = 0; i < 20; ++i) parts.add(before->next());
  options_.batch_size = 6, options_.micro_batch = 4;
  const auto after = source();
  after->seek(before->cursor());
  for (int i = 0; i < 10; ++i) parts.add(after->next());
  EXPECT_EQ(parts.tokens == straight.tokens && parts.ids == straight.ids, true);
}

TEST_F(Loader, CursorsOfOtherDataAreRefused) {
  const auto s = source();
  s->next();
  const DataCursor good = s->cursor();
  const auto refused = [&](auto&& change) {
    DataCursor c = good;
    change(c);
    return error_of(Fault::input, [&] { s->seek(c); });
  };
  EXPECT_THAT(refused([](DataCursor& c) { c.sequence_length = 8; }), AllOf(HasSubstr("[sequence_length]"), HasSubstr("expected 8, as its checkpoint has")));
  EXPECT_THAT(refused([](DataCursor& c) { c.tokens[0] += 1; }), HasSubstr("training tokens"));
  EXPECT_THAT(refused([](DataCursor& c) { c.counts.push_back(0), c.tokens.push_back(5); }), HasSubstr("datasets"));
  EXPECT_THAT(refused([](DataCursor& c) { c.sample += 1; }), HasSubstr("add up"));
  EXPECT_THAT(refused([](DataCursor& c) { c.counts[0] = -5; }), HasSubstr("damaged"));
  EXPECT_THAT(refused([](DataCursor& c) { c.counts[0] = INT64_MAX; }), HasSubstr("damaged"));
  for (const char* text : {"", "[]", "{\"sample\": 1}", "{\"sample\": \"x\"}"}) {
    EXPECT_THAT(error_of(Fault::input, [&] { DataCursor::from_json(text); }), HasSubstr("damaged"));
  }
  EXPECT_EQ(s->cursor() == good, true);
}

// Whoever read a recipe says where its keys are; a checkpoint's folder says where its cursor is.
TEST_F(Loader, RefusalsBeginWithTheKeysPlace) {
  const auto refused = [&](auto&& change, const char* checkpoint = "data cursor") {
    const auto s = source();
    DataCursor c = s->cursor();
    change(c);
    return error_of(Fault::input, [&] { s->seek(c, checkpoint); });
  };
  options_.where = [](const std::string& name) { return "r.yaml:7, data." + name; };
  EXPECT_THAT(refused([](DataCursor& c) { c.sequence_length = 8; }), StartsWith("[r.yaml:7, data.sequence_length] the run has trained on"));
  EXPECT_THAT(refused([](DataCursor& c) { c.tokens[0] += 1; }), StartsWith("[r.yaml:7, data.sets] the run has trained on"));
  EXPECT_THAT(refused([](DataCursor& c) { c.counts.push_back(0), c.tokens.push_back(5); }), StartsWith("[r.yaml:7, data.sets]"));
  EXPECT_THAT(refused([](DataCursor& c) { c.sample += 1; }, "step_000010"), StartsWith("[step_000010] the data's cursor is damaged"));
  EXPECT_THAT(error_of(Fault::input, [] { DataCursor::from_json("", "step_000010"); }), StartsWith("[step_000010] the data's cursor is damaged"));
  options_.sequence_length = 1 << 30, options_.micro_batch = options_.batch_size = 4;
  EXPECT_THAT(refusal(), StartsWith("[r.yaml:7, data.micro_batch]"));
  options_.sequence_length = 1;
  write_dataset(folder_ / "ones", Documents(100, {5}));
  options_.sets = {{folder_ / "ones", 1}};
  EXPECT_THAT(error_of(Fault::input, [&] { source()->next(); }), StartsWith("[r.yaml:7, data.attend_across_documents] no row of this batch"));
}

TEST_F(Loader, WhatCannotBeTrainedOnIsRefused) {
  const DataOptions good = options_;
  options_.sequence_length = total();
  EXPECT_THAT(refusal(), AllOf(HasSubstr("too few"), HasSubstr("sequence_length")));
  options_.sequence_length = total() - 1;
  source();
  options_ = good, options_.validation = 0.999;
  EXPECT_THAT(refusal(), AllOf(HasSubstr("60 documents cannot be split"), HasSubstr("--format lines")));
  options_.validation = 1;
  EXPECT_THAT(refusal(), HasSubstr("share"));
  options_ = good, options_.sets[0].weight = 0;
  EXPECT_THAT(refusal(), HasSubstr("weight"));
  options_ = good, options_.sets.clear();
  EXPECT_THAT(refusal(), HasSubstr("data build"));
  options_ = good, options_.micro_batch = 0;
  EXPECT_THAT(refusal(), HasSubstr("micro_batch"));
  options_ = good, options_.sequence_length = 1 << 30, options_.micro_batch = options_.batch_size = 4;
  EXPECT_THAT(refusal(), HasSubstr("2^31"));
  options_ = good;
  write_dataset(folder_ / "hollow", {{}, {}});
  options_.sets = {{folder_ / "hollow", 1}};
  EXPECT_THAT(refusal(), HasSubstr("no document has any token"));
  write_dataset(folder_ / "ones", Documents(100, {5}));
  options_.sets = {{folder_ / "ones", 1}};
  EXPECT_THAT(error_of(Fault::input, [&] { source()->next(); }), HasSubstr("single token"));
}

TEST_F(Loader, AnotherTokenizerIsRefused) {
  Sidecar sidecar;
  sidecar.tokenizer = "t", sidecar.vocabulary = vocabulary, sidecar.documents = 60, sidecar.tokens = total();
  write_file(folder_ / "a.json", sidecar.to_json());
  source();
  sidecar.vocabulary = 256;
  write_file(folder_ / "a.json", sidecar.to_json());
  EXPECT_THAT(refusal(), AllOf(HasSubstr("'t' (256 words)"), HasSubstr("'t' (100000 words)")));
  sidecar.vocabulary = vocabulary, sidecar.tokenizer = "other";
  write_file(folder_ / "a.json", sidecar.to_json());
  EXPECT_THAT(refusal(), HasSubstr("--tokenizer t"));
}

TEST_F(Loader, ErrorsOfTheThreadSurface) {
  documents_ = counting(200, 1);
  documents_[150][0] = vocabulary;
  write_dataset(folder_ / "bad", documents_);
  options_.sets = {{folder_ / "bad", 1}};
  for (const int prefetch : {0, 3}) {
    options_.prefetch = prefetch;
    const auto s = source();
    const DataCursor start = s->cursor();
    int steps = 0;
    std::string message;
    DataCursor last;
    while (message.empty() && steps < 1000) {
      try {
        s->next();
        ++steps;
        last = s->cursor();
      } catch (const Error& e) {
        message = e.what();
      }
    }
    EXPECT_GT(steps, 0);
    EXPECT_THAT(message, AllOf(HasSubstr("bad.bin"), HasSubstr("got 100000")));
    EXPECT_EQ(error_of(Fault::input, [&] { s->next(); }), message);
    EXPECT_EQ(s->cursor() == last, true);
    s->seek(start);
    s->next();
  }
}

TEST_F(Loader, TheThreadEndsWithItsSource) {
  options_.prefetch = 3;
  for (int i = 0; i < 40; ++i) {
    const auto s = source();
    for (int k = 0; k < i % 4; ++k) s->next();
    if (i % 3 == 0) s->seek(s->cursor());
  }
}

}  // namespace
}  // namespace capstan::data
