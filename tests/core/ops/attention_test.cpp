// attention: against softmax(Q K^T) V of each sequence and head; its sequences alone; its paged form.
#include "core/ops/harness.h"

#include <gmock/gmock.h>
#include <sys/resource.h>

#include <cmath>
#include <numeric>

namespace capstan::testing {
namespace {

using Ins = std::span<const Tensor>;
using ::testing::HasSubstr;

Space space_of(const std::vector<std::int32_t>& lengths, std::int64_t capacity) {
  Space space;
  space.host_starts = {0};
  for (std::int32_t n : lengths) space.host_starts.push_back(space.host_starts.back() + n);
  space.capacity = capacity;
  return space;
}

// softmax(scale Q K^T + causal mask) V, one sequence and head at a time; rows past the last sequence are 0.
Tensor plain_attention(const Place& place, const Tensor& q, const Tensor& k, const Tensor& v, const Space& space, const ops::AttentionShape& s) {
  const double scale = s.scale != 0 ? s.scale : 1 / std::sqrt(static_cast<double>(s.head_size));
  std::vector<Tensor> sequences;
  for (std::int64_t i = 0; i < space.sequences(); ++i) {
    const std::int64_t begin = space.host_starts[static_cast<std::size_t>(i)], n = space.host_starts[static_cast<std::size_t>(i) + 1] - begin;
    if (n == 0) continue;
    std::vector<double> mask(static_cast<std::size_t>(n * n), 0.0);
    for (std::int64_t r = 0; r < n; ++r)
      for (std::int64_t c = 0; c < n; ++c)
        if (c > r || (s.window > 0 && r - c >= s.window)) mask[static_cast<std::size_t>(r * n + c)] = -1e30;
    const Tensor causal = make(place.device, mask, Dims{n, n}, place.dtype);
    const auto head = [&](const Tensor& t, std::int64_t h) { return ops::slice(ops::slice(t, 0, begin, n), 1, h * s.head_size, s.head_size); };
    std::vector<Tensor> heads;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const std::int64_t kv = h / (s.heads / s.kv_heads);
      const Tensor scores = ops::scale(ops::matmul(head(q, h), ops::transpose(head(k, kv), 0, 1)), scale);
      heads.push_back(ops::matmul(ops::softmax(ops::add(scores, causal)), head(v, kv)));
    }
    sequences.push_back(ops::concat(heads, 1));
  }
  if (space.used() < q.size(0)) sequences.push_back(Tensor::zeros(Dims{q.size(0) - space.used(), q.size(1)}, q.dtype(), place.device));
  return ops::concat(sequences, 0);
}

/// The most memory that this process had so far, in bytes.
std::int64_t most_resident() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return std::int64_t{1024} * usage.ru_maxrss;
}

struct Layout {
  std::string name;
  std::vector<std::int32_t> lengths;
  std::int64_t dead;
  ops::AttentionShape shape;
  std::int64_t rows() const { return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0}) + dead; }
};

std::vector<Layout> layouts() {
  return {
      {"short", {1, 2}, 0, {1, 1, 16}},
      {"ragged", {1, 63, 64, 65, 130}, 0, {2, 1, 16}},
      {"dead_rows", {3, 70}, 7, {2, 2, 16}},
      {"empty_sequence", {5, 0, 66}, 0, {2, 1, 16}},
      {"grouped", {65, 9}, 0, {4, 2, 64}},
      {"head_80", {64, 66}, 0, {2, 2, 80}},
      {"head_128", {67, 2}, 1, {2, 1, 128}},
      {"scaled", {17, 40}, 0, {3, 1, 16, 0.5}},
      {"three_tiles", {193}, 0, {2, 1, 64}},
      {"window_2", {1, 70, 3}, 2, {2, 1, 16, 0, 2}},
      {"window_7", {1, 63, 65, 20}, 0, {2, 2, 16, 0, 7}},
      {"window_63", {130, 62}, 0, {2, 1, 16, 0, 63}},
      {"window_64", {193}, 0, {2, 1, 64, 0, 64}},
      {"window_65", {1, 194}, 3, {2, 1, 16, 0, 65}},
      {"window_of_two_tiles", {260}, 0, {4, 2, 16, 0.5, 129}},
      {"window_longer_than_the_sequences", {65, 9}, 0, {4, 2, 16, 0, 66}},
  };
}

