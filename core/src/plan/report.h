// defines: to_text(), to_json(): a prediction for a person and for a program.
#pragma once
#include "plan/predict.h"
#include "plan/setting.h"

#include <capstan/export.h>

#include <string>
#include <vector>

namespace capstan::plan {

/// Tables of memory, traffic and time. `device` null: no times, nothing about fitting. `advice` for when it does not fit.
CAPSTAN_API std::string to_text(const Prediction& prediction, const Setting& setting, const DeviceModel* device, const std::vector<Advice>& advice);
/// The same, and what each pipeline rank holds. Bytes and seconds.
CAPSTAN_API std::string to_json(const Prediction& prediction, const Setting& setting, const DeviceModel* device, const std::vector<Advice>& advice);

}  // namespace capstan::plan
