// defines: fingerprint(): a sum over elements that tells tensors apart.
#pragma once
#include <kernels/types.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// Sum over i, modulo 2^64, of fingerprint_of(the bits of element i, first + i): what parts of a tensor give adds up to the
/// whole's. Elements of 2, 4 or 8 bytes.
std::uint64_t fingerprint(Num num, std::int64_t n, const void* data, std::uint64_t first);

}  // namespace capstan::kernels::cpu
