// RunState as JSON.
#include "checkpoint/run_state.h"

#include <capstan/error.h>

#include <nlohmann/json.hpp>

#include <set>

namespace capstan::checkpoint {

using nlohmann::json;

std::string RunState::to_json() const {
  try {
    json builds = json::array();
    for (const auto& p : plugins) builds.push_back({{"kind", p.kind}, {"name", p.name}, {"version", p.version}});
    const json document = {{"step", step},      {"tokens", tokens},
                           {"seed", seed},      {"data_cursor", data_cursor.empty() ? json() : json::parse(data_cursor)},
                           {"recipe", recipe},  {"recipe_digest", recipe_digest},
                           {"plugins", builds}, {"more", more}};
    return document.dump(1) + "\n";
  } catch (const json::exception& e) {
    fail(Fault::programming, "run state", e.what());
  }
}

RunState RunState::parse(const std::string& text, const std::string& where) {
  RunState state;
  try {
    const auto document = json::parse(text);
    static const std::set<std::string> known = {"step",   "tokens",        "seed",    "data_cursor",
                                                "recipe", "recipe_digest", "plugins", "more"};
    for (const auto& [key, unused] : document.items()) {
      if (!known.contains(key)) fail(Fault::input, where, "unknown field \"" + key + "\" in the run state");
    }
    state.step = document.at("step").get<std::int64_t>();
    state.tokens = document.at("tokens").get<std::int64_t>();
    state.seed = document.at("seed").get<std::uint64_t>();
    if (const auto& cursor = document.at("data_cursor"); !cursor.is_null()) state.data_cursor = cursor.dump();
    state.recipe = document.at("recipe").get<std::string>();
    state.recipe_digest = document.at("recipe_digest").get<std::string>();
    for (const auto& p : document.at("plugins")) {
      state.plugins.push_back(
          {p.at("kind").get<std::string>(), p.at("name").get<std::string>(), p.at("version").get<std::string>()});
    }
    state.more = document.at("more").get<std::map<std::string, std::string>>();
  } catch (const json::exception& e) {
    fail(Fault::input, where, std::string("not a run's state: ") + e.what());
  }
  return state;
}

}  // namespace capstan::checkpoint
