// The differentiable collectives: values against what the ranks hold together, and each backward against the transpose.
#include "parallel/collectives.h"
#include "core/parallel/support.h"

#include <capstan/autograd.h>

#include <gmock/gmock.h>

#include <numeric>

namespace capstan::parallel_test {
namespace {

using Op = std::function<Tensor(const Tensor&, Communicator&)>;

struct Case {
  std::string name;
  std::function<Dims(int rank, int size)> in, out;
  Op op;
  /// The whole output on rank r from all ranks' inputs.
  std::function<std::vector<double>(const std::vector<std::vector<double>>& inputs, int rank)> want;
};

std::vector<std::int64_t> widths_of(int size) {
  std::vector<std::int64_t> w;
  for (int r = 0; r < size; ++r) w.push_back(r == 1 ? 0 : 2 + r);
  return w;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all{
      {"gather_rows",
       [](int, int) {
         return Dims{3, 2};
       },
       [](int, int n) {
         return Dims{3 * n, 2};
       },
       [](const Tensor& x, Communicator& c) { return parallel::gather_rows(x, c); },
       [](const auto& in, int) {
         std::vector<double> y;
         for (const auto& x : in) y.insert(y.end(), x.begin(), x.end());
         return y;
       }},
      {"reduce_scatter_rows",
       [](int, int n) {
         return Dims{2 * n, 3};
       },
       [](int, int) {
         return Dims{2, 3};
       },
       [](const Tensor& x, Communicator& c) { return parallel::reduce_scatter_rows(x, c); },
       [](const auto& in, int r) {
         std::vector<double> y(6, 0);
         for (const auto& x : in)
           for (std::size_t i = 0; i < 6; ++i) y[i] += x[static_cast<std::size_t>(r) * 6 + i];
         return y;
       }},
      {"gather_columns",
       [](int r, int n) {
         return Dims{3, widths_of(n)[static_cast<std::size_t>(r)]};
       },
       [](int, int n) {
         const auto w = widths_of(n);
         return Dims{3, std::accumulate(w.begin(), w.end(), std::int64_t{0})};
       },
       [](const Tensor& x, Communicator& c) { return parallel::gather_columns(x, widths_of(c.size()), c); },
       [](const auto& in, int) {
         std::vector<double> y;
         for (std::size_t row = 0; row < 3; ++row)
           for (const auto& x : in)
             y.insert(y.end(), x.begin() + static_cast<std::ptrdiff_t>(row * x.size() / 3),
                      x.begin() + static_cast<std::ptrdiff_t>((row + 1) * x.size() / 3));
         return y;
       }},
  };
  return all;
}

class Collectives : public testing::TestWithParam<std::tuple<int, DType>> {};

// Small integers: sums are exact in every type, so that equality is asked for.
std::vector<double> integers(const std::string& name, std::int64_t n) {
  std::vector<double> v = noise(name, n, 3);
  for (double& x : v) x = std::round(x);
  return v;
}

TEST_P(Collectives, GiveTheirValuesAndTheTransposeAsGradient) {
  const auto [size, dtype] = GetParam();
  for (const Case& c : cases()) {
    std::vector<std::vector<double>> inputs, weights;
    for (int r = 0; r < size; ++r) {
      inputs.push_back(integers(c.name + "/x" + std::to_string(r), c.in(r, size).product()));
      weights.push_back(integers(c.name + "/w" + std::to_string(r), c.out(r, size).product()));
    }
    double forward = 0;  // sum over ranks of <w_r, y_r>, whose gradient by x is the transpose of w
    for (int r = 0; r < size; ++r) {
      const auto y = c.want(inputs, r);
      for (std::size_t i = 0; i < y.size(); ++i) forward += weights[static_cast<std::size_t>(r)][i] * y[i];
    }
    std::mutex mutex;
    double transposed = 0;
    std::vector<std::vector<double>> gradients(static_cast<std::size_t>(size));
    run_ranks(size, [&](std::shared_ptr<World> world) {
      const auto r = static_cast<std::size_t>(world->rank());
      const Rank rank(world, world->size(), 1);
      Communicator& comm = rank.mesh->comm("tensor");
      const Tensor x = make_leaf(tensor(inputs[r], c.in(world->rank(), world->size()), dtype, *rank.device), false);
      const Tensor y = c.op(x, comm);
      EXPECT_EQ(y.shape(), c.out(world->rank(), world->size())) << c.name;
      EXPECT_EQ(host(y), c.want(inputs, world->rank())) << c.name;
      const Tensor roots[] = {y}, grads[] = {tensor(weights[r], y.shape(), dtype, *rank.device)};
      backward(roots, grads);
      const auto* leaf = static_cast<Leaf*>(x.node().get());
      const std::vector<double> g = host(leaf->grad());
      const std::lock_guard lock(mutex);
      for (std::size_t i = 0; i < g.size(); ++i) transposed += g[i] * inputs[r][i];
      gradients[r] = g;
    });
    EXPECT_EQ(transposed, forward) << c.name;  // <A' w, x> = <w, A x>
    // And element by element: d forward / d x_i by a unit step, exact for a linear map.
    for (int r = 0; r < size; ++r)
      for (std::size_t i = 0; i < inputs[static_cast<std::size_t>(r)].size(); ++i) {
        auto moved = inputs;
        moved[static_cast<std::size_t>(r)][i] += 1;
        double after = 0;
        for (int s = 0; s < size; ++s) {
          const auto y = c.want(moved, s);
          for (std::size_t k = 0; k < y.size(); ++k) after += weights[static_cast<std::size_t>(s)][k] * y[k];
        }
        ASSERT_EQ(gradients[static_cast<std::size_t>(r)][i], after - forward) << c.name << " rank " << r << " element " << i;
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, Collectives,
                         testing::Combine(testing::Values(2, 3, 4), testing::Values(DType::f64, DType::f32, DType::bf16)),
                         [](const auto& info) {
                           return std::to_string(std::get<0>(info.param)) + std::string(name_of(std::get<1>(info.param)));
                         });

TEST(CollectivesOnMeta, HaveShapesAndBytesAndSayNothing) {
  run_ranks(3, [](std::shared_ptr<World> world) {
    if (world->rank() != 1) return;  // nobody answers: on the meta device nothing is sent
    const auto meta = make_meta_device();
    Communicator& comm = *world->make("tensor/main", {0, 1, 2});
    meta->record(true);
    const Tensor x = make_leaf(Tensor::empty(Dims{6, 8}, DType::bf16, *meta), false);
    const Tensor all = parallel::gather_rows(x, comm), part = parallel::reduce_scatter_rows(all, comm);
    EXPECT_EQ(all.shape(), (Dims{18, 8}));
    EXPECT_EQ(part.shape(), (Dims{6, 8}));
    EXPECT_EQ(meta->total_cost().comm, 2 * 2 * 6 * 8 * 2);  // two of three blocks, twice
    const Tensor roots[] = {part}, grads[] = {Tensor::empty(part.shape(), DType::bf16, *meta)};
    backward(roots, grads);
    EXPECT_EQ(meta->total_cost().comm, 4 * 2 * 6 * 8 * 2);
    EXPECT_EQ(static_cast<Leaf*>(x.node().get())->grad().shape(), x.shape());
  });
}

TEST(CollectivesErrors, SayWhatWasExpected) {
  run_ranks(2, [](std::shared_ptr<World> world) {
    const Rank rank(world, 2, 1);
    Communicator& comm = rank.mesh->comm("tensor");
    const auto message = [](auto&& f) -> std::string {
      try {
        f();
      } catch (const Error& e) {
        return e.what();
      }
      return "";
    };
    const Tensor odd = Tensor::zeros(Dims{3, 2}, DType::f32, *rank.device);
    EXPECT_THAT(message([&] { parallel::reduce_scatter_rows(odd, comm); }),
                testing::HasSubstr("rows: expected a multiple of the 2 ranks, got 3"));
    EXPECT_THAT(message([&] { parallel::gather_rows(Tensor::zeros(Dims{2}, DType::i32, *rank.device), comm); }),
                testing::HasSubstr("element type"));
    const std::vector<std::int64_t> widths{3, 3};
    EXPECT_THAT(message([&] { parallel::gather_columns(odd, widths, comm); }), testing::HasSubstr("[n, 3]"));
  });
}

}  // namespace
}  // namespace capstan::parallel_test
