// defines: make_nccl_world: collectives among GPUs, behind the interface of those among CPUs.
#pragma once
#include "comm/communicator.h"

#include <cuda_runtime_api.h>

#include <memory>

namespace capstan {

/// The same ranks as `control`, each with GPU `device`, one GPU each; data is memory of that GPU. `control` (MPI, shared memory)
/// passes the ids, carries barriers and says who is missing; it must outlive nothing: this world keeps it.
/// `compute` is the stream that makes and uses the data: a collective starts after what was queued on it, and Handle::wait()
/// makes it wait for the collective, not the caller; a host that must see the data synchronizes the stream.
/// The ledger's seconds are those between the collective's start and end on the GPU, its waits those of the host.
///
/// Unlike the CPU worlds, NCCL chooses the order of a sum, the same in every run on the same GPUs and links, and rounds a bf16 sum
/// at every hop: reduce gradients in f32. u8 sums wrap.
/// Errors: Error(runtime) naming communicator, collective and NCCL's text; a collective that has not ended within
/// control->timeout() ends the job (World::fail_job), and the ranks that are missing are named by `control`.
__attribute__((visibility("default"))) std::shared_ptr<World> make_nccl_world(std::shared_ptr<World> control, int device,
                                                                              cudaStream_t compute);

}  // namespace capstan
