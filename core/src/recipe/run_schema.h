// defines: run_schema(), check_run_options(): the top level of every recipe that runs.
#pragma once
#include <capstan/export.h>
#include <capstan/options.h>

namespace capstan {

/// What `capstan train` and all that reads its recipes understand.
CAPSTAN_API Schema run_schema();

/// What one key alone cannot show: keys of a run that contradict each other. Error(input) at the key.
CAPSTAN_API void check_run_options(const Options& options);

}  // namespace capstan
