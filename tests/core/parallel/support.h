// defines: run_ranks(), Ranks, Gradients: ranks as threads, parameters cut by hand, gradients added by hand.
#pragma once
#include "comm/communicator.h"
#include "mesh/mesh.h"
#include "mesh/placement.h"

#include <capstan/model.h>

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace capstan::parallel_test {

/// Runs `f` on `size` ranks at once; what any of them throws fails the test.
inline void run_ranks(int size, const std::function<void(std::shared_ptr<World>)>& f) {
  const auto worlds = make_thread_worlds(size, 20);
  std::vector<std::thread> threads;
  std::mutex mutex;
  for (const auto& world : worlds)
    threads.emplace_back([&, world] {
      try {
        f(world);
      } catch (const std::exception& e) {
        const std::lock_guard lock(mutex);
        ADD_FAILURE() << "rank " << world->rank() << ": " << e.what();
      }
    });
  for (auto& t : threads) t.join();
}

/// One rank's device and place in a mesh of tensor x context ranks.
struct Rank {
  std::shared_ptr<Device> device = make_cpu_device(1);
  std::unique_ptr<Mesh> mesh;  ///< null: alone
  Rank() = default;
  Rank(std::shared_ptr<World> world, int tensor, int context)
      : mesh(std::make_unique<Mesh>(world, MeshLayout::make({{"context", context}, {"tensor", tensor}}, world->size()))) {}
  int tensor() const { return mesh ? mesh->size("tensor") : 1; }
  int tensor_rank() const { return mesh ? mesh->coordinate("tensor") : 0; }
};

inline std::vector<double> host(const Tensor& t) {
  std::vector<double> values(static_cast<std::size_t>(t.numel()));
  t.detach().to(DType::f64).contiguous().copy_to_host(values.data(), t.numel() * 8);
  return values;
}

inline Tensor tensor(const std::vector<double>& values, const Dims& shape, DType dtype, Device& device) {
  return Tensor::of<double>(values, shape, device).to(dtype);
}

/// Numbers by address: the same on every rank.
inline std::vector<double> noise(const std::string& name, std::int64_t count, double size = 1) {
  const Rng rng(18, name);
  std::vector<double> v;
  for (std::int64_t i = 0; i < count; ++i) v.push_back(size * rng.normal(static_cast<std::uint64_t>(i)));
  return v;
}

/// f(global element, local element) of every element that `p` (with its placement, or whole) holds.
template <class F>
void for_elements(const Parameter& p, F&& f) {
  const Dims shape = p.shape();
  const TensorPlacement placed = p.placement() != nullptr ? *p.placement() : place_tensor(p, 1, 0);
  const int dim = placed.cut() ? placed.dim : 0;
  std::int64_t outer = 1, inner = 1, local = 0;
  for (int d = 0; d < dim; ++d) outer *= shape[d];
  for (int d = dim + 1; d < shape.size(); ++d) inner *= shape[d];
  for (std::int64_t o = 0; o < outer; ++o)
    for (const Run& run : placed.runs)
      for (std::int64_t i = 0; i < run.length * inner; ++i) f((o * shape[dim] + run.begin) * inner + i, local++);
}

/// Places a parameter with values by address: initial ones, and noise so that norm weights and biases count too.
inline void place(Parameter& p, const Rank& rank, DType dtype, double size = 0.1) {
  p.set_placement(std::make_shared<TensorPlacement>(place_tensor(p, rank.tensor(), rank.tensor_rank())));
  Parameter whole(p.name(), p.spec());
  const Tensor initial = Tensor::zeros(p.shape(), DType::f64, *rank.device);
  whole.initialize(17, initial);
  std::vector<double> global = host(initial);
  const std::vector<double> added = noise(p.name(), p.numel(), size);
  std::vector<double> local(static_cast<std::size_t>(p.placement()->local.product()));
  for_elements(p, [&](std::int64_t g, std::int64_t l) {
    local[static_cast<std::size_t>(l)] = global[static_cast<std::size_t>(g)] + added[static_cast<std::size_t>(g)];
  });
  p.place(tensor(local, p.placement()->local, dtype, *rank.device), true);
}

/// Global gradients by parameter: every rank adds its copy of each element. With those of activations by any name.
class Gradients {
 public:
  void add(const std::vector<Parameter*>& parameters) {
    const std::lock_guard lock(mutex_);
    for (const Parameter* p : parameters) {
      auto& sum = all_[p->name()];
      sum.resize(static_cast<std::size_t>(p->numel()), 0);
      if (p->leaf() == nullptr || !p->leaf()->has_grad()) continue;
      const std::vector<double> g = host(p->leaf()->grad());
      for_elements(*p, [&](std::int64_t to, std::int64_t from) {
        sum[static_cast<std::size_t>(to)] += g[static_cast<std::size_t>(from)];
      });
    }
  }
  /// `values` belong at `begin` of the array called `name`.
  void add(const std::string& name, std::size_t begin, const std::vector<double>& values) {
    const std::lock_guard lock(mutex_);
    auto& sum = all_[name];
    if (sum.size() < begin + values.size()) sum.resize(begin + values.size(), 0);
    for (std::size_t i = 0; i < values.size(); ++i) sum[begin + i] += values[i];
  }
  const std::map<std::string, std::vector<double>>& all() const { return all_; }

  /// ||g - g0|| <= tolerance * max(||g0||, 1e-3 ||all of g0||) for every array.
  void expect_near(const Gradients& reference, double tolerance, const std::string& what) const {
    double whole = 0;
    for (const auto& [name, g] : reference.all_)
      for (const double x : g) whole += x * x;
    ASSERT_EQ(all_.size(), reference.all_.size()) << what;
    for (const auto& [name, want] : reference.all_) {
      ASSERT_TRUE(all_.count(name)) << what << ": " << name;
      const auto& got = all_.at(name);
      ASSERT_EQ(got.size(), want.size()) << what << ": " << name;
      double difference = 0, norm = 0;
      for (std::size_t i = 0; i < want.size(); ++i)
        difference += (got[i] - want[i]) * (got[i] - want[i]), norm += want[i] * want[i];
      EXPECT_LE(std::sqrt(difference), tolerance * std::max(std::sqrt(norm), 1e-3 * std::sqrt(whole)))
          << what << ": " << name << ", norm " << std::sqrt(norm);
    }
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::vector<double>> all_;
};

}  // namespace capstan::parallel_test
