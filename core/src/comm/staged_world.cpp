// Collectives among GPUs through host memory. Data goes in pieces: while the hosts are at one, the next comes from the GPU
// and the one before goes back to it.
#include "base/cuda_device.h"
#include "comm/gpu_world.h"
#include "comm/lane.h"
#include "comm/reduce.h"
#include "comm/shared_world.h"

#include <capstan/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>

namespace capstan::comm {
namespace {

using kernels::cuda::CopyStream;
using kernels::cuda::Gpu;
using kernels::cuda::Mark;

constexpr std::int64_t piece_bytes = std::int64_t{4} << 20;  // of one piece on this rank, in and out together

std::byte* at(const void* base, std::int64_t elements, DType dtype) {
  return const_cast<std::byte*>(static_cast<const std::byte*>(base)) + elements * size_of(dtype);
}
double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Pinned memory that the host's other ranks can read in place. Grows.
class Slot {
 public:
  std::byte* room(World& control, Gpu& gpu, std::int64_t bytes) {
    if (bytes > bytes_) {
      clear();
      const std::int64_t size = (std::max<std::int64_t>(bytes, 1) + 65535) / 65536 * 65536;
      memory_ = control.shared_memory(static_cast<std::size_t>(size));
      gpu.pin(memory_.get(), size);
      gpu_ = &gpu, bytes_ = size;
    }
    return static_cast<std::byte*>(memory_.get());
  }
  ~Slot() {
    try {
      clear();
    } catch (...) {
      // A GPU that failed: whoever waits for it says so.
    }
  }
  std::shared_ptr<Mark> free;  ///< when the copies from and to it are done

 private:
  void clear() {
    if (free) free->wait();
    if (gpu_ != nullptr) gpu_->unpin(memory_.get());
    memory_.reset(), gpu_ = nullptr, bytes_ = 0;
  }
  std::shared_ptr<void> memory_;
  Gpu* gpu_ = nullptr;
  std::int64_t bytes_ = 0;
};

/// What moves one after the other: a thread, a stream of copies, two slots that take turns.
struct Line {
  Slot slots[2];
  std::unique_ptr<CopyStream> stream;
  std::shared_ptr<Lane> lane;
};

struct Copy {
  std::int64_t place;
  const void* device;
  std::int64_t bytes;
};
/// One piece: what comes from the GPU to which bytes of the slot, what the hosts do there, what goes back.
struct Piece {
  std::int64_t bytes = 0;
  std::vector<Copy> in, out;
  std::function<void(std::byte* slot)> hosts;
};

class StagedCommunicator final : public Communicator {
 public:
  StagedCommunicator(std::shared_ptr<World> control, std::shared_ptr<Device> device, std::shared_ptr<Communicator> hosts)
      : Communicator(hosts->name(), hosts->ranks(), hosts->rank()),
        control_(std::move(control)),
        device_(std::move(device)),
        hosts_(std::move(hosts)),
        main_(make_line()) {}
  ~StagedCommunicator() override {
    main_->lane->close();
    for (auto& [peer, line] : peers_) line->lane->close();
  }

  Handle all_reduce(void* data, std::int64_t count, DType dtype, Reduction op) override {
    check(Collective::all_reduce, count);
    check_reducible(Collective::all_reduce, dtype);
    return launch(
        *main_, Collective::all_reduce, 2.0 * (size() - 1) / size() * bytes_of(count, dtype), [=, this](const Mark& start) {
          return move(*main_, start, pieces_of(count, dtype, 1), [=, this](std::int64_t k) {
            const auto [from, n] = range(k, count, dtype, 1);
            const Copy copy{0, at(data, from, dtype), n * size_of(dtype)};
            return Piece{
                copy.bytes, {copy}, {copy}, [=, this](std::byte* slot) { hosts_->all_reduce(slot, n, dtype, op).wait(); }};
          });
        });
  }

