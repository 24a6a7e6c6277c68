// defines: how the engine's tensors look to the checkpoint protocol.
#pragma once
#include "checkpoint/loader.h"
#include "engine/engine.h"
#include "plugin/host.h"

#include <capstan/export.h>

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

namespace capstan::train {

/// Where checkpoints write what lies on a GPU from; empty for tensors of the CPU, which are written where they lie.
using HostMemory = std::vector<std::vector<std::byte>>;

/// Boxes that a load brings to their tensors, on any device. `stored`: the element type that checkpoints hold them in, where that
/// is not the tensors' own; they are then cast, one by one.
CAPSTAN_API std::vector<checkpoint::Wanted> wanted_tensors(std::span<const NamedTensor> tensors, std::optional<DType> stored = {});
/// `host` must live until Saver::save() has returned, which copies or writes before it does.
CAPSTAN_API std::vector<SavedTensor> saved_tensors(std::span<const NamedTensor> tensors, HostMemory& host);
/// Makes formats by the name in a manifest, with their default options.
CAPSTAN_API checkpoint::FormatMaker format_maker(PluginHost& host);

}  // namespace capstan::train