std::vector<Case> attention_cases() {
  std::vector<Case> cases;
  for (const Layout& l : layouts()) {
    const Space space = space_of(l.lengths, l.rows());
    const std::int64_t wide = l.shape.heads * l.shape.head_size, narrow = l.shape.kv_heads * l.shape.head_size;
    cases.push_back({"attention_" + l.name, {{{l.rows(), wide}, -2, 2}, {{l.rows(), narrow}, -2, 2}, {{l.rows(), narrow}}},
                     [space, l](const Place&, Ins t) { return ops::attention(t[0], t[1], t[2], space, l.shape); },
                     [space, l](const Place& p, Ins t) { return plain_attention(p, t[0], t[1], t[2], space, l.shape); }});
  }
  const ops::AttentionShape shape{4, 2, 16};
  const Space space = space_of({70, 5}, 75);
  const auto pieces = [](const Tensor& fused) {
    const std::int64_t widths[] = {64, 32, 32};
    return ops::split(fused, widths);
  };
  cases.push_back({"attention_of_fused", {{{75, 128}, -2, 2}},
                   [=](const Place&, Ins t) {
                     const std::vector<Tensor> p = pieces(t[0]);
                     return ops::attention(p[0], p[1], p[2], space, shape);
                   },
                   [=](const Place& place, Ins t) {
                     const std::vector<Tensor> p = pieces(t[0]);
                     return plain_attention(place, p[0], p[1], p[2], space, shape);
                   }});
  return cases;
}
CAPSTAN_OP_CASES(Attention, attention_cases());

class AttentionWindow : public ::testing::TestWithParam<std::int64_t> {};
INSTANTIATE_TEST_SUITE_P(Of, AttentionWindow, ::testing::Values(0, 1, 40, 64, 100), ::testing::PrintToStringParamName());

#if !defined(CAPSTAN_TEST_CUDA)  // the CPU promises it alone
TEST_P(AttentionWindow, ASequenceDoesNotDependOnItsBatch) {
  const ops::AttentionShape shape{4, 2, 64, 0, GetParam()};
  const std::vector<std::int32_t> lengths = {7, 130, 64, 1, 65};
  const std::int64_t rows = 267;
  auto device = make_cpu_device(2);
  for (DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const std::vector<double> qs = random_values(rows * 256, 1, -2, 2), ks = random_values(rows * 128, 2, -2, 2), vs = random_values(rows * 128, 3);
    const std::vector<double> gs = random_values(rows * 256, 4);
    struct Out { Tensor out, dq, dk, dv; };
    const auto run = [&](std::int64_t first, std::int64_t count, const Space& space) {
      const auto part = [&](const std::vector<double>& all, std::int64_t cols) {
        return make(*device, {all.begin() + first * cols, all.begin() + (first + count) * cols}, Dims{count, cols}, dtype);
      };
      const Tensor q = make_leaf(part(qs, 256), false), k = make_leaf(part(ks, 128), false), v = make_leaf(part(vs, 128), false);
      const Tensor roots[] = {ops::attention(q, k, v, space, shape)}, grads[] = {part(gs, 256)};
      backward(roots, grads);
      const auto grad = [](const Tensor& t) { return static_cast<Leaf*>(t.node().get())->grad(); };
      return Out{roots[0].detach(), grad(q), grad(k), grad(v)};
    };
    const Out all = run(0, rows, space_of(lengths, rows));
    std::int64_t begin = 0;
    for (std::int32_t n : lengths) {
      SCOPED_TRACE(std::string(name_of(dtype)) + " length " + std::to_string(n));
      const Out one = run(begin, n, space_of({n}, n));
      EXPECT_TRUE(same_bits(one.out, all.out.narrow(0, begin, n).contiguous()));
      EXPECT_TRUE(same_bits(one.dq, all.dq.narrow(0, begin, n).contiguous()));
      EXPECT_TRUE(same_bits(one.dk, all.dk.narrow(0, begin, n).contiguous()));
      EXPECT_TRUE(same_bits(one.dv, all.dv.narrow(0, begin, n).contiguous()));
      begin += n;
    }
  }
}

