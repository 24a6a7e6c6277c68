#include "base/short_bytes.h"

#include <fmt/format.h>

namespace capstan {

std::string short_bytes(double bytes) {
  if (bytes >= 1e9) return fmt::format("{:.2f} GiB", bytes / (1 << 30));
  if (bytes >= 1e6) return fmt::format("{:.0f} MiB", bytes / (1 << 20));
  return fmt::format("{:.0f} KiB", bytes / 1024);
}

}  // namespace capstan
