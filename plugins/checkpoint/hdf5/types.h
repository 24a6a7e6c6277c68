// defines: the HDF5 file type and fill value of each element type.
#pragma once
#include "handles.h"

#include <capstan/dtype.h>

#include <cstdint>

namespace capstan::hdf5 {

/// bf16 and f16 are floating-point types of 2 bytes that HDF5's tools convert; fp8 is u8, because HDF5 reads a
/// custom e4m3 wrongly (its 448 becomes NaN): the attribute "dtype" says what the bytes mean.
Handle file_type(DType dtype);

/// What a virtual dataset shows where its shard is missing: NaN where the type has one, else 0.
struct Fill {
  std::uint64_t bits = 0;
};
Fill missing_value(DType dtype);

}  // namespace capstan::hdf5
