// Ranks that share the samples of a step: together they see what one rank sees, each sample once.
#include "data/loader.h"

#include <capstan/error.h>

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include "helpers.h"

namespace capstan::data {
namespace {

/// What a sample's rows are, by their address: token, target, weight. Rows without weight are left out.
using Rows3 = std::map<std::int64_t, std::tuple<std::int32_t, std::int32_t, float>>;

template <class T>
std::vector<T> host(const Tensor& tensor) {
  std::vector<T> values(static_cast<std::size_t>(tensor.numel()));
  tensor.copy_to_host(values.data(), tensor.bytes());
  return values;
}

int add(const std::vector<Batch>& batches, Rows3& to) {
  int twice = 0;
  for (const Batch& b : batches) {
    const auto tokens = host<std::int32_t>(b.stream("tokens")), targets = host<std::int32_t>(b.stream("targets"));
    const auto weight = host<float>(b.stream("weight"));
    const auto ids = host<std::int64_t>(b.space().sample_ids);
    for (std::size_t i = 0; i < tokens.size(); ++i)
      if (weight[i] > 0) twice += !to.try_emplace(ids[i], tokens[i], targets[i], weight[i]).second;
  }
  return twice;
}

class Ranks : public ::testing::TestWithParam<int> {
 protected:
  Ranks() {
    std::vector<std::vector<std::int32_t>> documents;
    std::int32_t next = 0;
    for (int d = 0; d < 50; ++d) {
      documents.emplace_back(static_cast<std::size_t>(3 + d * 7 % 31));
      std::iota(documents.back().begin(), documents.back().end(), next);
      next += static_cast<std::int32_t>(documents.back().size());
    }
    write_dataset(folder_ / "a", documents);
  }
  std::unique_ptr<DataSource> source(int ranks, int rank) {
    DataOptions o;
    o.sets = {{folder_ / "a", 1}};
    o.sequence_length = 16, o.batch_size = 7, o.micro_batch = 2, o.prefetch = 0, o.seed = 3, o.validation = 0.2;
    o.ranks = ranks, o.rank = rank;
    // Each rank's part of the weight is kept, and every rank is given what they come to in all.
    o.sum_over_ranks = [this](double x) { return asked_ += x, total_ > 0 ? total_ : x; };
    return std::make_unique<DataSource>(o, TokenizerIdentity{"t", 100000}, device_);
  }
  TempFolder folder_;
  std::shared_ptr<Device> device_ = make_cpu_device(1);
  double asked_ = 0, total_ = 0;
};

TEST_P(Ranks, TogetherSeeWhatOneSees) {
  const int ranks = GetParam();
  const auto one = source(1, 0);
  std::vector<std::unique_ptr<DataSource>> many;
  for (int r = 0; r < ranks; ++r) many.push_back(source(ranks, r));
  for (int step = 0; step < 5; ++step) {
    const auto whole = one->next();
    total_ = whole[0].step_weight, asked_ = 0;
    Rows3 expected, seen;
    EXPECT_EQ(add(whole, expected), 0);
    std::size_t count = 0;
    for (int r = 0; r < ranks; ++r) {
      const auto batches = many[static_cast<std::size_t>(r)]->next();
      if (r > 0) {
        EXPECT_EQ(batches.size(), count) << "all ranks make the same number of microbatches";
      }
      count = batches.size();
      for (const Batch& b : batches) {
        EXPECT_EQ(b.step_weight, total_);
        EXPECT_GE(b.space().capacity, 16) << "a rank without a sample has dead rows";
        EXPECT_LE(b.space().capacity, 2 * 16);
      }
      EXPECT_EQ(add(batches, seen), 0) << "no sample twice";
      EXPECT_EQ(many[static_cast<std::size_t>(r)]->cursor(), one->cursor());
    }
    EXPECT_EQ(seen, expected);
    if (ranks > 1) {
      EXPECT_EQ(asked_, total_);
    }
  }
  // Validation too.
  const auto whole = one->validation(6);
  ASSERT_FALSE(whole.empty());
  total_ = whole[0].step_weight;
  Rows3 expected, seen;
  add(whole, expected);
  for (int r = 0; r < ranks; ++r) EXPECT_EQ(add(many[static_cast<std::size_t>(r)]->validation(6), seen), 0);
  EXPECT_EQ(seen, expected);
}

INSTANTIATE_TEST_SUITE_P(Numbers, Ranks, ::testing::Values(1, 2, 3, 4, 8));

}  // namespace
}  // namespace capstan::data
