// Schedules as text: written for a person, read back strictly.
#include "pipeline/schedule.h"

#include <capstan/error.h>

#include <array>
#include <charconv>
#include <sstream>

namespace capstan::pipeline {

namespace {

constexpr std::array<std::string_view, 8> letters{"F", "B", "I", "W", "SF", "RF", "SB", "RB"};

[[noreturn]] void wrong(int line, const std::string& what) { fail(Fault::input, "pipeline schedule, line " + std::to_string(line), what); }

/// Takes a number from the front of `text`; -1 when there is none.
int take_number(std::string_view& text) {
  int n = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc() || n < 0) return -1;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return n;
}

bool take(std::string_view& text, std::string_view word) {
  if (text.substr(0, word.size()) != word) return false;
  text.remove_prefix(word.size());
  return true;
}

Action parse_action(std::string_view word, int line) {
  const std::string_view whole = word;
  Action a;
  a.stage = take_number(word);
  std::size_t length = 0;
  while (length < word.size() && word[length] >= 'A' && word[length] <= 'Z') ++length;
  std::size_t kind = 0;
  while (kind < letters.size() && letters[kind] != word.substr(0, length)) ++kind;
  word.remove_prefix(length);
  a.microbatch = take_number(word);
  if (a.stage < 0 || kind == letters.size() || a.microbatch < 0 || !word.empty())
    wrong(line, "expected an action <stage><F|B|I|W|SF|RF|SB|RB><microbatch> such as 2F5, got '" + std::string(whole) + "'");
  a.kind = static_cast<ActionKind>(kind);
  return a;
}

}  // namespace

std::string to_string(const Action& a) {
  return std::to_string(a.stage) + std::string(letters[static_cast<std::size_t>(a.kind)]) + std::to_string(a.microbatch);
}

std::string to_text(const Schedule& s) {
  std::string text = s.name + ": " + std::to_string(s.ranks) + " ranks, " + std::to_string(s.stages) + " stages, " +
                     std::to_string(s.microbatches) + " microbatches" + (s.backward ? "" : ", forward only") + "\n";
  for (std::size_t r = 0; r < s.rows.size(); ++r) {
    text += "rank " + std::to_string(r) + ":";
    for (const Action& a : s.rows[r]) text += " " + to_string(a);
    text += "\n";
  }
  return text;
}

Schedule parse_schedule(std::string_view text) {
  std::istringstream lines{std::string(text)};
  std::string line;
  std::getline(lines, line);
  Schedule s;
  const std::size_t colon = line.find(':');
  std::string_view head = line;
  if (colon != std::string::npos) s.name = line.substr(0, colon), head.remove_prefix(colon + 1);
  bool good = colon != std::string::npos && take(head, " ");
  if (good) s.ranks = take_number(head), good = take(head, " ranks, ");
  if (good) s.stages = take_number(head), good = take(head, " stages, ");
  if (good) s.microbatches = take_number(head), good = take(head, " microbatches");
  if (good) s.backward = !take(head, ", forward only");
  if (!good || !head.empty() || s.ranks < 1 || s.stages < 1 || s.microbatches < 1)
    wrong(1, "expected '<name>: <n> ranks, <n> stages, <n> microbatches', got '" + line + "'");
  for (int number = 2; std::getline(lines, line); ++number) {
    if (line.empty()) continue;
    std::string_view rest = line;
    const int expected = static_cast<int>(s.rows.size());
    if (!take(rest, "rank ") || take_number(rest) != expected || !take(rest, ":"))
      wrong(number, "expected 'rank " + std::to_string(expected) + ": <actions>', got '" + line + "'");
    auto& row = s.rows.emplace_back();
    std::istringstream words{std::string(rest)};
    for (std::string word; words >> word;) row.push_back(parse_action(word, number));
  }
  if (static_cast<int>(s.rows.size()) != s.ranks)
    wrong(1, "expected a line for each of " + std::to_string(s.ranks) + " ranks, got " + std::to_string(s.rows.size()));
  return s;
}

}  // namespace capstan::pipeline
