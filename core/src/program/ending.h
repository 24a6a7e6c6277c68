// defines: Ending: what the program says and the exit code that it ends with when something was thrown.
#pragma once
#include <exception>
#include <string>

namespace capstan::program {

struct Ending {
  int code = 1;         ///< 2: bad input; 1: anything else
  std::string message;
  bool interrupted = false;  ///< by a signal
};

Ending ending_of(std::exception_ptr thrown);

}  // namespace capstan::program
