#include "bench/op_table.h"

#include <fmt/format.h>

#include <algorithm>

namespace capstan::bench {

double empty_scope_seconds(Device& device) {
  constexpr int warm = 10, calls = 100;
  device.record(true, true);
  for (int i = 0; i < warm; ++i) OpScope(device, "nothing", Cost{});
  device.clear_ledger();
  for (int i = 0; i < calls; ++i) OpScope(device, "nothing", Cost{});
  const double seconds = device.ledger().at(0).seconds / calls;
  device.record(false);
  device.clear_ledger();
  return seconds;
}

std::string op_table(std::vector<OpRecord> ops, int steps, double total, double empty_scope) {
  std::sort(ops.begin(), ops.end(), [](const OpRecord& a, const OpRecord& b) { return a.seconds > b.seconds; });
  std::string text = fmt::format("  {:<26} {:>6} {:>9} {:>7} {:>9} {:>8}\n", "op", "calls", "ms/step", "share", "GFLOP/s", "GB/s");
  double known = 0;
  for (const OpRecord& op : ops) {
    known += op.seconds;
    const double bytes = op.cost.read + op.cost.write;
    // No memory is that fast: another op did its work on the way (a product that takes GELU's slope, or a bias's gradient).
    if (bytes > 1e14 * op.seconds) {
      text += fmt::format("  {:<26} {:>6} {:>9} {:>7} {:>18}\n", op.name, op.calls / steps, "-", "-", "within another op");
      continue;
    }
    const bool told = op.seconds > 0 && op.seconds >= 10 * empty_scope * static_cast<double>(op.calls);
    const auto rate = [&](double amount, int digits) { return told ? fmt::format("{:.{}f}", amount / op.seconds * 1e-9, digits) : std::string("-"); };
    text += fmt::format("  {:<26} {:>6} {:>9.2f} {:>6.1f}% {:>9} {:>8}\n", op.name, op.calls / steps, 1e3 * op.seconds / steps, 100 * op.seconds / total,
                        rate(op.cost.flop, 0), rate(bytes, 1));
  }
  return text + fmt::format("  {:<26} {:>6} {:>9.2f} {:>6.1f}%\n", "(between ops)", "", 1e3 * (total - known) / steps, 100 * (total - known) / total);
}

}  // namespace capstan::bench
