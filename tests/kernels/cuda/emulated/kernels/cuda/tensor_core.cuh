// In place of the real instructions: the same on a CPU, with the layouts of the PTX manual (mma.m16n8k16, ldmatrix).
#pragma once
#include <emulated.h>

namespace capstan::kernels::cuda {

inline unsigned shared_address(const void* p) { return static_cast<unsigned>(static_cast<const unsigned char*>(p) - emulated::shared()); }
inline unsigned char* at_shared(unsigned address) { return emulated::shared() + address; }

inline void copy_async(unsigned to, const void* from, bool valid) {
  if (to % 16 != 0 || (valid && reinterpret_cast<std::uintptr_t>(from) % 16 != 0)) throw std::runtime_error("cp.async: an address is not on 16 bytes");
  if (valid) std::memcpy(at_shared(to), from, 16);
  else std::memset(at_shared(to), 0, 16);
}
inline void commit_copies() {}
template <int> inline void wait_copies() {}

struct Pair { std::uint16_t low, high; };
inline unsigned word(Pair p) { return static_cast<unsigned>(p.low) | static_cast<unsigned>(p.high) << 16; }

inline void load_matrices(unsigned (&r)[4], unsigned from) {
  const unsigned lane = emulated::lane();
  if (from % 16 != 0) throw std::runtime_error("ldmatrix: an address is not on 16 bytes");
  const auto rows = emulated::gather(from);
  for (unsigned i = 0; i < 4; ++i) std::memcpy(&r[i], at_shared(rows[i * 8 + lane / 4]) + lane % 4 * 4, 4);
}
inline void load_matrices_transposed(unsigned (&r)[4], unsigned from) {
  const unsigned lane = emulated::lane();
  if (from % 16 != 0) throw std::runtime_error("ldmatrix: an address is not on 16 bytes");
  const auto rows = emulated::gather(from);
  for (unsigned i = 0; i < 4; ++i) {
    Pair p;
    std::memcpy(&p.low, at_shared(rows[i * 8 + lane % 4 * 2]) + lane / 4 * 2, 2);
    std::memcpy(&p.high, at_shared(rows[i * 8 + lane % 4 * 2 + 1]) + lane / 4 * 2, 2);
    r[i] = word(p);
  }
}
inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Parts { unsigned a[4], b[2]; };
  const auto all = emulated::gather(Parts{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto value = [](unsigned w, unsigned half) { return emulated::from_bits(half == 0 ? w << 16 : w & 0xffff0000u); };
  const unsigned lane = emulated::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (unsigned k = 0; k < 16; ++k) {
      const float x = value(all[row % 8 * 4 + k % 8 / 2].a[(row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0)], k % 2);
      const float y = value(all[column * 4 + k % 8 / 2].b[k >= 8 ? 1 : 0], k % 2);
      sum += static_cast<double>(x) * y;
    }
    c[i] = static_cast<float>(c[i] + sum);
  }
}
inline void store_word(unsigned to, unsigned w) { std::memcpy(at_shared(to), &w, 4); }

}  // namespace capstan::kernels::cuda
