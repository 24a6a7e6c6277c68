// defines: Battery: random collectives on random groups, held against plain loops. Same code for threads and processes.
#pragma once
#include "comm/communicator.h"

#include <capstan/dtype.h>
#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::testing {

inline void require(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error(what);
}

inline std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// Element i of what `rank` brings to collective `op`.
template <class T>
T value(std::uint64_t op, int rank, std::int64_t i) {
  const std::uint64_t h = mix(mix(op * 1315423911u + static_cast<std::uint64_t>(rank)) + static_cast<std::uint64_t>(i));
  if constexpr (std::is_integral_v<T>) return static_cast<T>(h);
  else return static_cast<T>(static_cast<float>(static_cast<double>(h >> 11) * 0x1p-52 - 1.0));
}

template <class T>
T reference(std::uint64_t op, const std::vector<int>& ranks, std::int64_t i, Reduction reduction) {
  using Sum = std::conditional_t<std::is_same_v<T, bf16>, float, T>;
  Sum sum = static_cast<Sum>(value<T>(op, ranks[0], i));
  for (std::size_t r = 1; r < ranks.size(); ++r) {
    const Sum x = static_cast<Sum>(value<T>(op, ranks[r], i));
    if (reduction == Reduction::sum) sum = static_cast<Sum>(sum + x);
    else if (reduction == Reduction::max) sum = x > sum ? x : sum;
    else sum = x < sum ? x : sum;
  }
  return static_cast<T>(sum);
}

/// Sums over several hosts add another order than that of ranks: a few roundings, one of bf16.
struct Expect { bool order_of_ranks = true; };

/// An array of a collective: in ordinary memory or in the host's shared memory.
template <class T>
class Data {
 public:
  Data(World* shared, std::size_t n) : heap_(shared ? 0 : n + 1) {
    if (shared) memory_ = shared->shared_memory((n + 1) * sizeof(T)), begin_ = static_cast<T*>(memory_.get());
    else begin_ = heap_.data();
  }
  T* data() { return begin_; }
  T& operator[](std::size_t i) { return begin_[i]; }

 private:
  std::shared_ptr<void> memory_;
  std::vector<T> heap_;
  T* begin_;
};

struct Running {
  Handle handle;
  std::function<void()> check;   // after wait
};

class Battery {
 public:
  Battery(World& world, std::uint64_t seed, Expect expect = {}) : world_(world), seed_(seed), expect_(expect) {}

  /// `steps` collectives over several communicators, handles waited for in random order and late.
  void run(int steps, std::int64_t largest) {
    std::mt19937_64 same(seed_);                                               // equal on all ranks
    std::mt19937_64 own(mix(seed_ + 77 + static_cast<std::uint64_t>(world_.rank())));  // differs
    std::vector<std::vector<int>> groups;
    std::vector<std::shared_ptr<Communicator>> comms;
    const int n = world_.size();
    for (int g = 0; g < 5; ++g) {
      std::vector<int> ranks;
      for (int r = 0; r < n; ++r)
        if (g < 2 || same() % 3 != 0) ranks.push_back(r);
      if (ranks.empty()) ranks.push_back(static_cast<int>(same() % static_cast<std::uint64_t>(n)));
      groups.push_back(ranks);
      bool member = false;
      for (int r : ranks) member |= r == world_.rank();
      comms.push_back(member ? world_.make(fmt::format("{}/g{}", seed_, g), ranks) : nullptr);
    }
    std::vector<Running> running;
    for (int s = 0; s < steps; ++s) {
      const std::size_t g = same() % groups.size();
      const std::uint64_t draw = same(), op = mix(seed_ * 1000 + static_cast<std::uint64_t>(s));
      world_.at(s, fmt::format("collective {} of the battery", s));
      if (comms[g]) launch(*comms[g], groups[g], op, draw, largest, running);
      while (!running.empty() && (running.size() > 6 || own() % 3 == 0)) {
        const std::size_t i = own() % running.size();
        finish(running, i);
      }
    }
    while (!running.empty()) finish(running, running.size() - 1);
    for (auto& c : comms)
      if (c) c->barrier();
    checks_ = steps;
  }

 private:
  static void finish(std::vector<Running>& running, std::size_t i) {
    Running r = std::move(running[i]);
    running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
    r.handle.wait();
    r.check();
  }

  void launch(Communicator& c, const std::vector<int>& ranks, std::uint64_t op, std::uint64_t draw, std::int64_t largest,
              std::vector<Running>& running) {
    switch (draw % 6) {
      case 0: return typed<float>(c, ranks, op, draw / 6, largest, running);
      case 1: return typed<double>(c, ranks, op, draw / 6, largest, running);
      case 2: return typed<bf16>(c, ranks, op, draw / 6, largest, running);
      case 3: return typed<std::int32_t>(c, ranks, op, draw / 6, largest, running);
      case 4: return typed<std::int64_t>(c, ranks, op, draw / 6, largest, running);
      default: return typed<std::uint8_t>(c, ranks, op, draw / 6, largest, running);
    }
  }

