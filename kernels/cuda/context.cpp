// The context of one GPU: stream, memory pool, staging, library handles, reported faults.
#include <kernels/cuda/context.h>

#include <kernels/cuda/gemm.h>
#include <kernels/pool.h>

#include <algorithm>
#include <vector>

namespace capstan::kernels::cuda {

void check(cudaError_t code, const char* doing) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string("[cuda] ") + doing + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")");
}

void check(cublasStatus_t code, const char* doing) {
  if (code == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string("[cuda] ") + doing + ": cuBLASLt status " + std::to_string(static_cast<int>(code)) + " (" + cublasLtGetStatusName(code) + ")");
}

struct Context::FaultTexts { std::vector<std::string> texts; };

class Pool {
 public:
  Pool()
      : pool([](std::int64_t bytes) -> char* {
               void* base = nullptr;
               if (cudaMalloc(&base, static_cast<std::size_t>(bytes)) == cudaSuccess) return static_cast<char*>(base);
               cudaGetLastError();  // out of memory is an answer, not a fault
               return nullptr;
             },
             [](char* base, std::int64_t) { cudaFree(base); }, 256, std::int64_t{512} << 20, std::int64_t{2} << 20) {}
  kernels::Pool pool;
  std::mutex mutex;
};

Context::Context(int device) : device_(device) {
  check(cudaSetDevice(device), "choosing the GPU");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "reading the GPU's properties");
  multiprocessors_ = properties.multiProcessorCount;
  shared_limit_ = static_cast<int>(properties.sharedMemPerBlockOptin);
  capability_ = properties.major * 10 + properties.minor;
  capacity_ = static_cast<std::int64_t>(properties.totalGlobalMem);
  if (capability_ < 90)
    throw std::runtime_error(std::string("[cuda] the GPU ") + properties.name + " has compute capability " + std::to_string(properties.major) + "." +
                             std::to_string(properties.minor) + ": kernels are compiled for 9.0 (H100, H200) and 10.x (B200)");
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
  check(cudaEventCreateWithFlags(&staging_free_, cudaEventDisableTiming), "making an event");
  check(cudaHostAlloc(&staging_, staging_bytes, cudaHostAllocDefault), "taking pinned memory");
  void* faults = nullptr;
  check(cudaMalloc(&faults, sizeof(Fault)), "taking memory");
  check(cudaMemset(faults, 0, sizeof(Fault)), "clearing memory");
  faults_ = static_cast<Fault*>(faults);
  check(cublasLtCreate(&blas_), "starting cuBLASLt");
  pool_ = std::make_unique<Pool>();
  gemms_ = std::make_unique<GemmCache>();
  fault_texts_ = std::make_unique<FaultTexts>();
}

Context::~Context() {
  cudaSetDevice(device_);
  cudaStreamSynchronize(stream_);
  attention_state.reset();
  gemms_.reset();
  if (blas_ != nullptr) cublasLtDestroy(blas_);
  pool_.reset();
  cudaFree(faults_);
  cudaFreeHost(staging_);
  cudaEventDestroy(staging_free_);
  cudaStreamDestroy(stream_);
}

void Context::bind() const {
  thread_local int bound = -1;
  if (bound == device_) return;
  check(cudaSetDevice(device_), "choosing the GPU");
  bound = device_;
}

void* Context::allocate(std::int64_t bytes) {
  const std::int64_t size = (std::max<std::int64_t>(bytes, 1) + 255) / 256 * 256;
  std::lock_guard lock(pool_->mutex);
  if (void* data = pool_->pool.take(size)) return data;
  // Regions that nobody uses may be of the wrong size: they go back, once the kernels that read them are done.
  if (cudaStreamSynchronize(stream_) != cudaSuccess) return nullptr;
  if (pool_->pool.trim() == 0) return nullptr;
  return pool_->pool.take(size);
}

void Context::release(void* data) noexcept {
  std::lock_guard lock(pool_->mutex);
  pool_->pool.give(data);
}

std::int64_t Context::reserved() const {
  std::lock_guard lock(pool_->mutex);
  return pool_->pool.reserved();
}

void* Context::scratch(std::int64_t bytes) {
  if (bytes <= scratch_bytes_) return scratch_;
  if (scratch_ != nullptr) release(scratch_);
  scratch_ = nullptr, scratch_bytes_ = 0;
  scratch_ = allocate(bytes);
  if (scratch_ == nullptr) throw std::runtime_error("[cuda memory] no room for " + std::to_string(bytes) + " bytes of scratch memory");
  scratch_bytes_ = bytes;
  return scratch_;
}

unsigned long long Context::fault_number(const char* text) {
  auto& texts = fault_texts_->texts;
  const auto it = std::find(texts.begin(), texts.end(), text);
  if (it != texts.end()) return static_cast<unsigned long long>(it - texts.begin()) + 1;
  texts.emplace_back(text);
  return texts.size();
}

void Context::throw_fault() {
  Fault fault{};
  check(cudaMemcpy(&fault, faults_, sizeof fault, cudaMemcpyDeviceToHost), "reading what kernels found");
  if (fault.what == 0) return;
  check(cudaMemset(faults_, 0, sizeof fault), "clearing memory");
  const auto& texts = fault_texts_->texts;
  const std::string what = fault.what <= texts.size() ? texts[fault.what - 1] : "a kernel";
  throw std::runtime_error("[" + what + "] element " + std::to_string(fault.index) + " is " + std::to_string(static_cast<long long>(fault.value)) +
                           ", out of range");
}

}  // namespace capstan::kernels::cuda
