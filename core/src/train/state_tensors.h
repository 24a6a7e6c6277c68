// defines: how the engine's tensors look to the checkpoint protocol.
#pragma once
#include "checkpoint/loader.h"
#include "engine/engine.h"
#include "plugin/host.h"

#include <capstan/export.h>

#include <cstddef>
#include <span>
#include <vector>

namespace capstan::train {

/// Where checkpoints read and write what lies on a GPU; empty for tensors of the CPU, which are read and written in place.
using HostMemory = std::vector<std::vector<std::byte>>;

/// `host` must live until the load is done; then to_device() takes what was read to its place.
CAPSTAN_API std::vector<checkpoint::Wanted> wanted_tensors(std::span<const NamedTensor> tensors, HostMemory& host);
void to_device(std::span<const NamedTensor> tensors, const HostMemory& host);
/// `host` must live until Saver::save() has returned, which copies or writes before it does.
CAPSTAN_API std::vector<SavedTensor> saved_tensors(std::span<const NamedTensor> tensors, HostMemory& host);
/// Makes formats by the name in a manifest, with their default options.
CAPSTAN_API checkpoint::FormatMaker format_maker(PluginHost& host);

}  // namespace capstan::train
