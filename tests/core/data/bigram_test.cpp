// The bigram baseline against its definition, written out.
#include "data/bigram.h"

#include <cmath>
#include <map>
#include <random>
#include <utility>

#include "helpers.h"

namespace capstan::data {
namespace {

TEST(Bigram, IsTheSmoothedCountOfPairs) {
  const TempFolder folder;
  std::mt19937 random(4);
  Documents documents;
  for (int d = 0; d < 80; ++d) {
    std::vector<std::int32_t> document{0};
    for (unsigned i = 0; i < random() % 200; ++i) {
      document.push_back(static_cast<std::int32_t>((document.back() + (random() % 4 ? 1 : 3)) % 11));
    }
    documents.push_back(document);
  }
  write_dataset(folder / "a", documents);
  DataOptions options;
  options.sets = {{folder / "a", 1}};
  options.sequence_length = 32, options.batch_size = options.micro_batch = 4, options.validation = 0.2, options.prefetch = 0;
  DataSource source(options, {"t", 12}, make_cpu_device(1));

  std::map<std::pair<int, int>, double> pairs;
  std::map<int, double> firsts;
  for (const std::uint32_t d : source.train_streams()[0].documents()) {
    for (std::size_t i = 0; i + 1 < documents[d].size(); ++i) {
      ++pairs[{documents[d][i], documents[d][i + 1]}], ++firsts[documents[d][i]];
    }
  }
  for (const std::int64_t samples : {4, 1000}) {
    double sum = 0, count = 0;
    for (const auto& batch : source.validation(samples)) {
      const auto n = static_cast<std::size_t>(batch.stream("tokens").numel());
      for (std::size_t t = 0; t < n; ++t) {
        if (batch.stream("weight").data<float>()[t] == 0) continue;
        const int a = batch.stream("tokens").data<std::int32_t>()[t], b = batch.stream("targets").data<std::int32_t>()[t];
        sum -= std::log((pairs[{a, b}] + 1) / (firsts[a] + 12)), ++count;
      }
    }
    const auto entropy = bigram_cross_entropy(source, samples);
    ASSERT_TRUE(entropy.has_value());
    EXPECT_NEAR(*entropy, sum / count, 1e-12);
    EXPECT_LT(*entropy, 1.0);  // two successors, 3 : 1, have 0.56
    EXPECT_GT(*entropy, 0.5);
  }
  const auto sampled = bigram_cross_entropy(source, 1000, 200);
  ASSERT_TRUE(sampled.has_value());
  EXPECT_NE(*sampled, *bigram_cross_entropy(source, 1000));
  EXPECT_LT(*sampled, 1.2);
}

TEST(Bigram, HasNoAnswerWithoutValidationOrWithManyWords) {
  const TempFolder folder;
  write_dataset(folder / "a", Documents(20, {1, 2, 3, 4, 5}));
  DataOptions options;
  options.sets = {{folder / "a", 1}};
  options.sequence_length = 8, options.batch_size = options.micro_batch = 1, options.prefetch = 0;
  DataSource without(options, {"t", 12}, make_cpu_device(1));
  EXPECT_FALSE(bigram_cross_entropy(without, 5).has_value());
  options.validation = 0.1;
  DataSource many(options, {"t", 4097}, make_cpu_device(1));
  EXPECT_FALSE(bigram_cross_entropy(many, 5).has_value());
  options.attend_across_documents = true;
  DataSource across(options, {"t", 12}, make_cpu_device(1));
  EXPECT_TRUE(bigram_cross_entropy(across, 5).has_value());
}

}  // namespace
}  // namespace capstan::data
