// From an exception to an exit code and words.
#include "program/ending.h"

#include <capstan/error.h>

#include <new>

namespace capstan::program {

Ending ending_of(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(std::move(thrown));
  } catch (const Error& e) {
    return {e.fault() == Fault::input ? 2 : 1, e.what()};
  } catch (const std::bad_alloc&) {
    return {1, "out of memory: a smaller data.micro_batch, data.sequence_length or train.recompute=block lowers the need"};
  } catch (const std::exception& e) {
    return {1, e.what()};
  } catch (...) {
    return {1, "something was thrown that is no exception"};
  }
}

}  // namespace capstan::program
