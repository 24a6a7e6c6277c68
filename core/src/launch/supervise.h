// defines: Job, supervise(): starts the ranks of a job on this machine, passes signals on, starts again after faults.
#pragma once
#include <capstan/export.h>

#include <string>
#include <vector>

namespace capstan::launch {

struct CAPSTAN_API Job {
  std::string executable;
  std::vector<std::string> words;  ///< after the executable: what each rank runs, with --supervised among them
  int ranks = 1;                   ///< 1: no mpirun
  int max_restarts = 0;
  double backoff_seconds = 1;    ///< before the first restart; doubles with each, up to a minute
  double patience_seconds = 10;  ///< after a failure was told: what is left then is killed
  std::string name = "capstan";  ///< in front of what the supervisor says
};

/// Runs the job to its end; the exit code that the program should have: 0 done, 2 bad input, 1 anything else.
/// SIGINT and SIGTERM are passed on once (to ranks under mpirun as SIGUSR1 and SIGUSR2, which it forwards to every host); a
/// second one kills all processes of the job. What ranks write to standard error comes through, mpirun's own banners do
/// not. Neither bad input nor a stop that was asked for is followed by a restart. Error(input) when there is no mpirun.
CAPSTAN_API int supervise(const Job& job);

/// Words for mpirun ahead of the program, environment of the ranks included.
CAPSTAN_API std::vector<std::string> mpirun_words(int ranks);

/// Called by a rank: ends this process when the one that started it dies, so that no rank outlives its job.
CAPSTAN_API void end_with_parent();

}  // namespace capstan::launch
