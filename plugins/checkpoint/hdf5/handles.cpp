// HDF5's error stack as one line of text.
#include "handles.h"

#include <capstan/error.h>

namespace capstan::hdf5 {
namespace {

herr_t collect(unsigned n, const H5E_error2_t* entry, void* target) {
  auto& text = *static_cast<std::string*>(target);
  if (n > 0) text += " < ";
  text += std::string(entry->func_name ? entry->func_name : "?") + ": " + (entry->desc ? entry->desc : "?");
  return 0;
}

}  // namespace

void fail_hdf5(const std::string& where, const std::string& action) {
  std::string stack;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, collect, &stack);
  fail(Fault::runtime, where, "cannot " + action + ": HDF5 says: " + (stack.empty() ? "nothing" : stack));
}

}  // namespace capstan::hdf5