// A prefix's rows do not see what follows.
TEST_P(AttentionWindow, ARowDoesNotDependOnLaterRows) {
  const ops::AttentionShape shape{2, 1, 16, 0, GetParam()};
  auto device = make_cpu_device(2);
  const Tensor q = make(*device, random_values(200 * 32, 1, -2, 2), Dims{200, 32}, DType::f32);
  const Tensor k = make(*device, random_values(200 * 16, 2, -2, 2), Dims{200, 16}, DType::f32), v = make(*device, random_values(200 * 16, 3), Dims{200, 16}, DType::f32);
  const Tensor all = ops::attention(q, k, v, space_of({200}, 200), shape);
  for (std::int64_t n : {1, 63, 64, 65, 129, 199}) {
    const auto head = [&](const Tensor& t) { return t.narrow(0, 0, n); };
    const Tensor some = ops::attention(head(q), head(k), head(v), space_of({static_cast<std::int32_t>(n)}, n), shape);
    EXPECT_TRUE(same_bits(some, head(all))) << n;
  }
}

#endif

// The row at position 150 does not see key 150 - window and sees the one after it.
TEST_P(AttentionWindow, ARowSeesItsWindowAndNoMore) {
  if (GetParam() == 0) return;
  const ops::AttentionShape shape{2, 1, 16, 0, GetParam()};
  auto device = tested_device(2);
  const std::vector<double> ks = random_values(200 * 16, 2, -2, 2), vs = random_values(200 * 16, 3);
  const Tensor q = make(*device, random_values(200 * 32, 1, -2, 2), Dims{200, 32}, DType::f32);
  const auto row = [&](std::int64_t changed, double by) {
    std::vector<double> k = ks, v = vs;
    for (std::int64_t c = changed * 16; c < (changed + 1) * 16; ++c) k[static_cast<std::size_t>(c)] += by, v[static_cast<std::size_t>(c)] -= by;
    const Tensor out = ops::attention(q, make(*device, k, Dims{200, 16}, DType::f32), make(*device, v, Dims{200, 16}, DType::f32), space_of({200}, 200), shape);
    return out.narrow(0, 150, 1).contiguous();
  };
  const std::int64_t outside = 150 - GetParam();
  EXPECT_TRUE(same_bits(row(outside, 0), row(outside, 3)));
  EXPECT_FALSE(same_bits(row(outside, 0), row(outside + 1, 3)));
}

// Neither scores nor their gradient are there whole: not among tensors, and not in the kernels' own memory.
TEST(Attention, HoldsNoMatrixOfAllPairs) {
  constexpr std::int64_t rows = 8192, matrix = rows * rows * 4;  // of one head, 256 MiB
  auto device = tested_device(2);
  const auto leaf = [&](std::uint64_t seed) { return make_leaf(make(*device, random_values(rows * 8, seed), Dims{rows, 8}, DType::f32), false); };
  const Tensor q = leaf(1), k = leaf(2), v = leaf(3), g = make(*device, random_values(rows * 8, 4), Dims{rows, 8}, DType::f32);
  const std::int64_t held = device->bytes_held(), resident = most_resident();
  device->reset_peak();
  const Tensor roots[] = {ops::attention(q, k, v, space_of({rows}, rows), {1, 1, 8})}, grads[] = {g};
  backward(roots, grads);
  EXPECT_LT(device->bytes_peak() - held, matrix / 32);
  EXPECT_LT(most_resident() - resident, matrix / 2);
}

// Its own key alone: the output is the value, and nothing comes back to queries and keys.
TEST(Attention, AWindowOfOneIsTheValueItself) {
  const ops::AttentionShape shape{2, 2, 16, 0, 1};
  auto device = tested_device(2);
  const auto leaf = [&](std::uint64_t seed) { return make_leaf(make(*device, random_values(70 * 32, seed, -2, 2), Dims{70, 32}, DType::f32), false); };
  const Tensor q = leaf(1), k = leaf(2), v = leaf(3), g = make(*device, random_values(70 * 32, 4), Dims{70, 32}, DType::f32);
  const Tensor roots[] = {ops::attention(q, k, v, space_of({65, 5}, 70), shape)}, grads[] = {g};
  backward(roots, grads);
  EXPECT_TRUE(same_bits(roots[0].detach(), v.detach()));
  const auto grad = [](const Tensor& t) { return doubles(static_cast<Leaf*>(t.node().get())->grad()); };
  EXPECT_TRUE(near(grad(v), doubles(g), tolerance_of(DType::f32)));
  for (const Tensor& t : {q, k})
    for (const double x : grad(t)) EXPECT_NEAR(x, 0, 1e-6);  // beside values and gradients of about 1
}

