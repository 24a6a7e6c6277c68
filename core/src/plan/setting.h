// defines: setting_from(), sources_from(): what a session's recipe means over a number of ranks.
#pragma once
#include "plan/predict.h"
#include "train/session.h"

#include <capstan/export.h>

namespace capstan::plan {

/// Over `ranks` ranks. Error(input) at the recipe's key when they do not make the mesh that it asks for, or when the data
/// ranks are more than the step has sequences.
CAPSTAN_API Setting setting_from(const train::Session& session, int ranks);
/// Its model and optimizer. The session outlives them.
CAPSTAN_API Sources sources_from(const train::Session& session);

/// Keys that would make a step fit, with what it would take then: tried one after the other, each alone.
struct Advice { std::string key; double bytes = 0; bool fits = false; };
CAPSTAN_API std::vector<Advice> advise(const Sources& sources, const Setting& setting, double memory);

}  // namespace capstan::plan