  Handle reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction op) override {
    check(Collective::reduce_scatter, count);
    check_reducible(Collective::reduce_scatter, dtype);
    return launch(*main_, Collective::reduce_scatter, (size() - 1.0) * bytes_of(count, dtype), [=, this](const Mark& start) {
      return move(*main_, start, pieces_of(count, dtype, size()), [=, this](std::int64_t k) {
        const auto [from, n] = range(k, count, dtype, size());
        Piece piece = blocks(in, from, n, count, dtype, true);
        const std::int64_t sums = piece.bytes;
        piece.out = {{sums, at(out, from, dtype), n * size_of(dtype)}};
        piece.bytes += n * size_of(dtype);
        piece.hosts = [=, this, m = n](std::byte* slot) { hosts_->reduce_scatter(slot, slot + sums, m, dtype, op).wait(); };
        return piece;
      });
    });
  }

  Handle all_gather(const void* in, void* out, std::int64_t count, DType dtype) override {
    check(Collective::all_gather, count);
    return launch(*main_, Collective::all_gather, (size() - 1.0) * bytes_of(count, dtype), [=, this](const Mark& start) {
      return move(*main_, start, pieces_of(count, dtype, size()), [=, this](std::int64_t k) {
        const auto [from, n] = range(k, count, dtype, size());
        Piece piece = blocks(out, from, n, count, dtype, false);
        const std::int64_t mine = piece.bytes;
        piece.in = {{mine, at(in, from, dtype), n * size_of(dtype)}};
        piece.bytes += n * size_of(dtype);
        piece.hosts = [=, this, m = n](std::byte* slot) { hosts_->all_gather(slot + mine, slot, m, dtype).wait(); };
        return piece;
      });
    });
  }

  Handle all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) override {
    check(Collective::all_gather_v, counts);
    std::vector<std::int64_t> of(counts.begin(), counts.end());
    const std::int64_t mine = of[static_cast<std::size_t>(rank())], most = *std::max_element(of.begin(), of.end());
    return launch(*main_, Collective::all_gather_v, (size() - 1.0) * bytes_of(mine, dtype),
                  [=, this, of = std::move(of)](const Mark& start) {
                    return move(*main_, start, pieces_of(most, dtype, size()), [=, this, &of](std::int64_t k) {
                      Piece piece;
                      std::vector<std::int64_t> now = slices(piece.out, piece.bytes, out, of, k, dtype);
                      const std::int64_t sent = piece.bytes, n = now[static_cast<std::size_t>(rank())];
                      piece.in = {{sent, at(in, k * per_piece(dtype, size()), dtype), n * size_of(dtype)}};
                      piece.bytes += n * size_of(dtype);
                      piece.hosts = [=, this, now = std::move(now)](std::byte* slot) {
                        hosts_->all_gather_v(slot + sent, slot, now, dtype).wait();
                      };
                      return piece;
                    });
                  });
  }

  Handle all_to_all(const void* in, void* out, std::int64_t count, DType dtype) override {
    check(Collective::all_to_all, count);
    const std::vector<std::int64_t> counts(static_cast<std::size_t>(size()), count);
    return exchange(Collective::all_to_all, in, counts, out, counts, dtype);
  }
  Handle all_to_all_v(const void* in, std::span<const std::int64_t> send_counts, void* out,
                      std::span<const std::int64_t> receive_counts, DType dtype) override {
    return exchange(Collective::all_to_all_v, in, {send_counts.begin(), send_counts.end()}, out,
                    {receive_counts.begin(), receive_counts.end()}, dtype);
  }

  Handle broadcast(void* data, std::int64_t count, DType dtype, int root) override {
    check(Collective::broadcast, count);
    if (root < 0 || root >= size()) wrong(Collective::broadcast, fmt::format("root {} of {} ranks", root, size()));
    const bool mine = rank() == root;
    return launch(*main_, Collective::broadcast, mine ? bytes_of(count, dtype) : 0, [=, this](const Mark& start) {
      return move(*main_, start, pieces_of(count, dtype, 1), [=, this](std::int64_t k) {
        const auto [from, n] = range(k, count, dtype, 1);
        const Copy copy{0, at(data, from, dtype), n * size_of(dtype)};
        Piece piece{
            copy.bytes, {}, {}, [=, this, m = n](std::byte* slot) { hosts_->broadcast(slot, m, dtype, root).wait(); }};
        (mine ? piece.in : piece.out).push_back(copy);
        return piece;
      });
    });
  }

