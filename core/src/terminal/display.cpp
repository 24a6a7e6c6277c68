#include "terminal/display.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace capstan::terminal {

bool is_live(int descriptor) {
  const char* term = std::getenv("TERM");
  return isatty(descriptor) == 1 && term != nullptr && std::string(term) != "dumb";
}

Display::Display(bool shown) : shown_(shown), live_(shown && is_live(STDOUT_FILENO)) {}

Display::~Display() { done(); }

void Display::clear() {
  if (live_ && !line_.empty()) fmt::print("\r\x1b[2K");
}

void Display::header(const std::string& title, const std::vector<std::pair<std::string, std::string>>& rows) {
  if (!shown_) return;
  clear();
  std::size_t width = 0;
  for (const auto& [name, value] : rows) width = std::max(width, name.size());
  fmt::print("{}{}{}\n", live_ ? "\x1b[1m" : "", title, live_ ? "\x1b[0m" : "");
  for (const auto& [name, value] : rows) fmt::print("  {:<{}}  {}\n", name, width, value);
  std::fflush(stdout);
}

void Display::status(const std::string& line, bool keep, const std::vector<std::string>& shorter) {
  if (!shown_) return;
  if (!live_) {
    if (keep) fmt::print("{}\n", line);
    std::fflush(stdout);
    return;
  }
  winsize size{};
  std::string shown = line;
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1) {
    for (std::size_t i = 0; i < shorter.size() && shown.size() >= size.ws_col; ++i) shown = shorter[i];
    if (shown.size() >= size.ws_col) shown.resize(size.ws_col - 1u);
  }
  fmt::print("\r\x1b[2K{}", shown);
  line_ = shown;
  std::fflush(stdout);
}

void Display::note(const std::string& line) {
  if (!shown_) return;
  clear();
  fmt::print("{}\n", line);
  if (live_ && !line_.empty()) fmt::print("{}", line_);
  std::fflush(stdout);
}

void Display::warn(const std::string& line) {
  if (!shown_) return;
  clear();
  std::fflush(stdout);  // the live line is gone before this one comes
  const bool color = live_ && is_live(STDERR_FILENO);
  fmt::print(stderr, "{}warning:{} {}\n", color ? "\x1b[33m" : "", color ? "\x1b[0m" : "", line);
  std::fflush(stderr);
}

void Display::text(const std::string& title, const std::string& body) {
  if (!shown_) return;
  clear();
  fmt::print("{}\n", title);
  std::size_t at = 0;
  while (at <= body.size()) {
    std::size_t end = body.find('\n', at);
    if (end == std::string::npos) end = body.size();
    std::string line;
    for (const char c : body.substr(at, end - at))  // the model may write control characters: the terminal must not obey them
      line += static_cast<unsigned char>(c) >= 32 && c != 127 ? c : c == '\t' ? ' ' : '.';
    fmt::print("  | {}\n", line);
    at = end + 1;
  }
  std::fflush(stdout);
}

void Display::done() {
  if (live_ && !line_.empty()) fmt::print("\n");
  line_.clear();
  std::fflush(stdout);
}

std::string short_count(double n) {
  if (n >= 1e12) return fmt::format("{:.2f} T", n * 1e-12);
  if (n >= 1e9) return fmt::format("{:.2f} B", n * 1e-9);
  if (n >= 1e6) return fmt::format("{:.1f} M", n * 1e-6);
  if (n >= 1e3) return fmt::format("{:.1f} k", n * 1e-3);
  return fmt::format("{:.0f}", n);
}

std::string short_time(double seconds) {
  const auto s = static_cast<long>(seconds + 0.5);
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  if (s >= 60) return fmt::format("{}:{:02}", s / 60, s % 60);
  return fmt::format("{} s", s);
}

}  // namespace capstan::terminal
