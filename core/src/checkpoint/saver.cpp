// The saver's thread and the hand-over of one snapshot at a time.
#include "checkpoint/saver.h"

#include "checkpoint/staging.h"
#include "checkpoint/writers.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

namespace capstan::checkpoint {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Names a temporary folder that no other attempt, of this process or an earlier one, has used.
std::string new_attempt() {
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  char text[48];
  std::snprintf(text, sizeof text, "%ld-%llx", static_cast<long>(::getpid()), static_cast<unsigned long long>(now));
  return text;
}

// Held while a Saver lives; the kernel drops it when the process dies, however it dies.
class FolderLock {
 public:
  explicit FolderLock(const Path& root) {
    const auto path = root / ".lock";
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd_ < 0) fail_system(path, "be created", errno);
    if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      const int code = errno;
      ::close(fd_);
      if (code != EWOULDBLOCK)
        fail(Fault::input, path.string(), std::string("cannot be locked: ") + std::strerror(code) + "; put the run on a file system with locks, with run.dir=PATH");
      fail(Fault::input, root.string(), "another process is saving checkpoints here; stop it or choose another run.dir");
    }
  }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  ~FolderLock() { ::close(fd_); }

 private:
  int fd_ = -1;
};

// The checkpoint itself is safe.
class RetentionError : public Error {
  using Error::Error;
};

/// `whole`: this rank's boxes are all that there are.
void check(const Snapshot& snapshot, bool whole) {
  std::map<std::string, std::pair<const SavedTensor*, std::vector<Box>>> boxes;
  for (const auto& t : snapshot.tensors) {
    const auto where = "checkpoint, tensor " + t.name;
    if (const auto why = name_fault(t.name); !why.empty()) fail(Fault::programming, where, why);
    const auto total = volume(t.global_shape);
    if (!total || !inside(t.box, t.global_shape)) {
      fail(Fault::programming, where,
           "box " + text_of(t.box) + " is not inside the global shape " + text_of(t.global_shape));
    }
    const auto bytes = *volume(t.box.extent) * size_of(t.dtype);
    if (t.bytes != bytes || (bytes > 0 && t.data == nullptr)) {
      fail(Fault::programming, where,
           "expected " + std::to_string(bytes) + " bytes of data, got " +
               (t.data == nullptr ? "none" : std::to_string(t.bytes)));
    }
    auto& [first, all] = boxes.try_emplace(t.name, &t, std::vector<Box>()).first->second;
    if (first->dtype != t.dtype || first->global_shape != t.global_shape) {
      fail(Fault::programming, where, "its boxes have different element types or global shapes");
    }
    all.push_back(t.box);
  }
  if (!whole) return;  // the manifest is checked when all are together
  for (const auto& [name, entry] : boxes) {
    if (const auto why = tiling_fault(entry.first->global_shape, entry.second); !why.empty()) {
      fail(Fault::programming, "checkpoint, tensor " + name, why);
    }
  }
}

}  // namespace

struct Saver::Impl {
  struct Job {
    Snapshot snapshot;
    double waited = 0, copied = 0;
  };

  Path root;
  std::shared_ptr<CheckpointFormat> format;
  SaverOptions options;
  Staging staging;
  Writers writers;
  std::unique_ptr<FolderLock> lock;

  mutable std::mutex mutex;
  std::condition_variable changed;
  std::optional<Job> job;  // taken and worked on by the thread; empty again when that is done
  std::optional<Error> error;
  SaveReport report;
  bool stopping = false;
  std::thread thread;

  Impl(Path r, std::shared_ptr<CheckpointFormat> f, SaverOptions o)
      : root(std::move(r)),
        format(std::move(f)),
        options(std::move(o)),
        staging(options.copy_threads > 0 ? options.copy_threads
                                         : static_cast<int>(std::thread::hardware_concurrency() / 2)),
        writers(options.writers) {}

  void reached(std::string_view stage) const {
    if (options.fault_hook) options.fault_hook(stage);
  }

  void wait_idle() {
    std::unique_lock guard(mutex);
    changed.wait(guard, [this] { return !job; });
  }

  void work() {
    for (;;) {
      {
        std::unique_lock guard(mutex);
        changed.wait(guard, [this] { return job || stopping; });
        if (!job) return;
      }
      const auto start = Clock::now();
      std::optional<Error> failure;
      bool saved = false;
      SaveReport done;
      try {
        done.bytes = write(job->snapshot);
      } catch (const RetentionError& e) {
        failure = e;
        saved = true;
      } catch (const Error& e) {
        failure = explained(e.fault(), e.what());
      } catch (const std::exception& e) {
        failure = explained(Fault::runtime, e.what());
      }
      done.step = job->snapshot.step, done.waited_seconds = job->waited, done.snapshot_seconds = job->copied;
      done.write_seconds = seconds_since(start);
      {
        const std::lock_guard guard(mutex);
        if (!failure || saved) report = done;
        if (failure) error = std::move(failure);
        job.reset();
      }
      changed.notify_all();
    }
  }

