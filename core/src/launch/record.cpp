// Records: one line of JSON each.
#include "launch/record.h"

#include <nlohmann/json.hpp>

#include <array>

namespace capstan::launch {
namespace {
constexpr char separator = '\x1e';
constexpr std::array<const char*, 3> names{"done", "stopped", "failed"};
}  // namespace

std::string Record::line() const {
  nlohmann::ordered_json j;
  j["event"] = names[static_cast<std::size_t>(event)], j["rank"] = rank, j["code"] = code;
  if (!message.empty()) j["message"] = message;
  // A message may quote bytes of a broken file: what is no UTF-8 is replaced.
  return separator + j.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::optional<Record> Record::parse(std::string_view line) {
  if (line.empty() || line[0] != separator) return std::nullopt;
  const auto j = nlohmann::json::parse(line.substr(1), nullptr, false);
  if (!j.is_object() || !j.contains("event") || !j["event"].is_string()) return std::nullopt;
  Record r;
  const auto name = j["event"].get<std::string>();
  for (std::size_t i = 0; i <= names.size(); ++i) {
    if (i == names.size()) return std::nullopt;
    if (name != names[i]) continue;
    r.event = static_cast<Event>(i);
    break;
  }
  const auto number = [&](const char* key) { return j.contains(key) && j[key].is_number_integer() ? j[key].get<int>() : 0; };
  r.rank = number("rank"), r.code = number("code");
  if (j.contains("message") && j["message"].is_string()) r.message = j["message"].get<std::string>();
  return r;
}

}  // namespace capstan::launch
