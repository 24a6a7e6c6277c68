// defines: read_elf_section(): the bytes of one section of a shared library, read without running its code.
#pragma once
#include <capstan/export.h>

#include <optional>
#include <string>
#include <string_view>

namespace capstan {

/// The bytes of section `name` of the 64-bit ELF shared library at `path`; nullopt when it has no such section.
/// Every offset is checked against the file's size before it is followed, and so is every segment that the loader
/// would map: a truncated library is refused here, where the loader would die of SIGBUS. Error(input), its text without
/// the path, when the file cannot be read, is no shared library for this machine, or is cut short.
CAPSTAN_API std::optional<std::string> read_elf_section(const std::string& path, std::string_view name);

}  // namespace capstan
