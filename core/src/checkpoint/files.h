// defines: the file operations that the checkpoint protocol is made of. Each either leaves its bytes on the
// disk (fsync included) or throws Error naming the file, so that the order of a commit is the order of calls.
#pragma once
#include <capstan/error.h>
#include <capstan/export.h>

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace capstan::checkpoint {

using Path = std::filesystem::path;

/// A file could not be read for a reason that is not its content: no permission, an I/O error, too many open files, a
/// stale network handle. What it holds may well be whole. Fault::input for a permission, else Fault::runtime.
class CAPSTAN_API Unreadable : public Error {
  using Error::Error;
};

/// Throws Error about a failed system call that writes, on `file`: "[file] cannot <action>: <reason>", and for a full
/// disk, quota, file size limit or missing permission what to do. `error` is an errno.
[[noreturn]] void fail_system(const Path& file, const std::string& action, int error);
/// The same of a call that reads: Error(input) when there is no such file, Unreadable with what to do otherwise.
[[noreturn]] void fail_reading(const Path& file, const std::string& action, int error);

/// Bytes that an ordinary user can still write where `path` lies (the nearest existing folder counts), or -1
/// when the file system does not say.
std::int64_t available_bytes(const Path& path);

/// Makes the folder and its parents; no error when it is there.
void make_folder(const Path& path);
/// Creates or replaces a file with these bytes and fsyncs it. Not atomic: callers write where none reads yet.
void write_file(const Path& path, std::string_view bytes);
/// The whole file. Error(input) when there is none, else Unreadable when it cannot be read.
std::string read_file(const Path& path);
void sync_file(const Path& path);
/// Makes renames, creations and removals in a folder durable.
void sync_folder(const Path& path);
/// rename(2): atomic within a file system.
void rename_to(const Path& from, const Path& to);
/// Removes a file or a folder with all in it.
void remove_tree(const Path& path);

/// XXH3-64 (seed 0) of a memory range, and its text form: 16 lower-case hex digits.
CAPSTAN_API std::uint64_t xxh3(const void* data, std::int64_t bytes);
CAPSTAN_API std::string hash_text(std::uint64_t hash);
/// False when the text is not exactly 16 lower-case hex digits.
bool parse_hash(std::string_view text, std::uint64_t& hash);

/// A part of a file to be hashed by itself.
struct Range {
  std::int64_t offset = 0, bytes = 0;
  std::uint64_t xxh3 = 0;
  bool complete = false;
};
struct FileDigest {
  std::int64_t bytes = 0;
  std::uint64_t xxh3 = 0;
};

/// Hashes a whole file and, in the same pass, each of `ranges` (sorted by offset). A range that the file is
/// too short for stays incomplete. Throws as read_file() does.
FileDigest digest_file(const Path& path, std::span<Range> ranges);

}  // namespace capstan::checkpoint
