// defines: Part, cuda_part(), nccl_part(), open_part(): libraries that lie beside libcapstan.so and are opened when they are wanted, so
// that a build with them starts where what they need is missing.
#pragma once
#include <capstan/export.h>

#include <filesystem>
#include <string>

namespace capstan {

struct Part {
  std::filesystem::path file;
  std::string name;     ///< "CUDA part"
  std::string build;    ///< how a build gets one: "configure it with -DCAPSTAN_CUDA=ON"
  std::string needs;    ///< what must be installed for it to open
  std::string instead;  ///< what to do without it
};

/// libcapstan_cuda.so, libcapstan_nccl.so beside the library that this is in.
CAPSTAN_API Part cuda_part();
CAPSTAN_API Part nccl_part();

/// The function `name` of a part, which is never closed; null with the reason and what to do in `why`.
CAPSTAN_API void* open_part(const Part& part, const char* name, std::string& why);

}  // namespace capstan
