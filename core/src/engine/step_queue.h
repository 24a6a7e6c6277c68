// defines: Recording, QueuedStep, StepNumbers, StepQueue: training steps on a device whose work runs behind its calls. The host
// asks for a step, forward to update, and reads later what it came to; forward and backward of a microbatch, and the update, are
// recorded once and replayed.
#pragma once
#include "engine/sharding.h"

#include <capstan/export.h>
#include <capstan/model.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <tuple>
#include <vector>

namespace capstan {

namespace kernels {
class Queue;
struct Piece;
}  // namespace kernels
class Engine;

/// run.cuda_graphs. `required`: what cannot be recorded is an error that says why.
enum class Recording : std::uint8_t { off, automatic, required };

/// A step under way: how to ask what it came to.
struct QueuedStep {
  std::int64_t ticket = -1;
  std::vector<double> weights;  ///< of its losses
};

/// What a step came to. Not updated: a loss or gradient was not finite, in it or in one before; nothing has changed since.
struct StepNumbers {
  double loss = 0;      ///< this rank's part
  double norm = 0;      ///< of the whole gradient
  bool updated = true;  ///< the same on all ranks
};

/// A gate on the device stands between gradient and weights: it shuts when a loss or gradient of any rank is not finite and stays
/// shut for the steps that were queued behind, until reopen(). All ranks call the same members. Recorded work is keyed by capacities: rows, sequences (rounded up
/// to a power of two), whether all are of one length, whether the microbatch is a step's first, which overwrites gradients
/// where later ones add, and of several ranks whether it is the last, beside whose backward gradients are summed. A batch of a new kind runs unrecorded once, so that products are chosen and plans made; so does the first
/// update. Ahead of each replay of the update the optimizer is asked again, nothing runs, and its numbers of this step go along.
/// Forms made from the weights (fp8) lie outside of records and are made anew once a step, with the update.
/// Several ranks record and replay the same kinds in the same order, or none: their hosts compare the kinds of a step's batches
/// before it, and what came of a record before its first replay. Their update, which communicates by itself, is not recorded.
class CAPSTAN_API StepQueue {
 public:
  StepQueue(Engine& engine, Recording recording);
  ~StepQueue();
  StepQueue(const StepQueue&) = delete;
  StepQueue& operator=(const StepQueue&) = delete;

  QueuedStep run(std::span<const Batch> batches, std::int64_t step, double lr_scale, double clip);
  StepNumbers collect(const QueuedStep& step);
  void reopen();
  /// Why nothing is recorded any more; "" otherwise.
  const std::string& why_not() const { return why_not_; }
  /// Steps that ran unrecorded because ranks had batches of different kinds.
  std::int64_t differing() const { return differing_; }
  std::int64_t recorded() const;  ///< kinds of batches
  /// A point in the device's work, and the seconds that it took from one to a later one; each is good for one question.
  std::int64_t mark();
  double seconds(std::int64_t begin, std::int64_t end);
  /// What is asked from now on starts at release(), or after `seconds`.
  void hold(double seconds);
  void release();

 private:
  using Key = std::tuple<std::int64_t, std::int64_t, bool, bool, bool>;
  struct Walk {
    Batch batch;                  // what the records read
    Tensor outs;                  // f64: the losses
    std::vector<double> weights;  // theirs
    std::vector<Leaf*> filled;    // by the walk
    std::vector<GradientState> units;  // behind it
    std::int64_t record = -1;
    bool warm = false;
  };
  struct Kind {
    Key key;
    std::string refusal;  ///< why work on such a batch cannot be recorded; ""
  };
  /// Where a microbatch stands in its step.
  struct Place { bool first, last; };
  Kind kind_of(const Batch& local, Place place) const;
  bool agreed(std::span<const Batch> batches) const;
  bool failed_anywhere(bool here) const;
  void replay(Walk& walk, std::uint64_t step);
  void microbatch(const Batch& batch, std::uint64_t step, Place place, QueuedStep& queued);
  void shut_together(std::int64_t losses, double clip);
  void keep(const std::vector<LossEntry>& entries, QueuedStep& queued, std::vector<double>* weights = nullptr);
  void plain(const Batch& batch, std::uint64_t step, bool last, QueuedStep& queued, std::vector<double>* weights = nullptr);
  bool record(Walk& walk, std::uint64_t step, bool last);
  void forget_records();
  void update(std::int64_t step, double lr_scale);
  void refresh_forms() const;
  Tensor losses(std::int64_t from, std::int64_t count) const;
  std::vector<Leaf*> leaves() const;

  Engine& engine_;
  kernels::Queue& queue_;
  std::int64_t differing_ = 0;
  Recording recording_;
  Tensor results_;  // f64: a Gate, then the losses of a step
  Tensor parts_;    // f64: a GatePart of each rank that has a part of the gradient
  std::map<Key, Walk> walks_;
  bool update_warm_ = false, update_plain_ = false;
  std::int64_t update_record_ = -1;
  std::string why_not_;
};

}  // namespace capstan
