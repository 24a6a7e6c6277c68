// defines: Queue: what a device offers whose work runs behind its calls: results that are read later, a gate between a
// gradient and the weights, marks in time, and work that is recorded once and replayed. Backend::queue() gives it.
#pragma once
#include <kernels/types.h>

#include <cstdint>
#include <span>
#include <string>

namespace capstan::kernels {

/// What a step's gradient came to, on the device, where the optimizers' kernels read it.
struct Gate {
  double norm = 0;        ///< of the gradient
  double factor = 1;      ///< optimizers take the gradient times this: clipping
  std::int64_t shut = 0;  ///< not 0: a loss or gradient was not finite; stays so until open_gate()
};

/// A rank's part of what a Gate is made from, on the device.
struct GatePart {
  double squares = 0;  ///< of its part of the gradient, summed
  double losses = 0;   ///< their sum: not finite when one of them is not
};

/// Calls come from the thread that calls the backend, and run in its order.
class Queue {
 public:
  virtual ~Queue() = default;

  /// Fills *part (on the device) from this rank's pieces (f32 and f64, added as Backend::sum_of_squares adds them) and losses.
  virtual void measure(std::span<const Piece> gradient, const double* losses, std::int64_t count, GatePart* part) = 0;
  /// Fills *gate (on the device) from the parts of all ranks, added in their order: the norm, the factor that brings it down to
  /// `clip` (0: none); shuts it when the norm or a loss is not finite.
  virtual void decide(const GatePart* parts, std::int64_t ranks, double clip, Gate* gate) = 0;
  /// Until it is called with null: adamw(), sgd(), momentum() and axpby() leave everything as it is when *gate is shut, and
  /// the first three take gradients times gate->factor.
  virtual void obey(const Gate* gate) = 0;
  virtual void open_gate(Gate* gate) = 0;

  /// Copies up to post_bytes of device memory to the host when the work before is done. At most post_slots are under way.
  static constexpr std::int64_t post_bytes = 4096, post_slots = 8;
  virtual std::int64_t post(const void* from, std::int64_t bytes) = 0;
  /// Waits for that copy alone, whatever was queued behind it; throws what kernels found wrong until then.
  virtual void collect(std::int64_t ticket, void* host_to, std::int64_t bytes) = 0;

  /// A point in the order of work, and the seconds that the device took from one to a later one (waits for it; both are
  /// forgotten).
  virtual std::int64_t mark() = 0;
  virtual double seconds(std::int64_t begin, std::int64_t end) = 0;

  /// What is asked from now on starts at release(), or after `seconds`: work can be all there before any of it begins.
  virtual void hold(double seconds) = 0;
  virtual void release() = 0;

  /// From here on calls are recorded instead of run. What the work reads and writes keeps its address: memory taken while
  /// recording comes from a region of its own that all records share, so all of it must have been given back by the end.
  /// A call that would wait, bring values of the host, or use random numbers of another step than `step` throws
  /// std::runtime_error, and cancel_record() must follow.
  virtual void begin_record(std::uint64_t step) = 0;
  /// Ends it; nothing has run yet. Throws std::runtime_error when memory taken before was given back inside, or the other
  /// way round.
  virtual std::int64_t end_record() = 0;
  virtual void cancel_record() noexcept = 0;
  /// Until end_rehearsal() calls run nothing: those that the record was made of come again, and the numbers of adamw(), sgd(),
  /// momentum() and axpby() are what replays take from here on. Throws std::runtime_error, there or at a call, when they are
  /// others: cancel_rehearsal() must follow.
  virtual void begin_rehearsal(std::int64_t record) = 0;
  virtual void end_rehearsal() = 0;
  virtual void cancel_rehearsal() noexcept = 0;
  /// Runs it with `step` in place of the step it was recorded with.
  virtual void replay(std::int64_t record, std::uint64_t step) = 0;
  virtual void forget_record(std::int64_t record) noexcept = 0;
  /// Bytes that records keep for themselves.
  virtual std::int64_t record_bytes() const = 0;

  /// From here on each kind of product is timed once, among the algorithms that the library proposes, and the choice is kept
  /// in `file` ("": only in memory) for every later run. Throws std::runtime_error on a damaged file, naming the line.
  /// Returns what was found there, in words.
  virtual std::string tune_products(const std::string& file) = 0;
};

}  // namespace capstan::kernels