  Handle send(const void* data, std::int64_t count, DType dtype, int to) override {
    check(Collective::send, count);
    Line& line = line_to(Collective::send, to);
    return launch(line, Collective::send, bytes_of(count, dtype), [=, this, &line](const Mark& start) {
      return move(line, start, pieces_of(count, dtype, 1), [=, this](std::int64_t k) {
        const auto [from, n] = range(k, count, dtype, 1);
        const Copy copy{0, at(data, from, dtype), n * size_of(dtype)};
        return Piece{copy.bytes, {copy}, {}, [=, this, m = n](std::byte* slot) { hosts_->send(slot, m, dtype, to).wait(); }};
      });
    });
  }
  Handle receive(void* data, std::int64_t count, DType dtype, int from) override {
    check(Collective::receive, count);
    Line& line = line_to(Collective::receive, from);
    return launch(line, Collective::receive, 0, [=, this, &line](const Mark& start) {
      return move(line, start, pieces_of(count, dtype, 1), [=, this](std::int64_t k) {
        const auto [begin, n] = range(k, count, dtype, 1);
        const Copy copy{0, at(data, begin, dtype), n * size_of(dtype)};
        return Piece{
            copy.bytes, {}, {copy}, [=, this, m = n](std::byte* slot) { hosts_->receive(slot, m, dtype, from).wait(); }};
      });
    });
  }

  /// Of the hosts, once their GPUs have ended what was called before.
  void barrier() override {
    const std::shared_ptr<Mark> start = gpu().mark();
    main_->lane
        ->submit(Collective::barrier,
                 [this, start] {
                   start->wait();
                   main_->stream->mark()->wait();
                   hosts_->barrier();
                   record(name_of(Collective::barrier), 1, 0, 0, 0);
                 })
        ->wait();
  }

 private:
  struct Flight {
    std::shared_ptr<Task> task;
    std::shared_ptr<Mark> end;  // once the task is done
  };
  struct Wait final : Handle::Operation {
    Wait(std::shared_ptr<Device> d, std::shared_ptr<Flight> f) : device(std::move(d)), flight(std::move(f)) {}
    void wait() override {
      flight->task->wait();
      if (flight->end) gpu_of(*device).after(*flight->end);
    }
    bool done() override { return flight->task->done() && (!flight->end || flight->end->reached()); }
    std::shared_ptr<Device> device;
    std::shared_ptr<Flight> flight;
  };

  Gpu& gpu() const { return gpu_of(*device_); }
  static double bytes_of(std::int64_t count, DType dtype) { return static_cast<double>(count * size_of(dtype)); }
  /// Elements of each of `ways` blocks in one piece.
  static std::int64_t per_piece(DType dtype, int ways) {
    return std::max<std::int64_t>(1, piece_bytes / ((ways + 1) * size_of(dtype)));
  }
  static std::int64_t pieces_of(std::int64_t count, DType dtype, int ways) {
    const std::int64_t per = per_piece(dtype, ways);
    return std::max<std::int64_t>(1, (count + per - 1) / per);  // the hosts meet even for nothing
  }
  /// First element and count of piece k.
  static std::pair<std::int64_t, std::int64_t> range(std::int64_t k, std::int64_t count, DType dtype, int ways) {
    const std::int64_t per = per_piece(dtype, ways);
    return {k * per, std::min(per, count - k * per)};
  }
  /// Elements [from, from + n) of each rank's block of `count`, one after the other in the slot.
  Piece blocks(const void* base, std::int64_t from, std::int64_t n, std::int64_t count, DType dtype, bool in) const {
    Piece piece;
    for (int r = 0; r < size(); ++r) {
      (in ? piece.in : piece.out).push_back({piece.bytes, at(base, r * count + from, dtype), n * size_of(dtype)});
      piece.bytes += n * size_of(dtype);
    }
    return piece;
  }
  /// Piece k of blocks of different sizes: their copies from `bytes` on, and how many elements of each.
  std::vector<std::int64_t> slices(std::vector<Copy>& copies, std::int64_t& bytes, const void* base,
                                   const std::vector<std::int64_t>& counts, std::int64_t k, DType dtype) const {
    const std::int64_t per = per_piece(dtype, size());
    std::vector<std::int64_t> now;
    std::int64_t begin = 0;
    for (const std::int64_t count : counts) {
      const std::int64_t n = std::clamp<std::int64_t>(count - k * per, 0, per);
      if (n > 0) copies.push_back({bytes, at(base, begin + k * per, dtype), n * size_of(dtype)});
      bytes += n * size_of(dtype), begin += count;
      now.push_back(n);
    }
    return now;
  }

