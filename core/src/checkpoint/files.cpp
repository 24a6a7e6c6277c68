// Durable file operations of the checkpoint protocol (POSIX calls, because std::filesystem has no fsync).
#define XXH_INLINE_ALL
#include "checkpoint/files.h"

#include <xxhash.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

namespace capstan::checkpoint {
namespace {

// Closes on every way out; close() is called by hand where its error counts.
class Descriptor {
 public:
  Descriptor(const Path& path, int flags, const char* action) : path_(path) {
    do fd_ = ::open(path.c_str(), flags | O_CLOEXEC, 0644);
    while (fd_ < 0 && errno == EINTR);
    if (fd_ < 0) (flags & O_ACCMODE) == O_RDONLY ? fail_reading(path, action, errno) : fail_system(path, action, errno);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  void sync() const {
    if (::fsync(fd_) != 0) fail_system(path_, "be flushed to the disk", errno);
  }
  void close() {
    const int fd = std::exchange(fd_, -1);
    if (::close(fd) != 0) fail_system(path_, "be closed", errno);
  }

 private:
  const Path& path_;
  int fd_ = -1;
};

}  // namespace

void fail_system(const Path& file, const std::string& action, int error) {
  std::string message = "cannot " + action + ": " + std::strerror(error);
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    const auto available = available_bytes(file);
    if (available >= 0) message += " (" + std::to_string(available) + " bytes available there)";
    message += error == EFBIG ? "; raise the file size limit (ulimit -f)"
                              : "; free space there, lower checkpoint.keep, or move the run with run.dir=PATH";
  } else if (error == EACCES || error == EPERM || error == EROFS) {
    message += "; give this user the right to write there, or move the run with run.dir=PATH";
  }
  fail(error == ENOENT || error == ENOTDIR || error == EACCES ? Fault::input : Fault::runtime, file.string(), message);
}

void fail_reading(const Path& file, const std::string& action, int error) {
  const std::string message = "cannot " + action + ": " + std::strerror(error);
  if (error == ENOENT || error == ENOTDIR || error == EISDIR) fail(Fault::input, file.string(), message);
  const bool forbidden = error == EACCES || error == EPERM;
  const char* advice = forbidden                              ? "give this user the right to read it"
                       : error == EMFILE || error == ENFILE   ? "raise the limit of open files (ulimit -n)"
                       : error == ENOMEM                      ? "free memory"
                       : error == ELOOP                       ? "mend the symbolic link that leads in a circle"
                                                              : "check the disk or the network that the file lies on";
  throw Unreadable(forbidden ? Fault::input : Fault::runtime, "[" + file.string() + "] " + message + "; " + advice);
}

std::int64_t available_bytes(const Path& path) {
  struct statvfs info {};
  for (Path p = std::filesystem::absolute(path); !p.empty(); p = p.parent_path()) {
    if (::statvfs(p.c_str(), &info) == 0) {
      if (info.f_blocks == 0) return -1;  // some network file systems know no size
      return static_cast<std::int64_t>(info.f_bavail) * static_cast<std::int64_t>(info.f_frsize);
    }
    if (p == p.parent_path()) break;
  }
  return -1;
}

void make_folder(const Path& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) fail_system(path, "be made", error.value());
}

void write_file(const Path& path, std::string_view bytes) {
  Descriptor file(path, O_WRONLY | O_CREAT | O_TRUNC, "be created");
  while (!bytes.empty()) {
    const auto n = ::write(file.get(), bytes.data(), std::min(bytes.size(), std::size_t{1} << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail_system(path, "take " + std::to_string(bytes.size()) + " more bytes", n < 0 ? errno : ENOSPC);
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  file.sync();
  file.close();
}

std::string read_file(const Path& path) {
  Descriptor file(path, O_RDONLY, "be opened");
  std::string text;
  std::vector<char> block(1 << 16);
  for (;;) {
    const auto n = ::read(file.get(), block.data(), block.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_reading(path, "be read", errno);
    if (n == 0) return text;
    text.append(block.data(), static_cast<std::size_t>(n));
  }
}

void sync_file(const Path& path) { Descriptor(path, O_RDONLY, "be opened").sync(); }

void sync_folder(const Path& path) {
  const Descriptor folder(path, O_RDONLY | O_DIRECTORY, "be opened");
  // Some network file systems cannot fsync a folder and say EINVAL; their renames are already durable.
  if (::fsync(folder.get()) != 0 && errno != EINVAL) fail_system(path, "be flushed to the disk", errno);
}

void rename_to(const Path& from, const Path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail_system(from, "be renamed to " + to.filename().string(), errno);
}

void remove_tree(const Path& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) fail_system(path, "be removed", error.value());
}

std::uint64_t xxh3(const void* data, std::int64_t bytes) {
  return XXH3_64bits(bytes == 0 ? "" : data, static_cast<std::size_t>(bytes));
}

std::string hash_text(std::uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

bool parse_hash(std::string_view text, std::uint64_t& hash) {
  if (text.size() != 16) return false;
  hash = 0;
  for (const char c : text) {
    if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return false;
    hash = hash << 4 | static_cast<std::uint64_t>(c <= '9' ? c - '0' : c - 'a' + 10);
  }
  return true;
}

FileDigest digest_file(const Path& path, std::span<Range> ranges) {
  constexpr std::size_t block_bytes = 1 << 20;  // stays in the L2 cache between the two hashes
  const auto release = [](XXH3_state_t* s) { XXH3_freeState(s); };
  const auto make_state = [&] {
    std::unique_ptr<XXH3_state_t, decltype(release)> state(XXH3_createState(), release);
    if (!state) fail(Fault::runtime, path.string(), "out of memory while hashing");
    XXH3_64bits_reset(state.get());
    return state;
  };
  const auto whole = make_state();
  std::vector<decltype(make_state())> states;
  for (auto& range : ranges) {
    states.push_back(make_state());
    range.complete = range.bytes == 0;
    if (range.complete) range.xxh3 = xxh3(nullptr, 0);
  }

  Descriptor file(path, O_RDONLY, "be opened");
  (void)::posix_fadvise(file.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
  std::vector<char> block(block_bytes);
  std::int64_t position = 0;
  std::size_t first = 0;
  for (;;) {
    const auto n = ::read(file.get(), block.data(), block.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_reading(path, "be read at byte " + std::to_string(position), errno);
    if (n == 0) break;
    XXH3_64bits_update(whole.get(), block.data(), static_cast<std::size_t>(n));
    const auto end = position + static_cast<std::int64_t>(n);
    while (first < ranges.size() && ranges[first].offset + ranges[first].bytes <= position) ++first;
    for (auto i = first; i < ranges.size() && ranges[i].offset < end; ++i) {
      auto& range = ranges[i];
      const auto from = std::max(range.offset, position);
      const auto to = std::min(range.offset + range.bytes, end);
      if (from >= to) continue;
      XXH3_64bits_update(states[i].get(), block.data() + (from - position), static_cast<std::size_t>(to - from));
      if (to == range.offset + range.bytes) range.complete = true, range.xxh3 = XXH3_64bits_digest(states[i].get());
    }
    position = end;
  }
  return {position, XXH3_64bits_digest(whole.get())};
}

}  // namespace capstan::checkpoint
