// defines: GpuCommunication, GpuRanks, make_gpu_world(), make_staged_world(): collectives among ranks whose data is memory
// of GPUs.
#pragma once
#include "comm/communicator.h"

#include <capstan/device.h>
#include <capstan/export.h>

#include <memory>
#include <string>
#include <vector>

namespace capstan {

/// How GPUs reach each other. automatic: NCCL where each rank has a GPU of its own, else staged.
enum class GpuCommunication : std::uint8_t { automatic, nccl, staged };

struct GpuRanks {
  std::shared_ptr<World> world;
  std::string words;  ///< "by NCCL 2.28.9", "through host memory (4 ranks share 1 GPU)"
};

/// The ranks of `control` with memory of `device`, each rank's own CUDA device, as their data. A collective starts after
/// what was queued on the device, and Handle::wait() makes what is queued later wait for it; the host need not see the data
/// then, it synchronizes for that. Called by all ranks. Error(input) when NCCL is asked for and cannot be had: what is
/// missing, or which ranks share a GPU.
CAPSTAN_API GpuRanks make_gpu_world(std::shared_ptr<World> control, std::shared_ptr<Device> device, GpuCommunication choice);

/// The same through host memory: copies to pinned memory, the collective of `control`, copies back, in pieces that overlap.
/// Ranks may share a GPU. Sums are those of `control`, to the bit.
CAPSTAN_API std::shared_ptr<World> make_staged_world(std::shared_ptr<World> control, std::shared_ptr<Device> device);

namespace comm {

/// A communicator of one rank: copies on the device.
CAPSTAN_API std::shared_ptr<Communicator> make_gpu_solo(std::string name, std::vector<int> ranks,
                                                        std::shared_ptr<Device> device);

}  // namespace comm
}  // namespace capstan
