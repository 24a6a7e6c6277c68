// defines: how the engine's tensors look to the checkpoint protocol.
#pragma once
#include "checkpoint/loader.h"
#include "engine/engine.h"
#include "plugin/host.h"

#include <span>
#include <vector>

namespace capstan::train {

std::vector<checkpoint::Wanted> wanted_tensors(std::span<const NamedTensor> tensors);
std::vector<SavedTensor> saved_tensors(std::span<const NamedTensor> tensors);
/// Makes formats by the name in a manifest, with their default options.
checkpoint::FormatMaker format_maker(PluginHost& host);

}  // namespace capstan::train
