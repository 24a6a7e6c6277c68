// Collectives among the ranks of a host: `mpirun ... comm_bench capstan|shared|mpi|overlap [rounds]`. Median times of the slowest
// rank, beside memcpy by all ranks at once; `overlap`: the share of a collective that hides behind compute. `shared`: buffers in
// the host's shared memory.
#include "comm/mpi_world.h"

#include <capstan/dtype.h>
#include <fmt/format.h>
#include <mpi.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }
double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

/// Floats, written once: in large pages of its own, or in the host's shared memory.
struct Buffer {
  explicit Buffer(std::size_t n, capstan::World* shared = nullptr) : count(n), bytes((n * sizeof(float) + (2u << 20)) & ~std::size_t{(2u << 20) - 1}) {
    if (shared) memory = shared->shared_memory(bytes), base = memory.get();
    else base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!shared) madvise(base, bytes, MADV_HUGEPAGE);
    for (std::size_t i = 0; i < count; ++i) data()[i] = 1.0f;
  }
  ~Buffer() { if (!memory) munmap(base, bytes); }
  float* data() { return static_cast<float*>(base); }
  std::size_t count, bytes;
  void* base;
  std::shared_ptr<void> memory;
};

struct Ranks {
  std::function<int()> rank, size;
  std::function<void()> barrier;
  std::function<void(double*, int)> max;
  std::function<void(float*, std::int64_t)> all_reduce;
  std::function<void(const float*, float*, std::int64_t)> reduce_scatter, all_gather;
};

void bench(const char* name, Ranks& ranks, int rounds, capstan::World* shared = nullptr) {
  const std::int64_t sizes[] = {1024, 64 << 10, 1 << 20, 16 << 20, 128 << 20};
  for (const std::int64_t bytes : sizes) {
    const std::int64_t n = bytes / 4, part = n / ranks.size();
    Buffer a(static_cast<std::size_t>(n), shared), b(static_cast<std::size_t>(n), shared);
    const auto time = [&](const std::function<void()>& body) {
      std::vector<double> times;
      const int count = bytes > (32 << 20) ? rounds : rounds * 4;
      for (int i = 0; i < count + 1; ++i) {
        ranks.barrier();
        const auto t = Clock::now();
        body();
        times.push_back(since(t));
      }
      times.erase(times.begin());
      ranks.max(times.data(), count);
      return 1e3 * median(times);
    };
    const double copy = time([&] { std::memcpy(b.data(), a.data(), static_cast<std::size_t>(bytes)); });
    const double reduce = time([&] { ranks.all_reduce(a.data(), n); });
    const double scatter = time([&] { ranks.reduce_scatter(a.data(), b.data(), part); });
    const double gather = time([&] { ranks.all_gather(a.data(), b.data(), part); });
    if (ranks.rank() == 0) {
      fmt::print("{:8} np {} {:9.3f} MiB: memcpy {:8.3f}  all_reduce {:8.3f} ({:6.2f} GB/s)  reduce_scatter {:8.3f}  all_gather {:8.3f} ms\n", name,
                 ranks.size(), static_cast<double>(bytes) / (1 << 20), copy, reduce, static_cast<double>(bytes) / reduce / 1e6, scatter, gather);
      std::fflush(stdout);
    }
  }
}

Ranks of_capstan(capstan::World& world, capstan::Communicator& c) {
  using capstan::DType;
  return {[&] { return world.rank(); }, [&] { return world.size(); }, [&c] { c.barrier(); },
          [&c](double* x, int n) { c.all_reduce(x, n, DType::f64, capstan::Reduction::max).wait(); },
          [&c](float* x, std::int64_t n) { c.all_reduce(x, n, DType::f32).wait(); },
          [&c](const float* x, float* y, std::int64_t n) { c.reduce_scatter(x, y, n, DType::f32).wait(); },
          [&c](const float* x, float* y, std::int64_t n) { c.all_gather(x, y, n, DType::f32).wait(); }};
}

