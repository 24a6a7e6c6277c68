// defines: op_table(), empty_scope_seconds(): where the time of profiled steps went.
#pragma once
#include <capstan/device.h>
#include <capstan/export.h>

#include <string>
#include <vector>

namespace capstan::bench {

/// What the scope of an op that does nothing measures on this device: how little its clock can tell. Forgets the ledger.
CAPSTAN_API double empty_scope_seconds(Device& device);

/// One line an op, the slowest first, and what lay between them. `ops` are of `steps` steps that took `total` seconds together;
/// rates stand where a call took ten times `empty_scope` seconds or more.
CAPSTAN_API std::string op_table(std::vector<OpRecord> ops, int steps, double total, double empty_scope);

}  // namespace capstan::bench
