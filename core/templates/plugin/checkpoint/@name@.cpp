// The checkpoint format "@name@": a start to write your own from. A file is the line "@name@ 1 N", N bytes of text with a line
// for each tensor ("OFFSET DTYPE GLOBAL_SHAPE BEGIN EXTENT NAME", offsets from the end of that text), then the tensors' bytes.
#include <capstan/checkpoint.h>
#include <capstan/error.h>
#include <capstan/plugin.h>

#include <fcntl.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace capstan;
static_assert(std::endian::native == std::endian::little, "bytes are written as they lie in memory");

[[noreturn]] void refuse(const std::string& path) {
  fail(Fault::runtime, path, std::string("cannot be written: ") + std::strerror(errno));
}

/// Closes a file and flushes it to the disk. A disk that was full at any write so far is heard of here, as Error(runtime).
void finish(std::ofstream& file, const std::string& path) {
  errno = 0;
  file.close();
  if (!file) refuse(path);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0 || ::fsync(fd) != 0) refuse(path);
  ::close(fd);
}

std::string list(const std::vector<std::int64_t>& values) {
  std::string text = "[";
  for (const auto v : values) text += (text.size() > 1 ? "," : "") + std::to_string(v);
  return text + "]";
}

/// Which piece of which tensor, as its line says it: a reader looks for these very words.
std::string describe(const SavedTensor& t) {
  return std::string(name_of(t.dtype)) + " " + list(t.global_shape) + " " + list(t.box.begin) + " " + list(t.box.extent) + " " + t.name;
}

class @Name@ : public CheckpointFormat {
 public:
  std::string_view name() const override { return "@name@"; }
  std::string_view extension() const override { return ".@name@"; }

  void write_shard(const std::string& path, std::span<SavedTensor> tensors,
                   const std::function<void(std::int64_t)>& progress) override {
    std::string lines;
    std::int64_t bytes = 0;
    for (const SavedTensor& t : tensors) {
      lines += std::to_string(bytes) + " " + describe(t) + "\n";
      bytes += t.bytes;
    }
    const std::string head = "@name@ 1 " + std::to_string(lines.size()) + "\n" + lines;
    std::ofstream file(path, std::ios::binary);
    file << head;
    std::int64_t done = 0;
    for (SavedTensor& t : tensors) {
      t.file_offset = t.bytes > 0 ? static_cast<std::int64_t>(head.size()) + done : -1;
      if (!file.write(static_cast<const char*>(t.data), t.bytes)) refuse(path);
      done += t.bytes;
      if (progress) progress(done);
    }
    finish(file, path);
  }

  void read(const std::string& path, const SavedTensor& t, void* target) override {
    const std::string where = path + ", tensor " + t.name, wanted = describe(t);
    std::ifstream file(path, std::ios::binary);
    std::string mark;
    std::uint64_t version = 0, size = 0;
    file >> mark >> version >> size;
    if (!file || file.get() != '\n' || mark != "@name@" || version != 1 || size > std::filesystem::file_size(path)) {
      fail(Fault::input, path, "this is no @name@ file: expected one that begins with \"@name@ 1 \" and the size of its list");
    }
    std::string text(size, '\0'), line, other;
    file.read(text.data(), static_cast<std::streamsize>(size));
    const auto payload = file.tellg();
    for (std::istringstream lines(text); std::getline(lines, line);) {
      const auto space = line.find(' ');
      if (line.ends_with(" " + t.name)) other += "\n  " + line.substr(space + 1);
      if (space == std::string::npos || line.compare(space + 1, std::string::npos, wanted) != 0) continue;
      file.seekg(payload + static_cast<std::streamoff>(std::strtoll(line.c_str(), nullptr, 10)));
      if (t.bytes > 0 && !file.read(static_cast<char*>(target), t.bytes)) {
        fail(Fault::input, where, "the file ends within its " + std::to_string(t.bytes) + " bytes");
      }
      return;
    }
    fail(Fault::input, where, "expected " + wanted + ", the file has " + (other.empty() ? "nothing of that name" : other));
  }

  /// The lists of all shards in one text: where each piece lies.
  void write_index(const std::string& path, std::span<const SavedTensor> tensors) override {
    std::ofstream file(path, std::ios::binary);
    for (const SavedTensor& t : tensors) file << t.file << ' ' << t.file_offset << ' ' << describe(t) << '\n';
    finish(file, path);
  }
};

}  // namespace

CAPSTAN_PLUGIN("checkpoint", "@name@", "0.1.0") {
  registrar.add("checkpoint", "@name@", Schema(), [](const Options&, Registrar&) {
    return as_interface<CheckpointFormat>(std::make_shared<@Name@>());
  });
}