  template <class T>
  void compare(T got, T want, bool summed, const std::string& what) const {
    if (std::memcmp(&got, &want, sizeof(T)) == 0) return;
    if (summed && !expect_.order_of_ranks && !std::is_integral_v<T>) {
      const double far = std::abs(static_cast<double>(got) - static_cast<double>(want)), size = std::abs(static_cast<double>(want));
      // Values are within +-1, so that a sum of up to 8 is rounded at 8 at most.
      if (std::is_same_v<T, double> ? far <= 8 * 8 * 0x1p-53 : std::is_same_v<T, float> ? far <= 8 * 8 * 0x1p-24 : far <= size * 0x1p-8 + 8 * 8 * 0x1p-24)
        return;
    }
    throw std::runtime_error(fmt::format("rank {}, {}: got {}, want {}", world_.rank(), what, static_cast<double>(got),
                                         static_cast<double>(want)));
  }

  template <class T>
  void typed(Communicator& c, const std::vector<int>& ranks, std::uint64_t op, std::uint64_t draw, std::int64_t largest,
             std::vector<Running>& running) {
    const DType dtype = dtype_of<T>;
    const auto n = static_cast<std::int64_t>(ranks.size());
    const int me = c.rank();
    const auto reduction = static_cast<Reduction>(draw % 3);
    draw /= 3;
    const int kind = static_cast<int>(draw % 9);
    draw /= 9;
    // Small, odd, zero and now and then larger than a staging buffer.
    const std::int64_t limits[] = {0, 1, 3, 17, 1001, 40'003, largest};
    const std::int64_t limit = limits[draw % 7];
    draw /= 7;
    const std::int64_t count = limit < 2 ? limit : static_cast<std::int64_t>(draw % static_cast<std::uint64_t>(limit)) + 1;
    const std::string what = fmt::format("collective kind {} op {} count {} of {} in {}", kind, static_cast<int>(reduction), count,
                                         name_of(dtype), c.name());
    // A third of the collectives have all data in shared memory, a third on some ranks only.
    World* where = op % 3 == 0 || (op % 3 == 1 && mix(op + static_cast<std::uint64_t>(world_.rank())) % 2) ? &world_ : nullptr;
    // One element past a cache line: nothing may count on alignment.
    auto fill = [&](Data<T>& v, int rank, std::int64_t m, std::int64_t from, std::int64_t at) {
      for (std::int64_t i = 0; i < m; ++i) v[static_cast<std::size_t>(at + i)] = value<T>(op, rank, from + i);
    };
    const auto z = [](std::int64_t i) { return static_cast<std::size_t>(i); };
    switch (kind) {
      case 0: {
        auto data = std::make_shared<Data<T>>(where, z(count + 1));
        fill(*data, ranks[z(me)], count, 0, 1);
        Handle h = c.all_reduce(data->data() + 1, count, dtype, reduction);
        running.push_back({std::move(h), [=, this] {
          for (std::int64_t i = 0; i < count; ++i) compare((*data)[z(i + 1)], reference<T>(op, ranks, i, reduction), true, what);
        }});
        return;
      }
      case 1: {
        const std::int64_t m = count / n + 1;
        auto in = std::make_shared<Data<T>>(where, z(m * n)), out = std::make_shared<Data<T>>(where, z(m));
        fill(*in, ranks[z(me)], m * n, 0, 0);
        const bool in_place = (op & 1) != 0;
        Handle h = c.reduce_scatter(in->data(), in_place ? in->data() + m * me : out->data(), m, dtype, reduction);
        running.push_back({std::move(h), [=, this] {
          for (std::int64_t i = 0; i < m; ++i)
            compare(in_place ? (*in)[z(m * me + i)] : (*out)[z(i)], reference<T>(op, ranks, m * me + i, reduction), true, what);
        }});
        return;
      }
      case 2: {
        auto out = std::make_shared<Data<T>>(where, z(count * n)), in = std::make_shared<Data<T>>(where, z(count));
        const bool in_place = (op & 1) != 0;
        if (in_place) fill(*out, ranks[z(me)], count, 0, count * me);
        else fill(*in, ranks[z(me)], count, 0, 0);
        Handle h = c.all_gather(in_place ? out->data() + count * me : in->data(), out->data(), count, dtype);
        running.push_back({std::move(h), [=, this] {
          for (int r = 0; r < n; ++r)
            for (std::int64_t i = 0; i < count; ++i)
              compare((*out)[z(count * r + i)], value<T>(op, ranks[z(r)], i), false, what);
          (void)in;
        }});
        return;
      }
      case 3: {
        std::vector<std::int64_t> counts(z(n));
        std::int64_t total = 0;
        for (int r = 0; r < n; ++r) total += counts[z(r)] = static_cast<std::int64_t>(mix(op + static_cast<std::uint64_t>(r)) % static_cast<std::uint64_t>(count + 1));
        auto in = std::make_shared<Data<T>>(where, z(counts[z(me)])), out = std::make_shared<Data<T>>(where, z(total));
        fill(*in, ranks[z(me)], counts[z(me)], 0, 0);
        Handle h = c.all_gather_v(in->data(), out->data(), counts, dtype);
        running.push_back({std::move(h), [=, this] {
          std::int64_t at = 0;
          for (int r = 0; r < n; ++r)
            for (std::int64_t i = 0; i < counts[z(r)]; ++i, ++at) compare((*out)[z(at)], value<T>(op, ranks[z(r)], i), false, what);
          (void)in;
        }});
        return;
      }
      case 4: {
        const std::int64_t m = count / n + 1;
        auto in = std::make_shared<Data<T>>(where, z(m * n)), out = std::make_shared<Data<T>>(where, z(m * n));
        fill(*in, ranks[z(me)], m * n, 0, 0);
        Handle h = c.all_to_all(in->data(), out->data(), m, dtype);
        running.push_back({std::move(h), [=, this] {
          for (int r = 0; r < n; ++r)
            for (std::int64_t i = 0; i < m; ++i) compare((*out)[z(m * r + i)], value<T>(op, ranks[z(r)], m * me + i), false, what);
          (void)in;
        }});
        return;
      }
      case 5: {
        // pair(r, q): elements from r to q.
        const auto pair = [=](int r, int q) {
          return static_cast<std::int64_t>(mix(op + static_cast<std::uint64_t>(r * 1000 + q)) % static_cast<std::uint64_t>(count / n + 2));
        };
        std::vector<std::int64_t> send(z(n)), receive(z(n));
        std::int64_t sent = 0, received = 0;
        for (int r = 0; r < n; ++r) sent += send[z(r)] = pair(me, r), received += receive[z(r)] = pair(r, me);
        auto in = std::make_shared<Data<T>>(where, z(sent)), out = std::make_shared<Data<T>>(where, z(received));
        std::int64_t at = 0;
        for (int r = 0; r < n; ++r) fill(*in, ranks[z(me)], send[z(r)], 1000 * r, at), at += send[z(r)];
        Handle h = c.all_to_all_v(in->data(), send, out->data(), receive, dtype);
        running.push_back({std::move(h), [=, this] {
          std::int64_t place = 0;
          for (int r = 0; r < n; ++r)
            for (std::int64_t i = 0; i < receive[z(r)]; ++i, ++place)
              compare((*out)[z(place)], value<T>(op, ranks[z(r)], 1000 * me + i), false, what);
          (void)in;
        }});
        return;
      }
      case 6: {
        const int root = static_cast<int>(op % static_cast<std::uint64_t>(n));
        auto data = std::make_shared<Data<T>>(where, z(count));
        if (me == root) fill(*data, ranks[z(me)], count, 0, 0);
        Handle h = c.broadcast(data->data(), count, dtype, root);
        running.push_back({std::move(h), [=, this] {
          for (std::int64_t i = 0; i < count; ++i) compare((*data)[z(i)], value<T>(op, ranks[z(root)], i), false, what);
        }});
        return;
      }
      case 7: {
        // Everyone sends to the next and receives from the one before, sends first: they must not hold up each other.
        if (n == 1) return;
        const int next = (me + 1) % static_cast<int>(n), before = (me + static_cast<int>(n) - 1) % static_cast<int>(n);
        auto out = std::make_shared<Data<T>>(where, z(count)), in = std::make_shared<Data<T>>(where, z(count));
        fill(*out, ranks[z(me)], count, 0, 0);
        Handle sent = c.send(out->data(), count, dtype, next);
        Handle got = c.receive(in->data(), count, dtype, before);
        running.push_back({std::move(sent), [out] {}});
        running.push_back({std::move(got), [=, this] {
          for (std::int64_t i = 0; i < count; ++i) compare((*in)[z(i)], value<T>(op, ranks[z(before)], i), false, what);
        }});
        return;
      }
      default: c.barrier(); return;
    }
  }

  World& world_;
  std::uint64_t seed_;
  Expect expect_;
  int checks_ = 0;
};

}  // namespace capstan::testing
