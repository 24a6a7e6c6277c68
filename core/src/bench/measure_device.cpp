// Runs cases one after another; operands of one are gone before the next makes its own.
#include "bench/measure_device.h"

#include <kernels/backend.h>

#include <exception>

namespace capstan::bench {

bool has_fp8(Device& device) { return device.backend().fp8_problem(kernels::Scaling::tensor).empty(); }

Limits measure_limits(Device& device, Size size, const std::vector<DType>& types, Stopwatch& stopwatch, const Say& say) {
  Limits limits;
  const auto rate = [&](const Case& c) { return c.amount / stopwatch.seconds(device, c.prepare()); };
  limits.copy = rate(copy_case(device, size));
  for (const DType dtype : types) {
    try {
      limits.products[dtype] = rate(square_case(device, size, dtype));
    } catch (const std::exception& e) {
      say("no products of " + std::string(name_of(dtype)) + ": " + e.what() + "\n");
    }
  }
  // fp8 has scales to set up: its rate is the backend's own measurement.
  if (device.kind() == DeviceKind::cuda && has_fp8(device))
    limits.products[DType::f8e4m3] = device.backend().gemm_rate(kernels::Num::f8e4m3);
  return limits;
}

void measure_cases(Table& table, const std::string& part, const std::vector<Case>& cases, Device& device, Stopwatch& stopwatch, const Say& say) {
  say(Table::head_text(part));
  for (const Case& c : cases) {
    Row row{part, c.name, c.bound, c.amount, 0, "", c.reference};
    try {
      row.seconds = stopwatch.seconds(device, c.prepare());
    } catch (const std::exception& e) {
      row.problem = e.what();
    }
    table.rows.push_back(row);
    say(table.text(row));
  }
}

}  // namespace capstan::bench