  std::int64_t write(Snapshot& snapshot) {
    const auto name = writers.from_first(new_attempt());
    Attempt attempt(root, snapshot.step, name, options.fault_hook);
    std::int64_t bytes = 0;
    try {
      writers.together([&] {
        if (writers.first()) attempt.create();
      });
      ShardReport mine;
      writers.together([&] {
        if (!snapshot.tensors.empty()) {
          const auto [file, record] = attempt.write_shard(*format, writers.rank(), snapshot.tensors);
          mine.file = file, mine.bytes = record.bytes, mine.xxh3 = record.xxh3;
        }
      });
      mine.tensors = snapshot.tensors;
      std::map<std::string, FileRecord> shards;
      std::vector<SavedTensor> tensors;
      if (writers.size() == 1) {
        if (!mine.file.empty()) shards[mine.file] = {mine.bytes, mine.xxh3};
        tensors = std::move(mine.tensors);
      } else {
        const std::vector<std::string> texts = writers.gather(to_text(mine));
        for (std::size_t r = 0; writers.first() && r < texts.size(); ++r) {
          ShardReport report = shard_report_from(texts[r]);
          if (!report.file.empty()) shards[report.file] = {report.bytes, report.xxh3};
          for (SavedTensor& t : report.tensors) tensors.push_back(std::move(t));
        }
      }
      writers.together([&] {
        if (writers.first()) bytes = attempt.commit(*format, tensors, shards, snapshot.state_json);
      });
      bytes = std::stoll(writers.from_first(std::to_string(bytes)));
    } catch (...) {
      if (writers.first()) attempt.abandon();
      throw;
    }
    try {
      writers.together([&] {
        if (writers.first()) attempt.remove_replaced(), retain_newest(root, snapshot.step, options.keep, name, options.fault_hook);
      });
    } catch (const Error& e) {
      throw RetentionError(e.fault(), "[checkpoint of step " + std::to_string(snapshot.step) +
                                          "] saved, but older checkpoints could not be removed: " + e.what());
    }
    reached("done");
    return bytes;
  }

  // Says what the person before the terminal must know: what failed, why, how much room there is, what remains.
  Error explained(Fault fault, const std::string& why) const {
    std::int64_t needed = 0;
    for (const auto& t : job->snapshot.tensors) needed += t.bytes;
    std::string text = "[checkpoint of step " + std::to_string(job->snapshot.step) + "] not saved: " + why + " (it needs " +
                       std::to_string(needed) + " bytes";
    if (const auto available = available_bytes(root); available >= 0)
      text += ", " + std::to_string(available) + " are available";
    return Error(fault, text + " in " + root.string() + "); earlier checkpoints are untouched");
  }
};

Saver::Saver(Path root, std::shared_ptr<CheckpointFormat> format, SaverOptions options)
    : impl_(std::make_unique<Impl>(std::filesystem::absolute(root), std::move(format), std::move(options))) {
  if (!impl_->format) fail(Fault::programming, "checkpoint", "a Saver needs a format");
  impl_->writers.together([&] {
    if (!impl_->writers.first()) return;
    make_folder(impl_->root);
    impl_->lock = std::make_unique<FolderLock>(impl_->root);
    clean(impl_->root);
  });
  impl_->thread = std::thread([impl = impl_.get()] { impl->work(); });
}

Saver::~Saver() {
  wait();
  {
    const std::lock_guard guard(impl_->mutex);
    impl_->stopping = true;
  }
  impl_->changed.notify_all();
  impl_->thread.join();
}

void Saver::reserve(std::span<const std::int64_t> bytes) {
  wait();
  if (impl_->options.asynchronous) impl_->staging.reserve(bytes);
}

void Saver::save(const Snapshot& snapshot) {
  check(snapshot, impl_->writers.size() == 1);
  const auto start = Clock::now();
  impl_->wait_idle();
  Impl::Job job{snapshot, seconds_since(start), 0};
  impl_->reached("snapshot begun");
  if (impl_->options.asynchronous) {
    const auto begin = Clock::now();
    impl_->staging.copy(job.snapshot.tensors);
    job.copied = seconds_since(begin);
  }
  impl_->reached("snapshot taken");
  {
    const std::lock_guard guard(impl_->mutex);
    impl_->job = std::move(job);
  }
  impl_->changed.notify_all();
  if (!impl_->options.asynchronous) impl_->wait_idle();
}

void Saver::wait() { impl_->wait_idle(); }

bool Saver::busy() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->job.has_value();
}

std::optional<Error> Saver::take_error() {
  const std::lock_guard guard(impl_->mutex);
  return std::exchange(impl_->error, std::nullopt);
}

SaveReport Saver::last_report() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->report;
}

}  // namespace capstan::checkpoint
