// defines: Record: how a rank tells the process that supervises its job how the job went.
#pragma once
#include <capstan/export.h>

#include <optional>
#include <string>
#include <string_view>

namespace capstan::launch {

/// One line of standard error: the record separator of RFC 7464, a JSON object, a newline. mpirun carries it from any host.
struct CAPSTAN_API Record {
  enum class Event : unsigned char { done, stopped, failed };
  Event event = Event::done;
  int rank = 0;
  int code = 0;         ///< that the program should end with
  std::string message;  ///< failed: what is to be said

  std::string line() const;
  /// Nothing for a line that is none.
  static std::optional<Record> parse(std::string_view line);
};

}  // namespace capstan::launch
