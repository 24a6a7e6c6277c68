// Element types in HDF5. Fields of the 2-byte floats: sign, exponent, mantissa as IEEE 754 lays them out.
#include "types.h"

#include <capstan/error.h>

namespace capstan::hdf5 {
namespace {

Handle copy(hid_t type) { return {H5Tcopy(type), H5Tclose, "dtype", "copy a type"}; }

Handle short_float(std::size_t exponent_bits, std::size_t mantissa_bits, std::size_t bias) {
  auto type = copy(H5T_IEEE_F32LE);
  const char* action = "describe a 16-bit float";
  check(H5Tset_fields(type.get(), 15, mantissa_bits, exponent_bits, 0, mantissa_bits), "dtype", action);
  check(H5Tset_size(type.get(), 2), "dtype", action);
  check(H5Tset_precision(type.get(), 16), "dtype", action);
  check(H5Tset_ebias(type.get(), bias), "dtype", action);
  return type;
}

Handle boolean() {  // the enumeration that h5py reads as bool
  Handle type(H5Tenum_create(H5T_STD_I8LE), H5Tclose, "dtype", "describe a boolean");
  const signed char no = 0, yes = 1;
  check(H5Tenum_insert(type.get(), "FALSE", &no), "dtype", "describe a boolean");
  check(H5Tenum_insert(type.get(), "TRUE", &yes), "dtype", "describe a boolean");
  return type;
}

}  // namespace

Handle file_type(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return copy(H5T_IEEE_F64LE);
    case DType::f32:
      return copy(H5T_IEEE_F32LE);
    case DType::bf16:
      return short_float(8, 7, 127);
    case DType::f16:
      return short_float(5, 10, 15);
    case DType::i32:
      return copy(H5T_STD_I32LE);
    case DType::i64:
      return copy(H5T_STD_I64LE);
    case DType::boolean:
      return boolean();
    case DType::f8e4m3:
    case DType::f8e5m2:
    case DType::u8:
      return copy(H5T_STD_U8LE);
  }
  fail(Fault::programming, "dtype", "no HDF5 type for element type " + std::to_string(static_cast<int>(dtype)));
}

Fill missing_value(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return {0x7ff8000000000000};
    case DType::f32:
      return {0x7fc00000};
    case DType::bf16:
      return {0x7fc0};
    case DType::f16:
      return {0x7e00};
    case DType::f8e4m3:
    case DType::f8e5m2:
      return {0x7f};
    default:
      return {0};
  }
}

}  // namespace capstan::hdf5
