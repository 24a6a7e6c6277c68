// OutputFile: buffered writing under a temporary name, fsync, rename.
#include "data/output_file.h"

#include <capstan/error.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

namespace capstan::data {
namespace {

constexpr std::size_t buffer_bytes = std::size_t{1} << 20;

[[noreturn]] void fail_system(const std::string& path, const char* doing, int code) {
  const char* advice = "check the path and its permissions";
  Fault fault = Fault::input;
  if (code == ENOSPC || code == EDQUOT) {
    fault = Fault::runtime, advice = "the disk is full: free some space or write to another disk; nothing was changed";
  } else if (code == EFBIG) {
    fault = Fault::runtime, advice = "the file is larger than this system or its limits (ulimit -f) allow";
  } else if (code == EIO) {
    fault = Fault::runtime, advice = "the disk reports a fault";
  }
  fail(fault, path, fmt::format("cannot {}: {}; {}", doing, std::strerror(code), advice));
}

}  // namespace

OutputFile::OutputFile(std::string path) : path_(std::move(path)), partial_(path_ + ".partial") {
  // Opening and locking are two steps: between them another writer may have renamed the very file that was
  // opened. So after locking, the name must still lead to the locked file.
  for (;;) {
    file_ = ::open(partial_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (file_ < 0) fail_system(partial_, "create the file", errno);
    if (::flock(file_, LOCK_EX | LOCK_NB) != 0) {
      const int code = errno;
      ::close(std::exchange(file_, -1));
      if (code != EWOULDBLOCK) fail_system(partial_, "lock the file", code);
      fail(Fault::input, partial_, "another process is writing this file; wait for it or choose another name");
    }
    struct stat mine {
    }, named{};
    const bool same = ::fstat(file_, &mine) == 0 && ::stat(partial_.c_str(), &named) == 0 && mine.st_ino == named.st_ino &&
                      mine.st_dev == named.st_dev;
    if (same) {
      regular_ = S_ISREG(mine.st_mode);
      break;
    }
    ::close(std::exchange(file_, -1));
  }
  if (regular_ && ::ftruncate(file_, 0) != 0) {
    const int code = errno;
    ::close(std::exchange(file_, -1));
    fail_system(partial_, "truncate the file", code);
  }
  buffer_.reserve(buffer_bytes);
}

OutputFile::~OutputFile() {
  if (file_ < 0) return;
  if (!committed_ && regular_) ::unlink(partial_.c_str());  // before the lock goes
  ::close(file_);
}

void OutputFile::write(const void* data, std::size_t bytes) {
  const char* p = static_cast<const char*>(data);
  bytes_ += static_cast<std::int64_t>(bytes);
  if (buffer_.size() + bytes > buffer_bytes) flush();
  if (bytes >= buffer_bytes) {
    write_all(p, bytes);
  } else {
    buffer_.insert(buffer_.end(), p, p + bytes);
  }
}

void OutputFile::flush() {
  write_all(buffer_.data(), buffer_.size());
  buffer_.clear();
}

void OutputFile::write_all(const char* data, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t n = ::write(file_, data, bytes);
    if (n < 0) {
      if (errno == EINTR) continue;
      fail_system(partial_, "write", errno);
    }
    data += n, bytes -= static_cast<std::size_t>(n);
  }
}

void OutputFile::sync() {
  flush();
  // EINVAL: a file that cannot be synced, such as a device.
  if (::fsync(file_) != 0 && errno != EINVAL) fail_system(partial_, "write to the disk", errno);
}

void OutputFile::commit() {
  if (!buffer_.empty()) fail(Fault::programming, path_, "commit() before sync()");
  if (std::rename(partial_.c_str(), path_.c_str()) != 0) fail_system(path_, "rename the finished file", errno);
  committed_ = true;
}

void sync_folder_of(const std::string& path) {
  std::string folder = std::filesystem::path(path).parent_path().string();
  if (folder.empty()) folder = ".";
  const int file = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file < 0) fail_system(folder, "open the folder", errno);
  const int code = ::fsync(file) == 0 || errno == EINVAL ? 0 : errno;
  ::close(file);
  if (code != 0) fail_system(folder, "write the folder to the disk", code);
}

}  // namespace capstan::data
