#include <kernels/cpu/fingerprint.h>
#include <kernels/shared/fingerprint.h>

namespace capstan::kernels::cpu {

namespace {

template <class Bits>
std::uint64_t sum(std::int64_t n, const void* data, std::uint64_t first) {
  const auto* p = static_cast<const Bits*>(data);
  std::uint64_t total = 0;
  for (std::int64_t i = 0; i < n; ++i) total += fingerprint_of(p[i], first + static_cast<std::uint64_t>(i));
  return total;
}

}  // namespace

std::uint64_t fingerprint(Num num, std::int64_t n, const void* data, std::uint64_t first) {
  switch (bytes_of(num)) {
    case 8:
      return sum<std::uint64_t>(n, data, first);
    case 4:
      return sum<std::uint32_t>(n, data, first);
    default:
      return sum<std::uint16_t>(n, data, first);
  }
}

}  // namespace capstan::kernels::cpu
