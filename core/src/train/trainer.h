// defines: Trainer: the loop, on one screen (Trainer::run), and what it calls; Interrupted.
#pragma once
#include "checkpoint/loader.h"
#include "checkpoint/saver.h"
#include "data/loader.h"
#include "optim/schedule.h"
#include "terminal/display.h"
#include "train/estimate.h"
#include "train/run_folder.h"
#include "train/session.h"

#include <capstan/error.h>
#include <capstan/export.h>
#include <capstan/inference.h>

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace capstan::train {

/// What one optimizer step came to.
struct StepResult {
  double loss = 0;                 ///< weighted sum of the ledger: mean nats per token for language models
  double grad_norm = 0;
  double lr = 0;
  std::int64_t tokens = 0;
  double seconds = 0;
  bool updated = false;            ///< the weights have changed already: it was finite
  bool finite() const;
};

/// A signal came before there was anything to save. No rank failed: with several, the words are those of one.
class CAPSTAN_API Interrupted : public Error {
 public:
  using Error::Error;
};

class CAPSTAN_API Trainer {
 public:
  /// Opens data and the run's folder, prints the header, takes the model's memory where the session has not (place()), and
  /// resumes as run.resume says. `interrupted` is asked after each step, and several times a second while data sets are
  /// built (over several ranks by another thread): a signal's number, or 0; then Interrupted is thrown, on the rank that
  /// builds. Over several ranks each has a trainer, and all members are for all ranks.
  Trainer(std::unique_ptr<Session> session, std::function<int()> interrupted);
  ~Trainer();

  /// Trains to the recipe's last step or to an interruption, after which a checkpoint is on the disk.
  /// Returns the signal's number, 0 when all steps are done.
  int run();

  std::int64_t step() const { return step_; }
  const std::string& folder() const { return folder_.path(); }
  /// A line in this rank's log.
  void log(const std::string& line) { folder_.log(line); }

 private:
  /// A step's batches, and where the data stands behind them.
  struct Fetched {
    std::vector<Batch> batches;
    data::DataCursor after;
  };
  /// A step that was asked for and whose result is not read yet.
  struct Flight {
    std::int64_t step = 0;
    Fetched data;
    QueuedStep queued;
    std::chrono::steady_clock::time_point begin;
  };
  Fetched fetch();
  StepResult forward_backward(std::int64_t step);
  /// The whole step, one ahead of its result where nothing else is due between.
  StepResult queued_step(std::int64_t step, int& signal);
  void queue_step(std::int64_t step);
  bool due_after(std::int64_t step) const;
  std::int64_t tokens_of_step() const;
  /// The sum of every rank's part of a loss.
  double sum_of_losses(double mine) const;
  /// What ranks decide together: the largest signal of any, and whether rank 0's clock says that a save is due.
  int agree(int signal);
  bool accept(const StepResult& result, std::int64_t step);
  void report(const StepResult& result);
  /// A line of metrics.jsonl. A full disk costs lines, not the run.
  void metric(const std::string& json);
  void after_step(const StepResult& result);
  void watch_spikes(const StepResult& result);
  void validate();
  void sample();
  void write_sample();
  void save();
  void check_replicas();
  void poll_saver();
  void resume();
  std::optional<checkpoint::Loaded> load(checkpoint::OnDamage on_damage, const std::function<void(const std::string&)>& report);
  void roll_back(const std::string& why);
  void print_header();
  void finish(int signal);
  void report_communication();
  std::string metric_line(const StepResult& result) const;

  std::unique_ptr<Session> session_;
  std::function<int()> interrupted_;
  RunFolder folder_;
  terminal::Display display_;
  Estimate estimate_;
  LearningRate schedule_;
  std::shared_ptr<Optimizer> optimizer_;
  std::unique_ptr<data::DataSource> data_;
  std::unique_ptr<checkpoint::Saver> saver_;
  std::shared_ptr<InferenceEngine> inference_;

  std::deque<Fetched> fetched_;  // taken from the data already, to be trained on next
  std::deque<Flight> flights_;   // in order; of a device that works behind the calls
  data::DataCursor cursor_;      // behind the batches of the step at hand
  bool queued_ = false;          // steps are asked for ahead of their results
  bool told_why_not_recorded_ = false, told_kinds_differ_ = false;

  std::int64_t step_ = 0, steps_ = 0, tokens_ = 0, saved_step_ = -1, timed_steps_ = 0;
  double clip_ = 0, peak_ = 0, run_seconds_ = 0;
  double spike_mean_ = 0, spike_square_ = 0;
  std::int64_t spike_count_ = 0, refused_in_a_row_ = 0, refused_step_ = 0;
  bool save_due_ = false;  // by rank 0's clock
  std::int64_t checked_step_ = -1;
  bool bigram_asked_ = false;
  std::optional<double> bigram_, validation_;  // bigram_: on rank 0
  std::chrono::steady_clock::time_point last_save_, started_, last_result_;
};

}  // namespace capstan::train