// The model's FLOP are those of the pairs inside the window, wherever the device counts them.
TEST(Attention, CostIsThatOfTheWindow) {
  auto device = make_meta_device();
  const auto flop = [&](std::int64_t window) {
    const Tensor q = Tensor::empty(Dims{300, 32}, DType::bf16, *device), k = Tensor::empty(Dims{300, 16}, DType::bf16, *device);
    device->clear_ledger();
    device->record(true);
    ops::attention(q, k, k, space_of({200, 100}, 300), {2, 1, 16, 0, window});
    return device->ledger().at(0).cost.flop;
  };
  EXPECT_EQ(flop(0), 4.0 * 32 * (200 * 201 / 2 + 100 * 101 / 2));
  EXPECT_EQ(flop(1), 4.0 * 32 * 300);
  EXPECT_EQ(flop(150), 4.0 * 32 * (150 * 151 / 2 + 50 * 150 + 100 * 101 / 2));
  EXPECT_EQ(flop(200), flop(0));
}

// Keys and values in scattered pages; what lies past a sequence's end in its last page is NaN.
struct Pages {
  PagedKV kv;
  Pages(Device& device, const Tensor& k, const Tensor& v, const std::vector<std::int32_t>& lengths, const ops::AttentionShape& s) {
    constexpr std::int64_t page = 64;
    std::int64_t most = 1, total = 0;
    for (std::int32_t n : lengths) most = std::max(most, (n + page - 1) / page), total += (n + page - 1) / page;
    kv.page = page;
    const Dims shape{total + 1, s.kv_heads, page, s.head_size};
    kv.k = Tensor::full(shape, NAN, k.dtype(), device), kv.v = Tensor::full(shape, NAN, k.dtype(), device);
    std::vector<std::int32_t> blocks(lengths.size() * static_cast<std::size_t>(most), 0);
    std::int64_t next = total, row = 0;  // the last page first
    for (std::size_t i = 0; i < lengths.size(); ++i)
      for (std::int64_t t = 0; t < lengths[i]; ++t, ++row) {
        std::int32_t& block = blocks[i * static_cast<std::size_t>(most) + static_cast<std::size_t>(t / page)];
        if (t % page == 0) block = static_cast<std::int32_t>(next--);
        copy(kv.k, k, block, t % page, row, s), copy(kv.v, v, block, t % page, row, s);
      }
    kv.blocks = Tensor::of(std::span<const std::int32_t>(blocks), Dims{static_cast<std::int64_t>(lengths.size()), most}, device);
    kv.lengths = Tensor::of(std::span<const std::int32_t>(lengths), Dims{static_cast<std::int64_t>(lengths.size())}, device);
  }
  static void copy(const Tensor& pages, const Tensor& rows, std::int64_t block, std::int64_t at, std::int64_t row, const ops::AttentionShape& s) {
    const Tensor from = rows.narrow(0, row, 1).contiguous().view(Dims{1, s.kv_heads, 1, s.head_size});
    pages.narrow(0, block, 1).narrow(2, at, 1).copy_from(from);
  }
};