  Handle exchange(Collective collective, const void* in, std::vector<std::int64_t> send_counts, void* out,
                  std::vector<std::int64_t> receive_counts, DType dtype) {
    check(collective, send_counts);
    check(collective, receive_counts);
    const auto me = static_cast<std::size_t>(rank());
    if (send_counts[me] != receive_counts[me])
      wrong(collective, "what a rank sends to itself is not what it receives from itself");
    const std::int64_t all = std::accumulate(send_counts.begin(), send_counts.end(), std::int64_t{0}) - send_counts[me];
    return launch(*main_, collective, bytes_of(all, dtype),
                  [=, this, s = std::move(send_counts), r = std::move(receive_counts)](const Mark& start) {
                    // Nobody knows the others' counts, and all must come to equally many pieces.
                    std::int64_t pieces =
                        pieces_of(std::max(*std::max_element(s.begin(), s.end()), *std::max_element(r.begin(), r.end())),
                                  dtype, size());
                    if (collective == Collective::all_to_all_v)
                      hosts_->all_reduce(&pieces, 1, DType::i64, Reduction::max).wait();
                    return move(*main_, start, pieces, [=, this, &s, &r](std::int64_t k) {
                      Piece piece;
                      std::vector<std::int64_t> sent = slices(piece.in, piece.bytes, in, s, k, dtype);
                      const std::int64_t received = piece.bytes;
                      std::vector<std::int64_t> got = slices(piece.out, piece.bytes, out, r, k, dtype);
                      piece.hosts = [=, this, sent = std::move(sent), got = std::move(got)](std::byte* slot) {
                        hosts_->all_to_all_v(slot, sent, slot + received, got, dtype).wait();
                      };
                      return piece;
                    });
                  });
  }

  template <class Body>
  Handle launch(Line& line, Collective collective, double bytes, Body body) {
    const auto flight = std::make_shared<Flight>();
    flight->task =
        line.lane->submit(collective, [this, collective, bytes, flight, start = gpu().mark(), body = std::move(body)] {
          const auto begin = std::chrono::steady_clock::now();
          flight->end = body(*start);
          record(name_of(collective), 1, bytes, seconds_since(begin), 0);
        });
    return Handle(std::make_shared<Wait>(device_, flight));
  }

  /// Returns when the last piece is on its way back to the GPU: the mark is where it arrives.
  template <class PieceOf>
  std::shared_ptr<Mark> move(Line& line, const Mark& start, std::int64_t pieces, PieceOf&& piece_of) {
    CopyStream& stream = *line.stream;
    stream.after(start);
    struct Loaded {
      Piece piece;
      std::byte* memory = nullptr;
      std::shared_ptr<Mark> arrived;
    } loaded[2];
    const auto load = [&](std::int64_t k) {
      Loaded& l = loaded[k % 2];
      Slot& slot = line.slots[k % 2];
      l.piece = piece_of(k);
      l.memory = slot.room(*control_, gpu(), l.piece.bytes);
      for (const Copy& c : l.piece.in) stream.download(l.memory + c.place, c.device, c.bytes);
      // Once it is reached, what went back from this slot before is back too.
      slot.free = l.arrived = stream.mark();
    };
    load(0);
    for (std::int64_t k = 0; k < pieces; ++k) {
      if (k + 1 < pieces) load(k + 1);
      Loaded& l = loaded[k % 2];
      l.arrived->wait();
      l.piece.hosts(l.memory);
      for (const Copy& c : l.piece.out) stream.upload(const_cast<void*>(c.device), l.memory + c.place, c.bytes);
      if (!l.piece.out.empty()) line.slots[k % 2].free = stream.mark();
    }
    return stream.mark();
  }

