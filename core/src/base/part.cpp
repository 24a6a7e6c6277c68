// Opens the libraries beside this one.
#include "base/part.h"

#include <capstan/error.h>

#include <dlfcn.h>

#include <system_error>

namespace capstan {

namespace {

namespace fs = std::filesystem;

fs::path folder() {
  Dl_info here{};
  if (dladdr(reinterpret_cast<const void*>(&open_part), &here) == 0 || here.dli_fname == nullptr)
    fail(Fault::runtime, "libcapstan.so", "the loader does not say where it lies, so that nothing beside it is found");
  return fs::path(here.dli_fname).parent_path();
}

}  // namespace

Part cuda_part() {
  return {folder() / "libcapstan_cuda.so", "CUDA part", "configure it with -DCAPSTAN_CUDA=ON",
          "CUDA 13's libraries (cublasLt, cudnn) must be installed, or their folders named in LD_LIBRARY_PATH", "set run.device: cpu"};
}

Part nccl_part() {
  return {folder() / "libcapstan_nccl.so", "NCCL part", "configure it with -DCAPSTAN_CUDA=ON where nccl.h is",
          "install NCCL 2 for CUDA 13 (libnccl.so.2: the package libnccl2, or pip's nvidia-nccl-cu13 with its folder in LD_LIBRARY_PATH)",
          "set mesh.gpu_communication: staged, which goes through host memory"};
}

void* open_part(const Part& part, const char* name, std::string& why) {
  std::error_code error;
  if (!fs::exists(part.file, error)) {
    why = "this build has no " + part.name + " (" + part.file.string() + " does not exist): " + part.build + ", or " + part.instead;
    return nullptr;
  }
  void* const library = dlopen(part.file.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: what it registered stays
  if (library == nullptr) {
    const char* text = dlerror();
    why = part.file.string() + " cannot be opened: " + (text != nullptr ? text : "unknown reason") + "; " + part.needs + ", or " + part.instead;
    return nullptr;
  }
  void* const function = dlsym(library, name);
  if (function == nullptr) why = part.file.string() + " is from another build: it does not offer " + name + "; rebuild or reinstall both";
  return function;
}

}  // namespace capstan
