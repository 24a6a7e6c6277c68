// defines: is_there(), is_folder(): questions about a path that a person named, answered or refused with words.
#pragma once
#include <capstan/export.h>

#include <filesystem>
#include <string>
#include <system_error>

namespace capstan {

/// Whether there is anything at `path`, links followed. Error when that cannot be told: Fault::input for no right to look,
/// links in a circle or an impossible name, else Fault::runtime.
CAPSTAN_API bool is_there(const std::filesystem::path& path);
/// Whether that is a folder.
CAPSTAN_API bool is_folder(const std::filesystem::path& path);

/// True when another path or more rights would help against this error of the file system.
CAPSTAN_API bool is_of_input(std::error_code error);
/// "Permission denied; give this user the right to use what lies there"
CAPSTAN_API std::string reason_and_advice(std::error_code error);

}  // namespace capstan
