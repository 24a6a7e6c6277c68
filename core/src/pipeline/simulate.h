// defines: Costs, Simulation, simulate(), describe(): what a schedule costs before it runs.
#pragma once
#include "pipeline/schedule.h"

#include <capstan/export.h>

#include <string>
#include <vector>

namespace capstan::pipeline {

/// In any one unit of time; one number for all stages, or one for each. A backward costs input + weight. Recomputation
/// belongs to `input`.
struct Costs {
  std::vector<double> forward{1}, input{1}, weight{1};
  double latency = 0;  ///< of a transfer between ranks; it hides behind compute
};

struct TimedAction { Action action; double begin = 0, end = 0; };

struct Simulation {
  std::string name;
  int ranks = 1, stages = 1, microbatches = 1;
  double makespan = 0;
  double bubble = 0;            ///< share of all ranks' time that is idle
  std::vector<double> busy;     ///< per rank
  std::vector<int> live;        ///< per rank: most microbatches held at once, each stage's counted
  std::vector<std::vector<TimedAction>> timeline;  ///< compute actions per rank
};

/// Runs the table's compute actions; transfers never block the sender. Error(input) naming an action that cannot start.
CAPSTAN_API Simulation simulate(const Schedule& schedule, const Costs& costs = {});

/// "1f1b over 4 ranks, 8 microbatches: 27.3% bubble, live microbatches 4 3 2 1".
CAPSTAN_API std::string describe(const Simulation& simulation);

}  // namespace capstan::pipeline
