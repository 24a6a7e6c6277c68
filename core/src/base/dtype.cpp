#include <capstan/dtype.h>
#include <capstan/error.h>

#include <array>
#include <string>

namespace capstan {

namespace {
struct Row { DType dtype; std::int64_t size; std::string_view name; bool floating; };
constexpr std::array<Row, 10> rows{{{DType::f64, 8, "f64", true}, {DType::f32, 4, "f32", true}, {DType::bf16, 2, "bf16", true},
                                    {DType::f16, 2, "f16", true}, {DType::f8e4m3, 1, "f8e4m3", true}, {DType::f8e5m2, 1, "f8e5m2", true},
                                    {DType::i32, 4, "i32", false}, {DType::i64, 8, "i64", false}, {DType::u8, 1, "u8", false},
                                    {DType::boolean, 1, "bool", false}}};
const Row& row(DType dtype) { return rows[static_cast<std::size_t>(dtype)]; }
}  // namespace

std::int64_t size_of(DType dtype) { return row(dtype).size; }
std::string_view name_of(DType dtype) { return row(dtype).name; }
bool is_floating(DType dtype) { return row(dtype).floating; }

DType dtype_from(std::string_view name) {
  std::string known;
  for (const Row& r : rows) {
    if (r.name == name) return r.dtype;
    known += (known.empty() ? "" : ", ") + std::string(r.name);
  }
  fail(Fault::input, "dtype", "unknown element type '" + std::string(name) + "': expected one of " + known);
}

}  // namespace capstan
