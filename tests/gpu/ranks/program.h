// defines: CAPSTAN_PROGRAM: `capstan` beside this program, wherever a build was carried.
#pragma once
#include <filesystem>
#include <string>

namespace capstan::testing {
inline std::string program_beside_this() {
  return (std::filesystem::read_symlink("/proc/self/exe").parent_path() / "capstan").string();
}
}  // namespace capstan::testing

#define CAPSTAN_PROGRAM (::capstan::testing::program_beside_this())
