#include "base/look.h"

#include <capstan/error.h>

#include <algorithm>
#include <array>

namespace capstan {
namespace {

std::filesystem::file_type type_of(const std::filesystem::path& path) {
  std::error_code error;
  const auto type = std::filesystem::status(path, error).type();
  if (type == std::filesystem::file_type::none)
    fail(is_of_input(error) ? Fault::input : Fault::runtime, path.string(), "cannot be looked at: " + reason_and_advice(error));
  return type;
}

}  // namespace

bool is_there(const std::filesystem::path& path) { return type_of(path) != std::filesystem::file_type::not_found; }
bool is_folder(const std::filesystem::path& path) { return type_of(path) == std::filesystem::file_type::directory; }

bool is_of_input(std::error_code error) {
  using enum std::errc;
  constexpr std::array all{permission_denied, operation_not_permitted, read_only_file_system, no_such_file_or_directory, not_a_directory, is_a_directory,
                           file_exists,       filename_too_long,       too_many_symbolic_link_levels, invalid_argument};
  return std::any_of(all.begin(), all.end(), [&](std::errc e) { return error == e; });
}

std::string reason_and_advice(std::error_code error) {
  using enum std::errc;
  const char* advice = "";
  if (error == permission_denied || error == operation_not_permitted) advice = "; give this user the right to use what lies there, or name another path";
  else if (error == too_many_symbolic_link_levels) advice = "; mend the symbolic link that leads in a circle";
  else if (error == no_space_on_device) advice = "; free space there, or name another path";
  else if (is_of_input(error)) advice = "; name another path";
  else advice = "; check the disk or the network that it lies on";
  return error.message() + advice;
}

}  // namespace capstan
