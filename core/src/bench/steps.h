// defines: StepPlan, measure_step(): a recipe's training step in a process of its own, and the same model in PyTorch.
#pragma once
#include "bench/table.h"

#include <capstan/export.h>

#include <string>
#include <vector>

namespace capstan::bench {

struct StepPlan {
  std::string program;                 ///< this program
  std::string python, script;          ///< PyTorch's side; python empty: none
  std::string device = "cuda";
  int steps = 10, warmup = 3;
  double seconds = 300;                ///< most that a process of ours may take
  double peer_seconds = 300;           ///< and one of PyTorch's, which also compiles
  std::vector<std::string> overrides;  ///< of every recipe
};

/// `capstan bench RECIPE --json` and, with the model that it describes, the script. What fails becomes the row's problem.
CAPSTAN_API StepRow measure_step(const StepPlan& plan, const std::string& recipe);

/// Whether this python has PyTorch with a GPU: "" or why not.
CAPSTAN_API std::string pytorch_problem(const std::string& python);

}  // namespace capstan::bench
