// A small bounds-checked reader of ELF64 section headers.
#include "plugin/elf_section.h"

#include <capstan/error.h>

#include <elf.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>

namespace capstan {
namespace {

#if defined(__x86_64__)
constexpr Elf64_Half this_machine = EM_X86_64;
#elif defined(__aarch64__)
constexpr Elf64_Half this_machine = EM_AARCH64;
#else
#error "name this machine's ELF number here"
#endif

/// Far above any real library's; keeps a corrupt count from costing time or memory.
constexpr std::uint64_t most_headers = 65536;
constexpr std::uint64_t most_section_bytes = 1 << 20;

[[noreturn]] void refuse(const std::string& why) { throw Error(Fault::input, why); }

class File {
 public:
  explicit File(const std::string& path) {
    // O_NONBLOCK: opening a FIFO must not hang.
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) refuse(fmt::format("cannot open the file: {}", std::strerror(errno)));
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
      ::close(descriptor_);
      refuse("not a regular file");
    }
    size_ = static_cast<std::uint64_t>(status.st_size);
  }
  ~File() { ::close(descriptor_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool holds(std::uint64_t offset, std::uint64_t bytes) const { return offset <= size_ && bytes <= size_ - offset; }

  void read(std::uint64_t offset, void* target, std::uint64_t bytes, const char* what) const {
    if (!holds(offset, bytes)) {
      refuse(fmt::format("truncated: {} takes {} bytes from byte {} on, but the file has {}", what, bytes, offset, size_));
    }
    auto* to = static_cast<char*>(target);
    while (bytes > 0) {
      const ssize_t got = ::pread(descriptor_, to, bytes, static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) refuse(fmt::format("cannot read {}: {}", what, got < 0 ? std::strerror(errno) : "the file shrank"));
      to += got, offset += static_cast<std::uint64_t>(got), bytes -= static_cast<std::uint64_t>(got);
    }
  }

  template <class T>
  T at(std::uint64_t offset, const char* what) const {
    T value;
    read(offset, &value, sizeof value, what);
    return value;
  }

 private:
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

/// Start of entry `index` of a table; refuses when the sum leaves 64 bits.
std::uint64_t entry_at(std::uint64_t table, std::uint64_t index, std::uint64_t entry_bytes) {
  const auto offset = static_cast<unsigned __int128>(table) + static_cast<unsigned __int128>(index) * entry_bytes;
  if (offset > UINT64_MAX) refuse("corrupt: a header table lies outside of any file");
  return static_cast<std::uint64_t>(offset);
}

Elf64_Ehdr read_header(const File& file) {
  if (!file.holds(0, sizeof(Elf64_Ehdr))) refuse("not a shared library: shorter than an ELF header");
  const auto header = file.at<Elf64_Ehdr>(0, "the ELF header");
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0)
    refuse("not a shared library: it does not start as an ELF file does");
  if (header.e_ident[EI_CLASS] != ELFCLASS64) refuse("not a 64-bit library");
  constexpr unsigned char order = std::endian::native == std::endian::little ? ELFDATA2LSB : ELFDATA2MSB;
  if (header.e_ident[EI_DATA] != order) refuse("a library of the other byte order");
  if (header.e_type != ET_DYN) refuse(fmt::format("an ELF file but not a shared library (type {})", header.e_type));
  if (header.e_machine != this_machine) {
    refuse(fmt::format("a library for another machine: ELF machine {}, this one is {}", header.e_machine, this_machine));
  }
  return header;
}

void check_segments(const File& file, const Elf64_Ehdr& header) {
  if (header.e_phnum == 0 || header.e_phentsize != sizeof(Elf64_Phdr)) refuse("corrupt: no table of segments");
  for (std::uint64_t i = 0; i < header.e_phnum; ++i) {
    const auto segment = file.at<Elf64_Phdr>(entry_at(header.e_phoff, i, sizeof(Elf64_Phdr)), "the table of segments");
    if (segment.p_type == PT_LOAD && !file.holds(segment.p_offset, segment.p_filesz)) {
      refuse(fmt::format("truncated: segment {} lies outside of the file", i));
    }
  }
}

}  // namespace

std::optional<std::string> read_elf_section(const std::string& path, std::string_view name) {
  const File file(path);
  const Elf64_Ehdr header = read_header(file);
  check_segments(file, header);
  if (header.e_shoff == 0) return std::nullopt;
  if (header.e_shentsize != sizeof(Elf64_Shdr)) refuse("corrupt: section headers of an unknown size");

  // Counts that do not fit the header's 16 bits are kept in section 0.
  const auto first = file.at<Elf64_Shdr>(header.e_shoff, "the table of sections");
  const std::uint64_t count = header.e_shnum != 0 ? header.e_shnum : first.sh_size;
  const std::uint64_t names_index = header.e_shstrndx != SHN_XINDEX ? header.e_shstrndx : first.sh_link;
  if (count > most_headers) refuse(fmt::format("corrupt: {} sections", count));
  if (names_index >= count) refuse("corrupt: the table of section names is not among the sections");

  const auto section_header = [&](std::uint64_t i) {
    return file.at<Elf64_Shdr>(entry_at(header.e_shoff, i, sizeof(Elf64_Shdr)), "the table of sections");
  };
  const Elf64_Shdr names_header = section_header(names_index);
  if (names_header.sh_size > most_section_bytes) refuse("corrupt: the table of section names is too large");
  std::string names(names_header.sh_size, '\0');
  file.read(names_header.sh_offset, names.data(), names.size(), "the table of section names");

  std::optional<std::string> bytes;
  // All headers are read even when the section comes early: a cut table is a cut file.
  for (std::uint64_t i = 0; i < count; ++i) {
    const Elf64_Shdr section = section_header(i);
    if (section.sh_name >= names.size()) refuse("corrupt: a section's name lies outside of the table of names");
    const char* begin = names.data() + section.sh_name;
    const std::string_view section_name(begin, ::strnlen(begin, names.size() - section.sh_name));
    if (section_name != name || section.sh_type != SHT_PROGBITS) continue;
    if (section.sh_size > most_section_bytes)
      refuse(fmt::format("corrupt: section {} holds {} bytes", name, section.sh_size));
    bytes.emplace(section.sh_size, '\0');
    file.read(section.sh_offset, bytes->data(), bytes->size(), "the plugin's description");
  }
  return bytes;
}

}  // namespace capstan
