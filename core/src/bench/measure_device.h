// defines: measure_limits(), measure_cases(): the parts of `capstan bench gpu` that run in this process.
#pragma once
#include "bench/cases.h"
#include "bench/measure.h"
#include "bench/table.h"

#include <functional>
#include <string>
#include <vector>

namespace capstan::bench {

using Say = std::function<void(const std::string&)>;

/// Whether products in fp8 with a scale a tensor run here.
CAPSTAN_API bool has_fp8(Device& device);

/// The copy's bandwidth and the rates of products of `types`, and of fp8 where a GPU has them; a type whose products this device refuses is left out, with a
/// word to `say`.
CAPSTAN_API Limits measure_limits(Device& device, Size size, const std::vector<DType>& types, Stopwatch& stopwatch, const Say& say);

/// One row for each case, added to the table and said at once. What a case throws becomes its row's problem.
CAPSTAN_API void measure_cases(Table& table, const std::string& part, const std::vector<Case>& cases, Device& device, Stopwatch& stopwatch,
                               const Say& say);

}  // namespace capstan::bench
