#include "train/run_folder.h"

#include "base/look.h"
#include "checkpoint/commit.h"
#include "checkpoint/files.h"

#include <capstan/error.h>

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

namespace capstan::train {

namespace fs = std::filesystem;

namespace {
/// Replaces a small file in one step: the old one or the new one is there, never half of one.
void replace_file(const fs::path& file, const std::string& text) {
  const fs::path fresh = file.string() + ".tmp";
  {
    std::ofstream out(fresh, std::ios::binary);
    out << text;
    out.flush();
    if (!out) {
      const int code = errno;
      std::error_code ignored;
      if (!is_folder(fresh)) fs::remove(fresh, ignored);
      fail(Fault::runtime, fresh.string(), std::string("cannot write: ") + std::strerror(code) + "; free space or choose another run.dir");
    }
  }
  std::error_code error;
  fs::rename(fresh, file, error);
  if (error) fail(Fault::runtime, file.string(), "cannot be replaced: " + reason_and_advice(error) + " with run.dir");
}

/// Nothing when there is no such file. One that cannot be read may be whole: Unreadable, as of a checkpoint.
std::string text_of_metrics(const fs::path& file) {
  try {
    return is_there(file) ? checkpoint::read_file(file) : "";
  } catch (const Error& e) {
    throw checkpoint::Unreadable(e.fault(), std::string(e.what()) + ". The run goes on in this file, which may be good: nothing is replaced");
  }
}
}  // namespace

int LineFile::append(const std::string& line) {
  if (file_ < 0) file_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file_ < 0) return errno;
  if (whole_ >= 0 && ::ftruncate(file_, whole_) != 0) return errno;
  whole_ = -1;
  struct stat before {};
  if (::fstat(file_, &before) != 0) return errno;
  const std::string text = line + '\n';
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(file_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int code = n < 0 ? errno : ENOSPC;
      if (done > 0 && ::ftruncate(file_, before.st_size) != 0) whole_ = before.st_size;
      return code;
    }
    done += static_cast<std::size_t>(n);
  }
  return 0;
}

void LineFile::close() {
  if (file_ >= 0) ::close(file_);
  file_ = -1, whole_ = -1;
}

RunFolder::RunFolder(std::string path, int rank)
    : path_(std::move(path)), rank_(rank), metrics_(path_ + "/metrics.jsonl"), log_(rank == 0 ? path_ + "/log.txt" : fmt::format("{}/ranks/rank_{:05}.log", path_, rank)) {
  std::error_code error;
  fs::create_directories(rank_ == 0 ? fs::path(path_) : fs::path(path_) / "ranks", error);
  if (error) fail(Fault::input, path_, "cannot make the run's folder: " + error.message() + "; choose another with run.dir=PATH");
  if (rank_ != 0) return;
  lock_ = ::open((path_ + "/.lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_ < 0) fail(Fault::input, path_, std::string("cannot write to the run's folder: ") + std::strerror(errno) + "; choose another with run.dir=PATH");
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    const int code = errno;
    ::close(lock_);
    if (code != EWOULDBLOCK)
      fail(Fault::input, path_ + "/.lock", std::string("cannot be locked: ") + std::strerror(code) + "; put the run on a file system with locks, with run.dir=PATH");
    fail(Fault::input, path_, "another process is training in this folder: wait for it, or choose another with run.dir=PATH");
  }
}

RunFolder::~RunFolder() {
  if (lock_ >= 0) ::close(lock_);
}

bool RunFolder::has_checkpoints(const std::string& path) {
  std::error_code error;
  fs::directory_iterator entry(path + "/checkpoints", error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error))
    if (checkpoint::step_kept_in(entry->path().filename().string())) return true;  // what a killed save left is none
  if (error && error != std::errc::no_such_file_or_directory && error != std::errc::not_a_directory)
    fail(is_of_input(error) ? Fault::input : Fault::runtime, path + "/checkpoints", "cannot be listed: " + reason_and_advice(error) + " with run.dir");
  return false;
}

void RunFolder::write_recipe(const std::string& yaml) {
  if (rank_ == 0) replace_file(fs::path(path_) / "recipe.yaml", yaml);
}

std::string RunFolder::keep_recipe(std::int64_t step) {
  if (rank_ != 0) return "";
  const fs::path from = fs::path(path_) / "recipe.yaml", to = fs::path(path_) / fmt::format("recipe.until_{:06}.yaml", step);
  if (!is_there(from)) return ", which cannot be kept: the folder has lost its recipe.yaml";
  replace_file(to, checkpoint::read_file(from));
  return ", which is kept as " + to.string();
}

void RunFolder::rewind_metrics(std::int64_t step) {
  if (rank_ != 0) return;
  const fs::path file = metrics_.path();
  metrics_.close();
  const std::string text = text_of_metrics(file);
  std::string kept;
  std::istringstream all(text);
  for (std::string line; std::getline(all, line);) {
    const nlohmann::json j = nlohmann::json::parse(line, nullptr, false);  // a killed run may have left half a line
    if (!j.is_discarded() && j.is_object() && j.contains("step") && j["step"].is_number_integer() && j["step"].get<std::int64_t>() <= step) kept += line + "\n";
  }
  // Steps come in order, so that what is dropped stands at the end: cutting it off needs no room on the disk.
  if (!text.empty() && text.starts_with(kept) && ::truncate(file.c_str(), static_cast<off_t>(kept.size())) == 0) return;
  replace_file(file, kept);
}

std::string RunFolder::metric(const std::string& json) {
  const int code = rank_ == 0 ? metrics_.append(json) : 0;
  if (code == 0 || std::exchange(told_, true)) return "";
  return fmt::format("[{}] cannot be written, which does not end the run: {}; free space there: lines are left out until they can be written again", metrics_.path(), std::strerror(code));
}

void RunFolder::log(const std::string& line) {
  const std::time_t now = std::time(nullptr);
  char stamp[32];
  std::tm parts{};
  localtime_r(&now, &parts);
  std::strftime(stamp, sizeof stamp, "%F %T", &parts);
  (void)log_.append(std::string(stamp) + "  " + line);  // the terminal has said it; the next line is tried anew
}

void RunFolder::sample(std::int64_t step, const std::string& text) {
  if (rank_ != 0) return;
  std::error_code error;
  fs::create_directories(fs::path(path_) / "samples", error);
  if (error) fail(Fault::runtime, path_ + "/samples", "cannot be made: " + error.message());
  replace_file(fs::path(path_) / "samples" / fmt::format("step_{:06}.txt", step), text);
}

}  // namespace capstan::train
