// defines: Launch: which rank this process is, and who says so.
#pragma once
#include "comm/communicator.h"

#include <capstan/export.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace capstan::launch {

/// A variable's value, or nothing. Tests give their own.
using Environment = std::function<std::optional<std::string>(const std::string& name)>;
CAPSTAN_API Environment process_environment();

/// How the ranks of a job find each other.
enum class Bootstrap : unsigned char {
  single,  ///< there is one rank: no MPI, no thread
  spawn,   ///< this process is no rank: it starts them, on this machine
  mpi,     ///< mpirun or srun started this rank
  shared,  ///< torchrun or the like started this rank, all ranks are on this host: they meet in shared memory
};

/// One launcher's word on this process. -1: it does not say.
struct LaunchSource {
  std::string launcher;  ///< "mpirun"
  int rank = -1, size = -1, local_rank = -1, local_size = -1;
  std::string variables;  ///< "OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=4"
};

struct CAPSTAN_API Launch {
  Bootstrap bootstrap = Bootstrap::single;
  int rank = 0, size = 1;
  int local_rank = -1, local_size = -1;  ///< among the ranks of this host; -1: not known before the world is made
  LaunchSource by;
  std::string meeting;  ///< shared: the name that the ranks of this job share, "localhost:29500"

  /// Looks at `--ranks` (nothing when it was not given) and at what launchers leave in the environment: Open MPI's mpirun,
  /// PMI (MPICH, srun --mpi=pmi2), Slurm's srun, torchrun. Error(input) when two of them disagree, naming both values; when
  /// a launcher says half of it; when it says what cannot be; when torchrun spread the ranks over hosts.
  static Launch detect(std::optional<int> ranks, const Environment& environment = process_environment());

  /// "4 ranks, by mpirun (OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=4)"
  std::string describe() const;

  /// The world of this rank; with Bootstrap::mpi, Error(input) when MPI counts other ranks than the launcher.
  std::shared_ptr<World> make_world(double timeout_seconds) const;
};

/// Threads for one rank: `asked` when it is not 0, else the host's usable cores shared out evenly over its ranks.
CAPSTAN_API int threads_of_rank(int asked, int local_size);
/// Cores that this process may use, by its affinity.
CAPSTAN_API int usable_cores();

}  // namespace capstan::launch
