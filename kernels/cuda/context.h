// defines: Context: what CUDA kernels share: the stream, scratch memory, library handles, the chip's numbers; check()
// for return codes; launch() for kernels; Faults, what kernels found wrong and nobody has waited for yet.
#pragma once
#include <kernels/queue.h>
#include <kernels/types.h>

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace capstan::kernels::cuda {

/// Throws std::runtime_error("[cuda] <doing>: <CUDA's text>").
void check(cudaError_t code, const char* doing);
void check(cublasStatus_t code, const char* doing);

/// What sums of T run in.
template <class T> struct compute_of { using type = float; };
template <> struct compute_of<double> { using type = double; };
template <class T> using Compute = typename compute_of<T>::type;

/// Calls f.operator()<T>() with double, float or bf16.
template <class F>
decltype(auto) visit(Num num, F&& f) {
  switch (num) {
    case Num::f64: return f.template operator()<double>();
    case Num::f32: return f.template operator()<float>();
    case Num::bf16: return f.template operator()<bf16>();
    default: throw std::invalid_argument("[cuda] element type: expected f64, f32 or bf16, got number " + std::to_string(static_cast<int>(num)));
  }
}

class Pool;
struct GemmCache;

/// One GPU: a stream in whose order everything runs, a caching pool of its memory, library handles. Calls come from
/// one thread at a time.
class Context {
 public:
  explicit Context(int device);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cudaStream_t stream() const {
    if (rehearsed_ != nullptr) refuse_in_record("a call that cannot be asked for without running");
    return stream_;
  }
  int device() const { return device_; }
  int multiprocessors() const { return multiprocessors_; }
  /// Most dynamic shared memory of a block, bytes (227 KiB on sm_90).
  int shared_limit() const { return shared_limit_; }
  int capability() const { return capability_; }  ///< 90, 100, ...
  /// Makes this thread use this GPU; cheap.
  void bind() const;

  /// Scratch of at least `bytes`, 256-byte aligned, contents undefined: valid until the next call of scratch() by
  /// anyone; what was launched before may still read the old one (memory comes back in the stream's order).
  void* scratch(std::int64_t bytes);
  /// Memory in the stream's order from the pool; null when there is none. release() may be called while kernels that
  /// use it are still queued.
  void* allocate(std::int64_t bytes);
  void release(void* data) noexcept;
  std::int64_t reserved() const;
  std::int64_t capacity() const { return capacity_; }
  /// Who has the memory and what lowers the need; empty where nobody said.
  std::function<std::string()> memory_words;

  /// Where kernels report what they found wrong: {what, index, value}, what 0 meaning nothing; the first wins.
  struct Fault { unsigned long long what, index, value; };
  Fault* faults() const { return faults_; }
  /// The number under which `text` is reported.
  unsigned long long fault_number(const char* text);
  /// Throws std::runtime_error with what was reported since the last call; the stream must be idle.
  void throw_fault();

  /// Bytes to 0, or from elsewhere on the GPU.
  void clear(void* to, std::int64_t bytes, const char* doing);
  void move(void* to, const void* from, std::int64_t bytes, const char* doing);

  /// While a record is made calls are noted instead of run. Not null then.
  struct Record {
    std::uint64_t step = 0;                       ///< what step numbers are baked in
    const std::uint64_t* step_offset = nullptr;   ///< on the device: what a replay adds to them
  };
  const Record* record() const { return recording_ ? &record_ : nullptr; }
  /// Throws when a record is being made or rehearsed: `what` cannot be in one.
  void refuse_in_record(const char* what) const;
  /// What goes with a record: the numbers that may be others at each replay, and what tells its work from other work.
  struct Noted {
    static constexpr std::int64_t chunk = 16384;
    std::vector<std::byte> numbers;
    std::vector<void*> chunks;  ///< where they lie on the device
    std::uint64_t work = 0;     ///< of all calls in their order, with the numbers that stay
  };
  void begin_record(std::uint64_t step);
  /// The graph of what was asked for since, which whoever calls destroys, and what goes with it: then forget(noted).
  cudaGraph_t end_record(Noted& noted);
  void cancel_record() noexcept;
  void forget(Noted& noted) noexcept;
  /// Until end_rehearsal() nothing runs: step_numbers() go into `noted`. Throws std::runtime_error there, or before, when the
  /// calls are not those of the record.
  void begin_rehearsal(Noted& noted);
  void end_rehearsal();
  void cancel_rehearsal() noexcept;
  /// Brings them to the device, for the replays behind it.
  void bring(const Noted& noted);
  /// Numbers of a kernel that may be others at each step: where it reads them under a record, null where it takes those that
  /// it is given.
  template <class T>
  const T* step_numbers(const T& numbers) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 16 && sizeof(T) <= 256);
    return asked_ == nullptr ? nullptr : static_cast<const T*>(note_numbers(&numbers, sizeof numbers));
  }
  /// Notes a call that `what` tells from others; true when it is to run (or to be recorded).
  bool asks(std::uint64_t what) {
    if (asked_ == nullptr) return true;
    *asked_ = (*asked_ ^ what) * 0x100000001b3u;
    return rehearsed_ == nullptr;
  }
  bool notes() const { return asked_ != nullptr; }
  /// For the replays behind it: step numbers are `difference` more than those recorded.
  void set_step_offset(std::uint64_t difference);
  std::int64_t record_bytes() const;
  /// What optimizers' kernels obey; null: nothing.
  const Gate* gate = nullptr;

  cublasLtHandle_t blas() const { return blas_; }
  GemmCache& gemms() { return *gemms_; }
  /// How attention runs: cuDNN or own kernels, an ordered backward within how much scratch.
  struct AttentionChoice { bool cudnn = true; std::int64_t workspace = std::int64_t{1} << 30; } attention_choice;
  std::shared_ptr<void> attention_state;  ///< cuDNN's handle and plans; goes before the stream
  /// Through pinned memory, in pieces: the caller's memory may go at once, and the GPU does not wait for pages. Those of a
  /// few steps fit beside each other, so that no copy waits for kernels that were queued ahead of it.
  void upload(void* to, const void* host_from, std::int64_t bytes);
  /// Waits.
  void download(void* host_to, const void* from, std::int64_t bytes);

 private:
  int device_, multiprocessors_ = 0, shared_limit_ = 0, capability_ = 0;
  std::int64_t capacity_ = 0;
  cudaStream_t stream_ = nullptr;
  cublasLtHandle_t blas_ = nullptr;
  std::unique_ptr<Pool> pool_;
  std::unique_ptr<GemmCache> gemms_;
  void* scratch_ = nullptr;
  std::int64_t scratch_bytes_ = 0;
  struct Staging;
  void* stage(std::int64_t bytes);
  void staged();
  std::unique_ptr<Staging> staging_;
  Fault* faults_ = nullptr;
  const void* note_numbers(const void* numbers, std::size_t bytes);
  bool recording_ = false;
  Record record_;
  Noted noted_;                     // of the record that is being made
  Noted* rehearsed_ = nullptr;
  std::size_t rehearsed_bytes_ = 0;
  std::uint64_t rehearsed_work_ = 0;
  std::uint64_t* asked_ = nullptr;  // where calls are noted: while a record is made or rehearsed
  std::uint64_t* step_offset_ = nullptr;
  void* record_scratch_ = nullptr;
  std::int64_t record_scratch_bytes_ = 0;
  struct FaultTexts;
  std::unique_ptr<FaultTexts> fault_texts_;
};

