// defines: OutputFile, a file that is written under a temporary name and shown under its own only when whole.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace capstan::data {

/// Writes "<path>.partial", locked against a second writer, and renames it to `path` in commit(). What a
/// killed process leaves behind is never at `path`; the next writer takes the leftover over. Every failed
/// system call is Error(runtime) with the file and what to do (a full disk above all).
class CAPSTAN_API OutputFile {
 public:
  explicit OutputFile(std::string path);
  ~OutputFile();  ///< without commit(): removes the partial file
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(const void* data, std::size_t bytes);
  template <class T>
  void write(std::span<const T> values) {
    write(values.data(), values.size_bytes());
  }
  /// Hands everything to the disk; after it the contents survive a loss of power.
  void sync();
  /// Renames to `path`; sync() must have run.
  void commit();

  std::int64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }

 private:
  void flush();
  void write_all(const char* data, std::size_t bytes);
  std::string path_, partial_;
  std::vector<char> buffer_;
  std::int64_t bytes_ = 0;
  int file_ = -1;
  bool regular_ = false, committed_ = false;
};

/// Writes the entries of the folder that holds `path` to the disk, so that renames in it are final.
CAPSTAN_API void sync_folder_of(const std::string& path);

}  // namespace capstan::data
