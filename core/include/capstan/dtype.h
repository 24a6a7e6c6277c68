// defines: DType, its sizes and names, and the mapping from C++ types.
#pragma once
#include <capstan/export.h>
#include <capstan/kernels/bf16.h>

#include <cstdint>
#include <string_view>

namespace capstan {

using kernels::bf16;

/// Element types. f64 is the CPU reference; sums of f32 and bf16 run in f32, sums of f64 in f64.
enum class DType : std::uint8_t { f64, f32, bf16, f16, f8e4m3, f8e5m2, i32, i64, u8, boolean };

CAPSTAN_API std::int64_t size_of(DType dtype);
CAPSTAN_API std::string_view name_of(DType dtype);
/// Throws Error(input) on an unknown name, listing the known ones.
CAPSTAN_API DType dtype_from(std::string_view name);
CAPSTAN_API bool is_floating(DType dtype);

template <class T> inline constexpr DType dtype_of = DType::f32;
template <> inline constexpr DType dtype_of<double> = DType::f64;
template <> inline constexpr DType dtype_of<float> = DType::f32;
template <> inline constexpr DType dtype_of<bf16> = DType::bf16;
template <> inline constexpr DType dtype_of<std::int32_t> = DType::i32;
template <> inline constexpr DType dtype_of<std::int64_t> = DType::i64;
template <> inline constexpr DType dtype_of<std::uint8_t> = DType::u8;

}  // namespace capstan
