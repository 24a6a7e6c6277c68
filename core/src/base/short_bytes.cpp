#include "base/short_bytes.h"

#include <fmt/format.h>

#include <iterator>

namespace capstan {

std::string short_bytes(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  std::size_t unit = 0;
  // A thousand of a unit is a fourth digit: the next unit begins where rounding would show it.
  for (; bytes >= 999.5 && unit + 1 < std::size(units); ++unit) bytes /= 1024;
  const int digits = unit == 0 || bytes >= 99.95 ? 0 : bytes >= 9.995 ? 1 : 2;
  return fmt::format("{:.{}f} {}", bytes, digits, units[unit]);
}

}  // namespace capstan