  std::unique_ptr<Line> make_line() {
    auto line = std::make_unique<Line>();
    line->stream = gpu().make_copy_stream();
    line->lane = std::make_shared<Lane>([this](Collective collective, const std::function<void()>& body) {
      const auto start = std::chrono::steady_clock::now();
      body();
      record(name_of(collective), 0, 0, 0, seconds_since(start));
    });
    return line;
  }
  /// Each (peer, direction) has its own: a send that waits for room must not hold up the receive that makes it.
  Line& line_to(Collective collective, int peer) {
    if (peer < 0 || peer >= size() || peer == rank())
      wrong(collective, fmt::format("peer {} of {} ranks, this is {}", peer, size(), rank()));
    const std::scoped_lock lock(mutex_);
    std::unique_ptr<Line>& line = peers_[{peer, collective == Collective::send}];
    if (!line) line = make_line();
    return *line;
  }

  [[noreturn]] void wrong(Collective collective, const std::string& what) const {
    fail(Fault::programming, fmt::format("{} of communicator '{}'", name_of(collective), name()), what);
  }
  void check(Collective collective, std::int64_t count) const {
    if (count < 0) wrong(collective, fmt::format("negative count {}", count));
  }
  void check(Collective collective, std::span<const std::int64_t> counts) const {
    if (static_cast<int>(counts.size()) != size())
      wrong(collective, fmt::format("{} counts for {} ranks", counts.size(), size()));
    for (const std::int64_t n : counts) check(collective, n);
  }
  void check_reducible(Collective collective, DType dtype) const {
    if (!reducible(dtype))
      wrong(collective, fmt::format("cannot reduce {}: expected f32, f64, bf16, i32, i64 or u8", name_of(dtype)));
  }

  std::shared_ptr<World> control_;
  std::shared_ptr<Device> device_;
  std::shared_ptr<Communicator> hosts_;
  std::unique_ptr<Line> main_;
  std::mutex mutex_;
  std::map<std::pair<int, bool>, std::unique_ptr<Line>> peers_;
};

class StagedWorld final : public World {
 public:
  StagedWorld(std::shared_ptr<World> control, std::shared_ptr<Device> device)
      : control_(std::move(control)), device_(std::move(device)) {
    gpu_of(*device_);
  }
  int rank() const override { return control_->rank(); }
  int size() const override { return control_->size(); }
  int local_rank() const override { return control_->local_rank(); }
  int local_size() const override { return control_->local_size(); }
  std::string_view backend() const override { return "staged"; }
  std::shared_ptr<Communicator> make(std::string name, std::vector<int> ranks) override {
    checked_group(name, ranks, rank(), size());
    if (ranks.size() == 1) return make_gpu_solo(std::move(name), std::move(ranks), device_);
    return std::make_shared<StagedCommunicator>(control_, device_, control_->make(std::move(name), std::move(ranks)));
  }
  std::shared_ptr<void> shared_memory(std::size_t bytes) override {
    void* const data = device_->allocate(static_cast<std::int64_t>(bytes));
    return {data, [device = device_, bytes](void* p) { device->release(p, static_cast<std::int64_t>(bytes)); }};
  }
  void at(std::int64_t step, std::string_view doing) override { control_->at(step, doing); }
  bool fail_job(const std::string& message) noexcept override { return control_->fail_job(message); }
  void end_failed(int exit_code) override { control_->end_failed(exit_code); }
  double timeout() const override { return control_->timeout(); }

 private:
  std::shared_ptr<World> control_;
  std::shared_ptr<Device> device_;
};

}  // namespace
}  // namespace capstan::comm

namespace capstan {

std::shared_ptr<World> make_staged_world(std::shared_ptr<World> control, std::shared_ptr<Device> device) {
  if (!control || !device)
    fail(Fault::programming, "communicator", "a world of GPUs needs one of their hosts, and a device");
  return std::make_shared<comm::StagedWorld>(std::move(control), std::move(device));
}

}  // namespace capstan
