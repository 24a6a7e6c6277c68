// defines: make_shared_memory_world(), shared_memory_file(): ranks that are processes of one host, started by anything, without MPI.
#pragma once
#include "comm/communicator.h"

#include <capstan/export.h>

#include <memory>
#include <string>

namespace capstan::launch {

/// Rank `rank` of `size` of the job that meets under `name`: rank 0 lays out a piece of /dev/shm, the others find it by the
/// name, and once all are there the name is free again. What a dead job left under it is not taken for this one.
/// Error(runtime) naming the rank that did not come within `timeout_seconds`, or when /dev/shm has no room.
CAPSTAN_API std::shared_ptr<World> make_shared_memory_world(const std::string& name, int rank, int size,
                                                            double timeout_seconds);
/// The file in /dev/shm that holds the name until all ranks are there; beside it, while rank 0 lays it out, one whose name
/// begins with it.
CAPSTAN_API std::string shared_memory_file(const std::string& name);

}  // namespace capstan::launch
