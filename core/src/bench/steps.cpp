// Whole steps, each in a process of its own: the memory of one does not stand in the way of the next, and one that fails
// does not end the others.
#include "bench/steps.h"

#include "bench/child.h"

#include <nlohmann/json.hpp>

#include <filesystem>

namespace capstan::bench {

namespace {

using Json = nlohmann::json;

/// The last line of a child's output as JSON; null when it ended badly or wrote none, then `problem` says so.
Json answer(const ChildResult& result, std::string& problem) {
  if (result.status == 0) {
    const std::size_t end = result.out.find_last_not_of("\n\r "), begin = end == std::string::npos ? end : result.out.rfind('\n', end);
    if (end != std::string::npos) {
      Json j = Json::parse(result.out.substr(begin == std::string::npos ? 0 : begin + 1), nullptr, false);
      if (j.is_object()) return j;
    }
  }
  problem = result.last_words();
  if (problem.empty()) problem = "it ended with code " + std::to_string(result.status) + " and said nothing";
  return nullptr;
}

}  // namespace

std::string pytorch_problem(const std::string& python) {
  const ChildResult r = run_child({python, "-c", "import torch, sys; sys.exit('its PyTorch has no GPU') if not torch.cuda.is_available() else None"}, 120);
  return r.status == 0 ? "" : r.last_words();
}

StepRow measure_step(const StepPlan& plan, const std::string& recipe) {
  StepRow row;
  row.model = std::filesystem::path(recipe).stem().string();
  std::vector<std::string> words{plan.program, "bench", recipe, "run.device=" + plan.device, "--json", "--steps", std::to_string(plan.steps), "--warmup", std::to_string(plan.warmup)};
  words.insert(words.end(), plan.overrides.begin(), plan.overrides.end());
  const Json j = answer(run_child(words, plan.seconds), row.problem);
  if (j.is_null()) return row;
  try {
    row.precision = j.at("recipe_options").at("precision").at("compute").get<std::string>();
    if (const std::string linear = j.at("recipe_options").at("precision").at("linear"); linear != "compute") row.precision += "+" + linear;
    row.tokens_per_second = j.at("tokens_per_s"), row.flops = j.at("flops"), row.peak_share = j.at("peak_share"), row.peak_mib = j.at("reserved_mib");
    row.busy_share = j.value("busy_share", 0.0);
    if (plan.python.empty()) return row;
    StepRow::Peer& peer = row.peer.emplace();
    peer.engine = "PyTorch";
    const Json k = answer(run_child({plan.python, plan.script, "--recipe", j.at("recipe_options").dump(), "--steps", std::to_string(plan.steps), "--warmup", std::to_string(plan.warmup)}, plan.peer_seconds),
                          peer.problem);
    if (k.is_null()) return row;
    peer.engine = k.at("engine"), peer.tokens_per_second = k.at("tokens_per_s"), peer.peak_mib = k.at("peak_mib");
  } catch (const Json::exception& e) {
    (row.peer ? row.peer->problem : row.problem) = std::string("an answer that does not fit: ") + e.what();
  }
  return row;
}

}  // namespace capstan::bench
