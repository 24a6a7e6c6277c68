// Context parallelism: the head-tail cut, and attention over sequences that ranks share: rows to the bit, gradients by sum.
#include "core/parallel/support.h"
#include "parallel/context_cut.h"

#include <capstan/autograd.h>
#include <capstan/nn.h>

#include <gmock/gmock.h>
#include <support/tolerance.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace capstan::parallel_test {
namespace {

std::vector<std::int32_t> starts_of(const std::vector<std::int32_t>& lengths) {
  std::vector<std::int32_t> starts{0};
  for (const std::int32_t n : lengths) starts.push_back(starts.back() + n);
  return starts;
}

const std::vector<std::vector<std::int32_t>> some_lengths{
    {16}, {1}, {1, 1, 1, 1, 1, 1, 1}, {7, 1, 13, 4, 130}, {64, 65, 63}, {300}, {5, 0, 3}};

TEST(ContextCut, EveryRowIsOnOneRankInOrder) {
  for (const auto& lengths : some_lengths)
    for (const int size : {1, 2, 3, 4, 8})
      for (const int tensor : {1, 3}) {
        const auto starts = starts_of(lengths);
        const std::int64_t capacity = starts.back() + 2;
        std::vector<int> held(static_cast<std::size_t>(starts.back()), 0);
        std::int64_t local_capacity = -1;
        for (int rank = 0; rank < size; ++rank) {
          const auto cut = parallel::cut_sequences(starts, capacity, size, rank, tensor);
          local_capacity = rank == 0 ? cut->capacity : local_capacity;
          EXPECT_EQ(cut->capacity, local_capacity);  // ranks gather equally many rows
          EXPECT_EQ(cut->capacity % tensor, 0);
          const auto source = cut->source();
          ASSERT_EQ(static_cast<std::int64_t>(source.size()), cut->capacity);
          for (std::size_t s = 0; s < lengths.size(); ++s)
            for (std::int32_t i = cut->local_starts[s]; i < cut->local_starts[s + 1]; ++i) {
              const std::int32_t row = source[static_cast<std::size_t>(i)];
              ASSERT_GE(row, starts[s]);
              ASSERT_LT(row, starts[s + 1]);
              if (i > cut->local_starts[s]) {
                ASSERT_GT(row, source[static_cast<std::size_t>(i) - 1]);
              }
              ++held[static_cast<std::size_t>(row)];
            }
          for (auto i = static_cast<std::size_t>(cut->local_starts.back()); i < source.size(); ++i) EXPECT_EQ(source[i], -1);
        }
        EXPECT_THAT(held, testing::Each(1)) << size << " ranks";
      }
}

TEST(ContextCut, RanksLookAtEquallyManyKeys) {
  for (const int size : {2, 4, 8}) {
    const std::vector<std::int32_t> starts{0, 1024};
    std::vector<double> pairs(static_cast<std::size_t>(size), 0);
    const auto cut = parallel::cut_sequences(starts, 1024, size, 0, 1);
    EXPECT_EQ(cut->capacity, 1024 / size);
    for (const auto& c : cut->chunks)
      for (int i = 0; i < c.length; ++i) pairs[static_cast<std::size_t>(c.rank)] += c.offset + i + 1;
    EXPECT_THAT(pairs, testing::Each(pairs[0])) << size;
  }
}

TEST(ContextCut, ManyShortSequencesBurdenNoRank) {
  std::vector<std::int32_t> lengths;
  for (int i = 0; i < 200; ++i) lengths.push_back(1 + i % 5);
  const auto starts = starts_of(lengths);
  for (const int size : {2, 4, 8}) {
    const auto cut = parallel::cut_sequences(starts, starts.back(), size, 0, 1);
    std::vector<int> rows(static_cast<std::size_t>(size), 0);
    for (const auto& c : cut->chunks) rows[static_cast<std::size_t>(c.rank)] += c.length;
    EXPECT_LE(*std::max_element(rows.begin(), rows.end()), 1.2 * starts.back() / size) << size;
  }
}

TEST(ContextCut, RowsKeepTheirPlaceInTheWhole) {
  const auto device = make_cpu_device(1);
  std::vector<std::int32_t> tokens(12), targets(12);
  std::iota(tokens.begin(), tokens.end(), 100), std::iota(targets.begin(), targets.end(), 101);
  const std::vector<std::int32_t> lengths{8, 3};
  const Batch whole = make_batch(*device, tokens, lengths, targets, {}, 500), local = parallel::cut_context(whole, 2, 1, 1);
  ASSERT_EQ(local.space().capacity, 6);
  ASSERT_NE(local.space().cut, nullptr);
  EXPECT_EQ(local.step_weight, whole.step_weight);
  // Chunks 1 and 2 of four: rows 2..5 of the first sequence; of three rows, rounding turned by one, its second.
  const std::vector<double> rows{2, 3, 4, 5, 9}, positions{2, 3, 4, 5, 1};
  const auto with = [](std::vector<double> v, double add, double dead) {
    for (double& x : v) x += add;
    v.push_back(dead);
    return v;
  };
  EXPECT_EQ(host(local.stream("tokens")), with(rows, 100, 0));
  EXPECT_EQ(host(local.stream("targets")), with(rows, 101, -1));
  EXPECT_EQ(host(local.stream("weight")), (std::vector<double>{1, 1, 1, 1, 1, 0}));
  EXPECT_EQ(host(local.space().positions), with(positions, 0, 0));
  EXPECT_EQ(host(local.space().sample_ids), with(rows, 500, 0));
  EXPECT_EQ(local.space().host_starts, (std::vector<std::int32_t>{0, 4, 5}));
}

struct Whole {
  std::vector<double> out, dq, dk, dv;
  double flop = 0;  ///< of the forward, all ranks
};

/// Attention of these sequences by `size` ranks, put together again; one rank when size is 1.
Whole attend(const std::vector<std::int32_t>& lengths, int size, DType dtype, const ops::AttentionShape& shape) {
  const auto starts = starts_of(lengths);
  const std::int64_t rows = starts.back(), qw = shape.heads * shape.head_size, kw = shape.kv_heads * shape.head_size;
  Whole whole;
  whole.out.resize(static_cast<std::size_t>(rows * qw)), whole.dq = whole.out;
  whole.dk.resize(static_cast<std::size_t>(rows * kw)), whole.dv = whole.dk;
  std::mutex mutex;
  run_ranks(size, [&](std::shared_ptr<World> world) {
    const Rank rank(world, 1, size);
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(rows), 0);
    const Batch batch = parallel::cut_context(make_batch(*rank.device, tokens, lengths), size, world->rank(), 1);
    ForwardContext context(batch, *rank.device, dtype);
    context.mesh = rank.mesh.get();
    std::vector<std::int32_t> source(static_cast<std::size_t>(rows));
    std::iota(source.begin(), source.end(), 0);
    if (batch.space().cut) source = batch.space().cut->source();
    const auto local = static_cast<std::int64_t>(source.size());
    const auto pick = [&](const std::string& name, std::int64_t width) {
      const std::vector<double> all = noise(name, rows * width);
      std::vector<double> mine(static_cast<std::size_t>(local * width), 0.25);  // what dead rows hold does not matter
      for (std::int64_t i = 0; i < local; ++i)
        for (std::int64_t c = 0; c < width && source[static_cast<std::size_t>(i)] >= 0; ++c)
          mine[static_cast<std::size_t>(i * width + c)] =
              all[static_cast<std::size_t>(source[static_cast<std::size_t>(i)] * width + c)];
      return tensor(mine, Dims{local, width}, dtype, *rank.device);
    };
    const Tensor q = make_leaf(pick("q", qw), false), k = make_leaf(pick("k", kw), false),
                 v = make_leaf(pick("v", kw), false);
    rank.device->record(true);
    const Tensor out = nn::attention(context, q, k, v, shape);
    rank.device->record(false);
    Tensor g = pick("g", qw);
    for (std::int64_t i = 0; i < local; ++i)
      if (source[static_cast<std::size_t>(i)] < 0) g.narrow(0, i, 1).fill(0);
    const Tensor roots[] = {out}, grads[] = {g};
    backward(roots, grads);
    const auto put = [&](const Tensor& t, std::vector<double>& to) {
      const std::vector<double> values = host(t);
      const std::int64_t width = t.size(1);
      for (std::int64_t i = 0; i < local; ++i)
        for (std::int64_t c = 0; c < width; ++c) {
          const double x = values[static_cast<std::size_t>(i * width + c)];
          if (source[static_cast<std::size_t>(i)] >= 0) {
            to[static_cast<std::size_t>(source[static_cast<std::size_t>(i)] * width + c)] = x;
          } else {
            EXPECT_EQ(x, 0) << "a dead row";
          }
        }
    };
    const auto grad = [](const Tensor& t) { return static_cast<Leaf*>(t.node().get())->grad(); };
    const std::lock_guard lock(mutex);
    for (const OpRecord& op : rank.device->ledger())
      if (op.name == "attention") whole.flop += op.cost.flop;
    put(out, whole.out), put(grad(q), whole.dq), put(grad(k), whole.dk), put(grad(v), whole.dv);
  });
  return whole;
}