Ranks of_mpi() {
  return {[] { int r; MPI_Comm_rank(MPI_COMM_WORLD, &r); return r; }, [] { int s; MPI_Comm_size(MPI_COMM_WORLD, &s); return s; },
          [] { MPI_Barrier(MPI_COMM_WORLD); },
          [](double* x, int n) { MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD); },
          [](float* x, std::int64_t n) { MPI_Allreduce(MPI_IN_PLACE, x, static_cast<int>(n), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); },
          [](const float* x, float* y, std::int64_t n) { MPI_Reduce_scatter_block(x, y, static_cast<int>(n), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); },
          [](const float* x, float* y, std::int64_t n) { MPI_Allgather(x, static_cast<int>(n), MPI_FLOAT, y, static_cast<int>(n), MPI_FLOAT, MPI_COMM_WORLD); }};
}

/// Work in registers: it needs a core but no memory.
double compute(double seconds) {
  const auto t = Clock::now();
  double x = 1.0;
  while (since(t) < seconds)
    for (int i = 0; i < 2000; ++i) x = x * 1.0000001 + 1e-9;
  return x;
}

/// A fixed amount of the same work; its time is the measure.
double work(std::int64_t turns) {
  double x = 1.0;
  for (std::int64_t i = 0; i < turns; ++i) x = x * 1.0000001 + 1e-9;
  return x;
}

void overlap(capstan::World& world, capstan::Communicator& c, int rounds) {
  volatile double sink = compute(0.2);
  auto t = Clock::now();
  sink = work(20'000'000);
  const double turn = since(t) / 20e6;
  for (const std::int64_t bytes : {1 << 20, 16 << 20, 128 << 20}) {
    const std::int64_t n = bytes / 4;
    Buffer a(static_cast<std::size_t>(n));
    std::vector<double> alone, late, both, busy;
    double wait = 0;
    for (int i = 0; i < rounds + 1; ++i) {
      c.barrier();
      t = Clock::now();
      c.all_reduce(a.data(), n, capstan::DType::f32).wait();
      alone.push_back(since(t));
    }
    double expected = median(alone);
    c.all_reduce(&expected, 1, capstan::DType::f64, capstan::Reduction::max).wait();
    const auto turns = static_cast<std::int64_t>(2 * expected / turn);
    for (int i = 0; i < rounds; ++i) {
      c.barrier();
      t = Clock::now();
      sink = work(turns);
      busy.push_back(since(t));
      // Both ranks are ready at once.
      c.barrier();
      t = Clock::now();
      capstan::Handle h = c.all_reduce(a.data(), n, capstan::DType::f32);
      sink = work(turns);
      h.wait();
      both.push_back(since(t));
      // One rank is late by the compute's length: the other computes meanwhile, and only the waiting hides.
      c.barrier();
      t = Clock::now();
      if (world.rank() != 0) sink = work(turns);
      h = c.all_reduce(a.data(), n, capstan::DType::f32);
      if (world.rank() == 0) sink = work(turns);
      const auto w = Clock::now();
      h.wait();
      wait += since(w) / rounds;
      late.push_back(since(t));
    }
    double m[] = {median(alone), median(busy), median(both), median(late)};
    c.all_reduce(m, 4, capstan::DType::f64, capstan::Reduction::max).wait();
    if (world.rank() == 0)
      fmt::print("overlap np {} {:4} MiB: all_reduce {:.2f} ms, compute {:.2f} ms, together {:.2f} ms ({:.0f}% of the collective hidden); "
                 "others late by the compute: {:.2f} ms, rank 0 stood still {:.2f} ms\n", world.size(), bytes >> 20, 1e3 * m[0], 1e3 * m[1],
                 1e3 * m[2], 100 * (m[0] + m[1] - m[2]) / m[0], 1e3 * m[3], 1e3 * wait);
  }
  (void)sink;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "capstan";
  const int rounds = argc > 2 ? std::max(1, std::atoi(argv[2])) : 11;
  if (what == "mpi") {
    MPI_Init(&argc, &argv);
    Ranks ranks = of_mpi();
    bench("MPI", ranks, rounds);
    MPI_Finalize();
    return 0;
  }
  auto world = capstan::make_mpi_world(60);
  std::vector<int> all(static_cast<std::size_t>(world->size()));
  std::iota(all.begin(), all.end(), 0);
  auto c = world->make("bench", all);
  if (what == "overlap") {
    overlap(*world, *c, rounds);
  } else {
    Ranks ranks = of_capstan(*world, *c);
    bench(what == "shared" ? "shared" : "Capstan", ranks, rounds, what == "shared" ? world.get() : nullptr);
  }
  return 0;
}
