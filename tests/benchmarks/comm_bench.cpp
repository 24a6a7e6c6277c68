// Collectives among the ranks of a host: `mpirun ... comm_bench capstan|shared|mpi|overlap|mpi-overlap [rounds]`. Median
// times of the slowest rank, beside memcpy by all ranks at once; `overlap`: the share of a collective that hides behind
// compute. `shared`: buffers in the host's shared memory.
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
  explicit Buffer(std::size_t n, capstan::World* shared = nullptr)
      : count(n), bytes((n * sizeof(float) + (2u << 20)) & ~std::size_t{(2u << 20) - 1}) {
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
      fmt::print(
          "{:8} np {} {:9.3f} MiB: memcpy {:8.3f}  all_reduce {:8.3f} ({:6.2f} GB/s)  reduce_scatter {:8.3f}  all_gather "
          "{:8.3f} ms\n",
          name, ranks.size(), static_cast<double>(bytes) / (1 << 20), copy, reduce,
          static_cast<double>(bytes) / reduce / 1e6, scatter, gather);
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
  return {[] {
            int r;
            MPI_Comm_rank(MPI_COMM_WORLD, &r);
            return r;
          },
          [] {
            int s;
            MPI_Comm_size(MPI_COMM_WORLD, &s);
            return s;
          },
          [] { MPI_Barrier(MPI_COMM_WORLD); },
          [](double* x, int n) { MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD); },
          [](float* x, std::int64_t n) {
            MPI_Allreduce(MPI_IN_PLACE, x, static_cast<int>(n), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
          },
          [](const float* x, float* y, std::int64_t n) {
            MPI_Reduce_scatter_block(x, y, static_cast<int>(n), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
          },
          [](const float* x, float* y, std::int64_t n) {
            MPI_Allgather(x, static_cast<int>(n), MPI_FLOAT, y, static_cast<int>(n), MPI_FLOAT, MPI_COMM_WORLD);
          }};
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

/// Rank 0 computes while its collective runs and calls nothing; the other ranks only wait, so that a core is free for
/// whatever moves the data. Hidden: how much of the collective's own time the compute covers.
struct Overlap {
  std::function<int()> rank, size;
  std::function<void()> barrier;
  std::function<void(float*, std::int64_t)> start;
  std::function<void()> wait;
  std::function<void(double*, int)> max;
};

void overlap(const char* name, Overlap& o, int rounds) {
  volatile double sink = compute(0.2);
  auto t = Clock::now();
  sink = work(20'000'000);
  const double turn = since(t) / 20e6;
  for (const std::int64_t bytes : {1 << 20, 16 << 20, 128 << 20}) {
    const std::int64_t n = bytes / 4;
    Buffer a(static_cast<std::size_t>(n));
    std::vector<double> alone, busy, both;
    const auto timed = [&](std::vector<double>& into, const std::function<void()>& body) {
      o.barrier();
      t = Clock::now();
      body();
      into.push_back(since(t));
    };
    for (int i = 0; i < rounds + 1; ++i) timed(alone, [&] { o.start(a.data(), n), o.wait(); });
    double expected = median(alone);
    o.max(&expected, 1);
    const auto turns = o.rank() == 0 ? static_cast<std::int64_t>(1.5 * expected / turn) : 0;
    for (int i = 0; i < rounds; ++i) {
      timed(busy, [&] { sink = work(turns); });
      timed(both, [&] {
        o.start(a.data(), n);
        sink = work(turns);
        o.wait();
      });
    }
    const double c = median(alone), w = median(busy), b = median(both);
    if (o.rank() == 0)
      fmt::print(
          "{:8} overlap np {} {:4} MiB: all_reduce {:.2f} ms, compute on rank 0 {:.2f} ms, together {:.2f} ms: {:.0f}% "
          "hidden\n",
          name, o.size(), bytes >> 20, 1e3 * c, 1e3 * w, 1e3 * b, 100 * (c + w - b) / c);
  }
  (void)sink;
}

Overlap overlap_of_mpi(MPI_Request& request) {
  return {[] {
            int r;
            MPI_Comm_rank(MPI_COMM_WORLD, &r);
            return r;
          },
          [] {
            int s;
            MPI_Comm_size(MPI_COMM_WORLD, &s);
            return s;
          },
          [] { MPI_Barrier(MPI_COMM_WORLD); },
          [&request](float* x, std::int64_t n) {
            MPI_Iallreduce(MPI_IN_PLACE, x, static_cast<int>(n), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD, &request);
          },
          [&request] { MPI_Wait(&request, MPI_STATUS_IGNORE); },
          [](double* x, int n) { MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD); }};
}

Overlap overlap_of_capstan(capstan::World& world, capstan::Communicator& c, capstan::Handle& handle) {
  using capstan::DType;
  return {[&] { return world.rank(); }, [&] { return world.size(); }, [&c] { c.barrier(); },
          [&](float* x, std::int64_t n) { handle = c.all_reduce(x, n, DType::f32); }, [&] { handle.wait(); },
          [&c](double* x, int n) { c.all_reduce(x, n, DType::f64, capstan::Reduction::max).wait(); }};
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "capstan";
  const int rounds = argc > 2 ? std::max(1, std::atoi(argv[2])) : 11;
  if (what == "mpi" || what == "mpi-overlap") {
    MPI_Init(&argc, &argv);
    MPI_Request request = MPI_REQUEST_NULL;
    Ranks ranks = of_mpi();
    Overlap o = overlap_of_mpi(request);
    if (what == "mpi") bench("MPI", ranks, rounds);
    else overlap("MPI", o, rounds);
    MPI_Finalize();
    return 0;
  }
  auto world = capstan::make_mpi_world(60);
  std::vector<int> all(static_cast<std::size_t>(world->size()));
  std::iota(all.begin(), all.end(), 0);
  auto c = world->make("bench", all);
  if (what == "overlap") {
    capstan::Handle handle;
    Overlap o = overlap_of_capstan(*world, *c, handle);
    overlap("Capstan", o, rounds);
  } else {
    Ranks ranks = of_capstan(*world, *c);
    bench(what == "shared" ? "shared" : "Capstan", ranks, rounds, what == "shared" ? world.get() : nullptr);
  }
  return 0;
}