/// A launch's grid and block, and its dynamic shared memory: what plans come to.
struct Launch {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1, block = 1, shared = 0;
};

#if defined(__CUDACC__) || defined(CAPSTAN_EMULATED_KERNELS)
/// The numbers among a kernel's arguments as bits; pointers count as nothing, for memory taken inside of a record lies elsewhere
/// in a rehearsal, and of structures those that have numbers of their own say them by bits().
template <class T>
std::uint64_t bits_of_number(const T& value) {
  if constexpr (std::is_floating_point_v<T>) return std::bit_cast<std::uint64_t>(static_cast<double>(value));
  else if constexpr (std::is_integral_v<T>) return static_cast<std::uint64_t>(value);
  else if constexpr (std::is_same_v<T, bf16>) return value.bits;
  else if constexpr (requires { value.bits(); }) return value.bits();
  else return 0;
}

/// Launches `kernel` in the context's stream; nothing when the grid is empty. Dynamic shared memory above 48 KiB is
/// asked for.
template <class... Parameters, class... Arguments>
void launch(Context& context, const Launch& l, const char* name, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (l.grid_x == 0 || l.grid_y == 0 || l.grid_z == 0) return;
  if (context.notes()) {
    std::uint64_t what = reinterpret_cast<std::uintptr_t>(kernel) ^ l.grid_x ^ std::uint64_t{l.grid_y} << 32 ^ std::uint64_t{l.grid_z} << 48;
    ((what = what * 31 + bits_of_number(arguments)), ...);
    if (!context.asks(what)) return;
  }
#if defined(CAPSTAN_EMULATED_KERNELS)
  static_cast<void>(context), static_cast<void>(name);
  emulated::launch(reinterpret_cast<const void*>(kernel), dim3(l.grid_x, l.grid_y, l.grid_z), dim3(l.block), [=] { kernel(arguments...); });
#else
  if (l.shared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared)), name);
  kernel<<<dim3(l.grid_x, l.grid_y, l.grid_z), dim3(l.block), l.shared, context.stream()>>>(std::forward<Arguments>(arguments)...);
  check(cudaGetLastError(), name);
#endif
}
#endif

}  // namespace capstan::kernels::cuda
