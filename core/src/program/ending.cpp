// From an exception to an exit code and words.
#include "program/ending.h"

#include "base/look.h"
#include "train/trainer.h"

#include <capstan/error.h>

#include <filesystem>
#include <new>

namespace capstan::program {

Ending ending_of(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(std::move(thrown));
  } catch (const train::Interrupted& e) {
    return {1, e.what(), true};
  } catch (const Error& e) {
    return {e.fault() == Fault::input ? 2 : 1, e.what()};
  } catch (const std::filesystem::filesystem_error& e) {  // the last net: what is known to meet a person's path says more
    std::string paths = e.path1().string();
    if (!e.path2().empty()) paths += " to " + e.path2().string();
    return {is_of_input(e.code()) ? 2 : 1, "[" + (paths.empty() ? "working folder" : paths) + "] cannot be used: " + reason_and_advice(e.code())};
  } catch (const std::bad_alloc&) {
    return {1, "out of memory: a smaller data.micro_batch, data.sequence_length or train.recompute=block lowers the need"};
  } catch (const std::exception& e) {
    return {1, e.what()};
  } catch (...) {
    return {1, "something was thrown that is no exception"};
  }
}

}  // namespace capstan::program
