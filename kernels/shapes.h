// defines: merged(): the same walk over fewer dimensions, for broadcasts and strided copies. Plain host code.
#pragma once
#include <kernels/types.h>

namespace capstan::kernels {

/// Neighbouring dimensions that both operands walk alike become one; at least one remains.
inline Broadcast merged(const Broadcast& p) {
  Broadcast m;
  for (int d = 0; d < p.rank; ++d) {
    if (p.shape[d] == 1) continue;
    if (m.rank > 0) {
      const int last = m.rank - 1;
      if (m.a[last] == p.a[d] * p.shape[d] && m.b[last] == p.b[d] * p.shape[d]) {
        m.shape[last] *= p.shape[d], m.a[last] = p.a[d], m.b[last] = p.b[d];
        continue;
      }
    }
    m.shape[m.rank] = p.shape[d], m.a[m.rank] = p.a[d], m.b[m.rank] = p.b[d];
    ++m.rank;
  }
  if (m.rank == 0) m.rank = 1, m.shape[0] = 1;
  return m;
}

inline Strided merged(const Strided& s) {
  Broadcast b;
  b.rank = s.rank;
  for (int d = 0; d < s.rank; ++d) b.shape[d] = s.shape[d], b.a[d] = s.to[d], b.b[d] = s.from[d];
  b = merged(b);
  Strided m;
  m.rank = b.rank;
  for (int d = 0; d < b.rank; ++d) m.shape[d] = b.shape[d], m.to[d] = b.a[d], m.from[d] = b.b[d];
  return m;
}

inline std::int64_t elements(const Strided& s) {
  std::int64_t n = 1;
  for (int d = 0; d < s.rank; ++d) n *= s.shape[d];
  return n;
}
inline std::int64_t elements(const Broadcast& s) {
  std::int64_t n = 1;
  for (int d = 0; d < s.rank; ++d) n *= s.shape[d];
  return n;
}

}  // namespace capstan::kernels