double difference(const std::vector<double>& a, const std::vector<double>& b) {
  double d = 0, n = 0;
  for (std::size_t i = 0; i < a.size(); ++i) d += (a[i] - b[i]) * (a[i] - b[i]), n += b[i] * b[i];
  return std::sqrt(d / std::max(n, 1e-6 * static_cast<double>(b.size())));  // one key alone: its gradient is 0
}

class ContextAttention : public testing::TestWithParam<DType> {};

TEST_P(ContextAttention, RowsHaveTheBitsOfOneRankAndGradientsTheirSum) {
  const DType dtype = GetParam();
  const double tolerance = bounds::attention_parts(dtype);
  for (const auto& lengths : some_lengths)
    for (const ops::AttentionShape& shape : {ops::AttentionShape{2, 2, 8, 0}, ops::AttentionShape{4, 1, 20, 0.3}, ops::AttentionShape{2, 1, 8, 0, 5},
                                             ops::AttentionShape{2, 2, 8, 0, 70}}) {
      const Whole one = attend(lengths, 1, dtype, shape);
      for (const int size : {2, 3, 4}) {
        const Whole several = attend(lengths, size, dtype, shape);
        EXPECT_EQ(several.out, one.out) << size << " ranks, " << lengths.size() << " sequences";
        EXPECT_NEAR(several.flop, one.flop, 1e-9 * one.flop) << size;
        EXPECT_LE(difference(several.dq, one.dq), tolerance) << size;
        EXPECT_LE(difference(several.dk, one.dk), tolerance) << size;
        EXPECT_LE(difference(several.dv, one.dv), tolerance) << size;
      }
    }
}

INSTANTIATE_TEST_SUITE_P(Types, ContextAttention, testing::Values(DType::f64, DType::f32, DType::bf16),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(ContextAttentionErrors, ABatchThatWasCutNeedsItsRanks) {
  const auto device = make_cpu_device(1);
  const std::vector<std::int32_t> tokens(8, 0), lengths{8};
  const Batch batch = parallel::cut_context(make_batch(*device, tokens, lengths), 2, 0, 1);
  ForwardContext context(batch, *device, DType::f32);
  const Tensor x = Tensor::zeros(Dims{4, 8}, DType::f32, *device);
  try {
    nn::attention(context, x, x, x, {1, 1, 8, 0});
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("cut over 2 context ranks, the forward has 1"));
  }
  EXPECT_THROW(ops::attention(x, x, x, batch.space(), {1, 1, 8, 0}), Error);  // it would take the parts for whole sequences
}

}  // namespace
}  // namespace capstan::parallel_test
