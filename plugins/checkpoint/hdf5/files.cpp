// POSIX files under HDF5.
#include "files.h"

#include <capstan/error.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

namespace capstan::hdf5 {
namespace {

constexpr std::int64_t largest_call = 64 * 1024 * 1024;

}  // namespace

void fail_system(const std::string& where, const std::string& action, int error) {
  fail(Fault::runtime, where, "cannot " + action + ": " + std::strerror(error));
}

Descriptor::Descriptor(const std::string& path, int flags)
    : path_(path), fd_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
  if (fd_ < 0) fail_system(path, "be opened", errno);
}

Descriptor::~Descriptor() { ::close(fd_); }

void Descriptor::sync() const {
  if (::fsync(fd_) != 0) fail_system(path_, "be flushed to the disk", errno);
}

void Descriptor::write(const void* data, std::int64_t bytes, std::int64_t offset, const std::string& where,
                       const std::function<void(std::int64_t)>& progress) const {
  for (std::int64_t done = 0; done < bytes;) {
    const auto n = ::pwrite(fd_, static_cast<const char*>(data) + done,
                            static_cast<std::size_t>(std::min(bytes - done, largest_call)), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      fail_system(where, "write the last " + std::to_string(bytes - done) + " of " + std::to_string(bytes) + " bytes",
                  n < 0 ? errno : ENOSPC);
    }
    done += n;
    if (progress) progress(done);
  }
}

void Descriptor::read(void* data, std::int64_t bytes, std::int64_t offset, const std::string& where) const {
  for (std::int64_t done = 0; done < bytes;) {
    const auto n = ::pread(fd_, static_cast<char*>(data) + done,
                           static_cast<std::size_t>(std::min(bytes - done, largest_call)), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_system(where, "be read", errno);
    if (n == 0) {
      fail(Fault::input, where,
           "the file ends after " + std::to_string(done) + " of its " + std::to_string(bytes) + " bytes");
    }
    done += n;
  }
}

MemoryFile::MemoryFile(const std::string& where, std::int64_t at_most) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY &&
      limit.rlim_cur < static_cast<rlim_t>(at_most)) {
    fail(Fault::runtime, where,
         "may need " + std::to_string(at_most) + " bytes, and this process may only write files of " +
             std::to_string(limit.rlim_cur) + " bytes; raise the limit (ulimit -f)");
  }
  fd_ = ::memfd_create("capstan-checkpoint", MFD_CLOEXEC);
  if (fd_ < 0) fail_system(where, "get a file in memory", errno);
}

MemoryFile::~MemoryFile() { ::close(fd_); }

std::string MemoryFile::path() const { return "/proc/self/fd/" + std::to_string(fd_); }

void MemoryFile::copy_to(const Descriptor& target, const std::string& where) const {
  struct stat info {};
  if (::fstat(fd_, &info) != 0) fail_system(where, "be measured", errno);
  std::vector<char> block(1 << 16);
  for (off_t begin = ::lseek(fd_, 0, SEEK_DATA); begin >= 0;) {
    const auto end = ::lseek(fd_, begin, SEEK_HOLE);
    while (begin < end) {
      const auto n = ::pread(fd_, block.data(), static_cast<std::size_t>(std::min<off_t>(end - begin, 1 << 16)), begin);
      if (n <= 0) fail_system(where, "be copied from memory", n < 0 ? errno : EIO);
      target.write(block.data(), n, begin, where);
      begin += n;
    }
    begin = ::lseek(fd_, end, SEEK_DATA);  // fails with ENXIO behind the last data
  }
  struct stat copied {};
  if (::fstat(target.get(), &copied) != 0) fail_system(where, "be measured", errno);
  if (copied.st_size < info.st_size && ::ftruncate(target.get(), info.st_size) != 0) {
    fail_system(where, "be made " + std::to_string(info.st_size) + " bytes long", errno);
  }
}

}  // namespace capstan::hdf5
