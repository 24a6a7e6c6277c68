// defines: Descriptor, MemoryFile and the checked reads and writes of this plugin.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace capstan::hdf5 {

/// Throws Error(runtime) "[where] cannot <action>: <errno's text>".
[[noreturn]] void fail_system(const std::string& where, const std::string& action, int error);

class Descriptor {
 public:
  Descriptor(const std::string& path, int flags);
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor();
  int get() const { return fd_; }
  void sync() const;
  /// Writes all bytes at `offset`; `progress`, when given, hears the bytes so far, about every 64 MiB.
  void write(const void* data, std::int64_t bytes, std::int64_t offset, const std::string& where,
             const std::function<void(std::int64_t)>& progress = {}) const;
  /// Fills all bytes from `offset`; a file that ends before is Error(input).
  void read(void* data, std::int64_t bytes, std::int64_t offset, const std::string& where) const;

 private:
  std::string path_;
  int fd_;
};

/// A sparse file in memory under a path that HDF5 can open. HDF5 does not survive a disk that fills up while it
/// flushes or closes (it crashes at the end of the process), so it never writes to one: it writes here, where
/// space reserved for payloads costs nothing, and what it wrote is then copied with errors that are ours.
class MemoryFile {
 public:
  /// `at_most`: the size that the file may reach; Error(runtime) when the process may not make such a file.
  MemoryFile(const std::string& where, std::int64_t at_most);
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile();
  std::string path() const;
  /// Copies all but the holes, and gives the target the same size.
  void copy_to(const Descriptor& target, const std::string& where) const;

 private:
  int fd_;
};

}  // namespace capstan::hdf5