TEST_P(AttentionWindow, PagedEqualsAttentionBitForBit) {
  const std::vector<std::int32_t> lengths = {1, 63, 64, 65, 130, 20};
  const std::int64_t rows = 343;
  auto device = tested_device(2);
  for (ops::AttentionShape shape : {ops::AttentionShape{2, 1, 16}, ops::AttentionShape{4, 2, 64}, ops::AttentionShape{2, 2, 80}, ops::AttentionShape{2, 1, 128}})
    for (DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      shape.window = GetParam();
      const std::int64_t wide = shape.heads * shape.head_size, narrow = shape.kv_heads * shape.head_size;
      const Tensor q = make(*device, random_values(rows * wide, 1, -2, 2), Dims{rows, wide}, dtype);
      const Tensor k = make(*device, random_values(rows * narrow, 2, -2, 2), Dims{rows, narrow}, dtype), v = make(*device, random_values(rows * narrow, 3), Dims{rows, narrow}, dtype);
      const Tensor all = ops::attention(q, k, v, space_of(lengths, rows), shape);
      const Pages pages(*device, k, v, lengths, shape);
      for (std::int32_t last : {1, 5, 64, 1000}) {  // decoding, a short and a page-long chunk, the whole prompt
        std::vector<std::int32_t> counts;
        std::vector<Tensor> queries, want;
        std::int64_t end = 0;
        for (std::int32_t n : lengths) {
          end += n;
          counts.push_back(std::min(n, last));
          queries.push_back(q.narrow(0, end - counts.back(), counts.back())), want.push_back(all.narrow(0, end - counts.back(), counts.back()));
        }
        const Tensor some = ops::concat(queries, 0);
        const Tensor got = ops::attention_paged(some, pages.kv, space_of(counts, some.size(0)), shape);
        EXPECT_TRUE(same_bits_on_the_cpu(got, ops::concat(want, 0), dtype)) << name_of(dtype) << " head size " << shape.head_size << ", last " << last;
      }
    }
}

// Pages that no row's window reaches are not read: they may hold anything.
TEST(AttentionPaged, PagesOutsideTheWindowAreNotRead) {
  const ops::AttentionShape shape{2, 1, 16, 0, 70};
  auto device = tested_device(1);
  const Tensor q = make(*device, random_values(5 * 32, 1, -2, 2), Dims{5, 32}, DType::f32);
  const Tensor k = make(*device, random_values(270 * 16, 2, -2, 2), Dims{270, 16}, DType::f32), v = make(*device, random_values(270 * 16, 3), Dims{270, 16}, DType::f32);
  const Pages whole(*device, k, v, {270}, shape), cut(*device, k, v, {270}, shape);
  const std::vector<double> blocks = doubles(cut.kv.blocks);
  for (const std::size_t block : {0, 1, 2}) {  // keys 0 to 191; the first row, at 265, sees 196 and later ones
    const auto page = static_cast<std::int64_t>(blocks[block]);
    cut.kv.k.narrow(0, page, 1).fill(NAN), cut.kv.v.narrow(0, page, 1).fill(NAN);
  }
  EXPECT_TRUE(same_bits(ops::attention_paged(q, whole.kv, space_of({5}, 5), shape), ops::attention_paged(q, cut.kv, space_of({5}, 5), shape)));
}

TEST(Attention, SaysWhatDoesNotFit) {
  auto device = tested_device(1);
  const auto t = [&](const Dims& shape) { return Tensor::zeros(shape, DType::f32, *device); };
  const Space space = space_of({3}, 3);
  EXPECT_THAT(error_of([&] { ops::attention(t({3, 30}), t({3, 16}), t({3, 16}), space, {2, 1, 16}); }), HasSubstr("[3, 30]"));
  EXPECT_THAT(error_of([&] { ops::attention(t({3, 32}), t({3, 32}), t({3, 16}), space, {2, 1, 16}); }), HasSubstr("expected [3, 16]"));
  EXPECT_THAT(error_of([&] { ops::attention(t({3, 48}), t({3, 32}), t({3, 32}), space, {3, 2, 16}); }), HasSubstr("multiple"));
  EXPECT_THAT(error_of([&] { ops::attention(t({2, 32}), t({2, 16}), t({2, 16}), space, {2, 1, 16}); }), HasSubstr("row 3"));
  EXPECT_THAT(error_of([&] { ops::attention(t({3, 32}), t({3, 16}), t({3, 16}), space, {2, 1, 16, 0, -1}); }), HasSubstr("window"));
  PagedKV past;
  past.page = 16;
  EXPECT_THAT(error_of([&] { ops::attention_paged(t({3, 32}), past, space, {2, 1, 16}); }), HasSubstr("expected 64"));
}

}  // namespace
}  // namespace capstan::testing
