// defines: Writers: the ranks that write one checkpoint together.
#pragma once
#include "comm/communicator.h"

#include <capstan/checkpoint.h>
#include <capstan/error.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace capstan::checkpoint {

/// Talks among the savers' threads. No rank throws alone: each says at every station how it fared, and all go on or all
/// give up, with one message that names the ranks.
class Writers {
 public:
  /// `communicator` null: one writer.
  explicit Writers(std::shared_ptr<Communicator> communicator) : communicator_(std::move(communicator)) {}
  int rank() const { return communicator_ ? communicator_->rank() : 0; }
  int size() const { return communicator_ ? communicator_->size() : 1; }
  bool first() const { return rank() == 0; }

  /// Every rank's text, in rank order.
  std::vector<std::string> gather(const std::string& mine);
  /// Rank 0's text.
  std::string from_first(const std::string& mine);
  /// Runs `work` here (an empty function: nothing to do) and hears how the others fared. Throws on every rank when it
  /// failed on any: the fault of the first, and a message that names each.
  template <class F>
  void together(F&& work) {
    std::optional<Error> failure;
    try {
      work();
    } catch (const Error& e) {
      failure = e;
    } catch (const std::exception& e) {
      failure = Error(Fault::runtime, e.what());
    }
    agree(failure);
  }

 private:
  void agree(const std::optional<Error>& failure);
  std::shared_ptr<Communicator> communicator_;
};

/// What rank 0 must know of another's shard to write the manifest.
struct ShardReport {
  std::vector<SavedTensor> tensors;  ///< without data
  std::string file;                  ///< "" when it had nothing to write
  std::int64_t bytes = 0;
  std::uint64_t xxh3 = 0;
};
std::string to_text(const ShardReport& report);
ShardReport shard_report_from(const std::string& text);

}  // namespace capstan::checkpoint
