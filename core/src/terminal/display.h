// defines: is_live(), Display: the run's face on the terminal: a header, one live line, notes above it. Plain lines
// when the output is no terminal.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace capstan::terminal {

/// Whether a line on this file descriptor can be rewritten: a terminal that is not TERM=dumb.
CAPSTAN_API bool is_live(int descriptor);

class CAPSTAN_API Display {
 public:
  /// `shown` false: of a rank that is not the one which speaks: what it has to say is in its log.
  explicit Display(bool shown = true);
  ~Display();
  Display(const Display&) = delete;
  Display& operator=(const Display&) = delete;

  bool live() const { return live_; }
  /// A heading and its rows, aligned.
  void header(const std::string& title, const std::vector<std::pair<std::string, std::string>>& rows);
  /// Rewrites the live line; without a terminal it prints only when `keep`. `shorter`: what to show instead where the
  /// terminal is too narrow for it, longest first; the last one is cut off at its edge.
  void status(const std::string& line, bool keep, const std::vector<std::string>& shorter = {});
  /// A line that stays, above the live one.
  void note(const std::string& line);
  /// Something that went wrong and did not stop the run; also in plain lines, marked.
  void warn(const std::string& line);
  /// Text of the model, indented.
  void text(const std::string& title, const std::string& body);
  /// Ends the live line.
  void done();

 private:
  void clear();
  bool shown_, live_;
  std::string line_;
};

/// "1.24 B", "124.4 M", "10.7 k"
CAPSTAN_API std::string short_count(double n);
/// "1:02:03", "2:05", "42 s"
CAPSTAN_API std::string short_time(double seconds);

}  // namespace capstan::terminal
