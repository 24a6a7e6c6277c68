// defines: make_mpi_world, mpi_launch_arguments: ranks as MPI processes.
#pragma once
#include "comm/communicator.h"

#include <capstan/export.h>

#include <memory>
#include <string>
#include <vector>

namespace capstan {

/// True when this build knows MPI.
CAPSTAN_API bool mpi_available();

/// The job that an MPI launcher (mpirun, srun) started, this process one rank of it. Once per process; MPI is entered and
/// left by a thread that the world owns, and no other thread calls it. Ranks that share a host (MPI's split by shared
/// memory) work in one window of shared memory, hosts reach each other by MPI's messages.
/// `timeout_seconds`: how long a rank is waited for before it counts as missing.
/// The program, when it leaves by an error: `if (world->fail_job(e.what())) print(e.what()); world->end_failed(code);`.
/// Dropping the world of a job that did not fail finalizes MPI (after a barrier with the same timeout).
/// `ranks_per_host`: tests take each so many ranks of a host for a host of their own, which others reach by messages only;
/// 0: hosts are hosts.
/// Errors: Error(runtime) when MPI is not there, does not start, or no rank of the host can make the window.
CAPSTAN_API std::shared_ptr<World> make_mpi_world(double timeout_seconds = 60, int ranks_per_host = 0);

/// What Open MPI's mpirun needs besides `-np N`, so that a killed rank is named by the others before they are ended with it,
/// ranks may outnumber cores, nothing spins, no rank is bound to a core, and a host that does not answer for `timeout_seconds`
/// is given up: {"--oversubscribe", "--bind-to", "none", ...}; "--allow-run-as-root" where this user is root.
CAPSTAN_API std::vector<std::string> mpi_launch_arguments(double timeout_seconds = 60);

}  // namespace capstan
