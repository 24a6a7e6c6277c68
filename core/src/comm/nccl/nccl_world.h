// defines: OpenNccl: how core gets a world of NCCL's communicators from libcapstan_nccl.so. Needs no CUDA header.
#pragma once
#include "comm/gpu_world.h"

namespace capstan {

/// `capstan_nccl_open`: the same ranks as `control`, each with a CUDA device of its own, one GPU each; data is memory of
/// that GPU. `control` (MPI, shared memory) passes the ids, carries barriers and says who is missing. False when `interface`
/// is not this library's kernels::cuda::gpu_interface. The ledger's seconds are those between a collective's start and end
/// on the GPU.
///
/// NCCL chooses the order of a sum, the same in every run on the same GPUs and links, and rounds a bf16 sum at every hop:
/// the engine sends bf16 gradients by all_to_all and adds them in f32 itself. u8 sums wrap. Memory of World::shared_memory()
/// comes from NCCL, and Communicator::adopt() registers it. Errors: Error(runtime) naming communicator, collective and
/// NCCL's text; a collective that has not ended within control->timeout() ends the job (World::fail_job), and the ranks that
/// are missing are named by `control`.
using OpenNccl = bool (*)(int interface, std::shared_ptr<World> control, std::shared_ptr<Device> device, GpuRanks& ranks);

}  // namespace capstan
