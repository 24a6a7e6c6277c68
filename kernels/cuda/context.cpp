// The context of one GPU: stream, memory pool, staging, library handles, reported faults.
#include <kernels/cuda/context.h>

#include <kernels/cuda/gemm.h>
#include <kernels/pool.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#if defined(CAPSTAN_EMULATED_GPU)
namespace capstan::emulated {
void released(void* data, std::size_t bytes);  // spoils it: what is read afterwards is seen to be wrong
}
#endif

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

namespace {

char* take_region(std::int64_t bytes) {
  void* base = nullptr;
  if (cudaMalloc(&base, static_cast<std::size_t>(bytes)) == cudaSuccess) return static_cast<char*>(base);
  cudaGetLastError();  // out of memory is an answer, not a fault
  return nullptr;
}
void give_region(char* base, std::int64_t) { cudaFree(base); }

std::int64_t whole_lines(std::int64_t bytes) { return (std::max<std::int64_t>(bytes, 1) + 255) / 256 * 256; }

void spoil([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#if defined(CAPSTAN_EMULATED_GPU)
  emulated::released(data, static_cast<std::size_t>(bytes));
#endif
}

}  // namespace

class Pool {
 public:
  Pool()
      : pool(take_region, give_region, 256, std::int64_t{512} << 20, std::int64_t{2} << 20),
        records(take_region, give_region, 256, std::int64_t{64} << 20, std::int64_t{2} << 20) {}
  kernels::Pool pool;
  kernels::Pool records;         // what recorded work takes: nothing else ever lives there
  std::vector<void*> foreign;    // given back inside of a record, though taken before
  std::int64_t held = 0;         // pieces of `records` in use
  std::int64_t records_alive = 0;  // replays touch all that they were made with: nothing of `records` goes back meanwhile
  std::size_t regions_before = 0;  // of `records`, ahead of the record that is being made
  std::vector<void*> scratches;    // of records, each larger than those before it
  std::size_t scratches_before = 0;
  std::thread::id recorder;      // other threads' memory is not the record's
  bool recording = false;
  std::mutex mutex;
  bool is_recorder() const { return recording && std::this_thread::get_id() == recorder; }
};

/// A ring of pinned memory; each piece is free again when the copy that reads it is done.
struct Context::Staging {
  static constexpr std::int64_t bytes = std::int64_t{8} << 20, most = bytes / 4;  // of one copy
  std::mutex mutex;
  struct Piece { std::int64_t begin, end; cudaEvent_t done; };
  char* base = nullptr;
  std::int64_t at = 0;
  std::deque<Piece> pieces;        // oldest first
  std::vector<cudaEvent_t> spare;
  Piece next{};
};

Context::Context(int device) : device_(device) {
  check(cudaSetDevice(device), "choosing the GPU");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "reading the GPU's properties");
  multiprocessors_ = properties.multiProcessorCount;
  shared_limit_ = static_cast<int>(properties.sharedMemPerBlockOptin);
  capability_ = properties.major * 10 + properties.minor;
  capacity_ = static_cast<std::int64_t>(properties.totalGlobalMem);
  if (capability_ != 90 && capability_ / 10 != 10)  // code for sm_90a runs on nothing else, that for sm_100f on its family
    throw std::runtime_error(std::string("[cuda] the GPU ") + properties.name + " has compute capability " + std::to_string(properties.major) + "." +
                             std::to_string(properties.minor) + ": kernels are compiled for 9.0 (H100, H200) and 10.x (B200)");
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
  staging_ = std::make_unique<Staging>();
  void* staging = nullptr;
  check(cudaHostAlloc(&staging, Staging::bytes, cudaHostAllocDefault), "taking pinned memory");
  staging_->base = static_cast<char*>(staging);
  void* cells = nullptr;  // the faults, then the step's offset
  check(cudaMalloc(&cells, sizeof(Fault) + sizeof(std::uint64_t)), "taking memory");
  // In the stream: a call without one would not be ordered ahead of the kernels that write there.
  check(cudaMemsetAsync(cells, 0, sizeof(Fault) + sizeof(std::uint64_t), stream_), "clearing memory");
  faults_ = static_cast<Fault*>(cells);
  step_offset_ = reinterpret_cast<std::uint64_t*>(static_cast<char*>(cells) + sizeof(Fault));
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
  for (const Staging::Piece& p : staging_->pieces) cudaEventDestroy(p.done);
  for (cudaEvent_t event : staging_->spare) cudaEventDestroy(event);
  cudaFreeHost(staging_->base);
  cudaStreamDestroy(stream_);
}

void Context::bind() const {
  // Asked anew each time: others (communicators, another context's end) choose GPUs for this thread too.
  int now = -1;
  check(cudaGetDevice(&now), "asking which GPU this thread uses");
  if (now != device_) check(cudaSetDevice(device_), "choosing the GPU");
}

namespace {

/// When no record is left, nor one being made, their memory goes back to the driver, scratch too; true then.
bool give_records_back(Pool& pool) {
  if (pool.recording || pool.records_alive > 0 || pool.held > 0) return false;
  for (void* scratch : pool.scratches) pool.records.give(scratch);
  pool.scratches.clear();
  pool.records.trim();
  return true;
}

}  // namespace

void* Context::allocate(std::int64_t bytes) {
  const std::int64_t size = whole_lines(bytes);
  std::lock_guard lock(pool_->mutex);
  if (pool_->is_recorder()) {
    void* data = pool_->records.take(size);
    if (data != nullptr) ++pool_->held;
    return data;
  }
  if (void* data = pool_->pool.take(size)) return data;
  if (pool_->recording) return nullptr;  // waiting would break the record
  // Regions that nobody uses may be of the wrong size: they go back, once the kernels that read them are done.
  if (cudaStreamSynchronize(stream_) != cudaSuccess) return nullptr;
  if (pool_->pool.trim() == 0) return nullptr;
  return pool_->pool.take(size);
}

void Context::release(void* data) noexcept {
  std::lock_guard lock(pool_->mutex);
  if (pool_->records.holds(data)) {
    spoil(data, pool_->records.size_of(data));
    pool_->records.give(data);
    if (--pool_->held == 0 && give_records_back(*pool_)) record_scratch_ = nullptr, record_scratch_bytes_ = 0;
  } else if (pool_->is_recorder()) {
    pool_->foreign.push_back(data);
  } else {
    spoil(data, pool_->pool.size_of(data));
    pool_->pool.give(data);
  }
}

std::int64_t Context::reserved() const {
  std::lock_guard lock(pool_->mutex);
  return pool_->pool.reserved() + pool_->records.reserved();
}

std::int64_t Context::record_bytes() const {
  std::lock_guard lock(pool_->mutex);
  return pool_->records.reserved();
}

/// Pinned memory for a copy that is queued next; then staged().
void* Context::stage(std::int64_t bytes) {
  Staging& s = *staging_;
  const std::int64_t size = whole_lines(bytes);
  if (s.at + size > Staging::bytes) s.at = 0;
  const auto in_the_way = [&](const Staging::Piece& p) { return p.begin < s.at + size && s.at < p.end; };
  while (std::any_of(s.pieces.begin(), s.pieces.end(), in_the_way)) {
    check(cudaEventSynchronize(s.pieces.front().done), "waiting for staging memory");
    s.spare.push_back(s.pieces.front().done);
    s.pieces.pop_front();
  }
  s.next = {s.at, s.at + size, nullptr};
  s.at += size;
  return s.base + s.next.begin;
}

void Context::staged() {
  Staging& s = *staging_;
  if (s.spare.empty()) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    s.spare.push_back(event);
  }
  s.next.done = s.spare.back();
  s.spare.pop_back();
  s.pieces.push_back(s.next);
  check(cudaEventRecord(s.next.done, stream_), "marking staging memory");
}

void Context::upload(void* to, const void* host_from, std::int64_t bytes) {
  refuse_in_record("a copy of host values to the GPU");
  std::lock_guard lock(staging_->mutex);
  for (std::int64_t at = 0; at < bytes; at += Staging::most) {
    const std::int64_t n = std::min(Staging::most, bytes - at);
    void* from = stage(n);
    std::memcpy(from, static_cast<const char*>(host_from) + at, static_cast<std::size_t>(n));
    check(cudaMemcpyAsync(static_cast<char*>(to) + at, from, static_cast<std::size_t>(n), cudaMemcpyHostToDevice, stream_), "copying to the GPU");
    staged();
  }
}

void Context::download(void* host_to, const void* from, std::int64_t bytes) {
  refuse_in_record("a copy to the host");
  std::lock_guard lock(staging_->mutex);
  for (std::int64_t at = 0; at < bytes; at += Staging::most) {
    const std::int64_t n = std::min(Staging::most, bytes - at);
    void* to = stage(n);
    check(cudaMemcpyAsync(to, static_cast<const char*>(from) + at, static_cast<std::size_t>(n), cudaMemcpyDeviceToHost, stream_), "copying from the GPU");
    staged();
    check(cudaStreamSynchronize(stream_), "waiting for the GPU");
    std::memcpy(static_cast<char*>(host_to) + at, to, static_cast<std::size_t>(n));
  }
}

namespace {

/// Not with the pool's lock held: the words ask what it has.
[[noreturn]] void no_room(std::int64_t bytes, const char* what, const std::function<std::string()>& words) {
  std::string said = "[cuda memory] cannot allocate " + std::to_string(bytes) + " bytes of " + what;
  try {
    if (words) said += ": " + words();
  } catch (const std::exception&) {  // CUDA answers no questions: this error is the one that matters
  }
  throw std::runtime_error(said);
}

}  // namespace

void* Context::scratch(std::int64_t bytes) {
  if (recording_ || rehearsed_ != nullptr) {
    // Its address is in the records: an older, smaller one stays where it is.
    if (bytes <= record_scratch_bytes_) return record_scratch_;
    const std::int64_t size = whole_lines(std::max(bytes, scratch_bytes_));
    void* larger = nullptr;
    {
      std::lock_guard lock(pool_->mutex);
      larger = pool_->records.take(size);
      if (larger != nullptr) pool_->scratches.push_back(larger);
    }
    if (larger == nullptr) no_room(size, "scratch memory", memory_words);
    record_scratch_ = larger, record_scratch_bytes_ = size;
    return record_scratch_;
  }
  if (bytes <= scratch_bytes_) return scratch_;
  if (scratch_ != nullptr) release(scratch_);
  scratch_ = nullptr, scratch_bytes_ = 0;
  scratch_ = allocate(bytes);
  if (scratch_ == nullptr) no_room(bytes, "scratch memory", memory_words);
  scratch_bytes_ = bytes;
  return scratch_;
}

void Context::refuse_in_record(const char* what) const {
  if (asked_ != nullptr)
    throw std::runtime_error(std::string("[cuda graphs] ") + what +
                             " cannot be part of a recorded step: expected work on device memory alone; set run.cuda_graphs: off, or move it out of forward()");
}

void Context::begin_record(std::uint64_t step) {
  refuse_in_record("a second record");
  // Relaxed: records may take memory, and other threads go on as they please.
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "beginning a record");
  recording_ = true, record_ = {step, step_offset_};
  noted_ = {}, asked_ = &noted_.work;
  std::lock_guard lock(pool_->mutex);
  pool_->recording = true, pool_->recorder = std::this_thread::get_id();
  pool_->regions_before = pool_->records.regions(), pool_->scratches_before = pool_->scratches.size();
}

namespace {
/// Memory given back inside goes back now.
void stop_recording(Pool& pool, std::int64_t& held, std::size_t& foreign) {
  std::lock_guard lock(pool.mutex);
  pool.recording = false;
  held = pool.held, foreign = pool.foreign.size();
  for (void* data : pool.foreign) pool.pool.give(data);
  pool.foreign.clear();
}

void give_chunks(Pool& pool, Context::Noted& noted) {
  for (void* chunk : noted.chunks) pool.records.give(chunk);
  noted = {};
}

/// What a record took that came to nothing goes back: all regions of its own, those of other records not.
void drop_record(Pool& pool, Context::Noted& noted, void*& scratch, std::int64_t& scratch_bytes) {
  std::lock_guard lock(pool.mutex);
  give_chunks(pool, noted);
  for (; pool.scratches.size() > pool.scratches_before; pool.scratches.pop_back()) pool.records.give(pool.scratches.back());
  if (!give_records_back(pool)) pool.records.trim(pool.regions_before);
  scratch = pool.scratches.empty() ? nullptr : pool.scratches.back();
  scratch_bytes = scratch == nullptr ? 0 : pool.records.size_of(scratch);
}
}  // namespace

cudaGraph_t Context::end_record(Noted& noted) {
  cudaGraph_t graph = nullptr;
  const cudaError_t code = cudaStreamEndCapture(stream_, &graph);
  recording_ = false, asked_ = nullptr;
  std::int64_t held = 0;
  std::size_t foreign = 0;
  stop_recording(*pool_, held, foreign);
  std::string wrong;
  if (code == cudaSuccess && held > 0)
    wrong = std::to_string(held) + " pieces of memory that were taken inside of the recorded step outlive it";
  if (code == cudaSuccess && foreign > 0)
    wrong += (wrong.empty() ? "" : ", and ") + std::to_string(foreign) + " pieces of memory that were taken before the recorded step were given back inside of it: a replay would touch what others hold by then";
  if (code == cudaSuccess && wrong.empty()) {
    noted = std::exchange(noted_, {});
    ++pool_->records_alive;
    return graph;
  }
  if (graph != nullptr) cudaGraphDestroy(graph);
  drop_record(*pool_, noted_, record_scratch_, record_scratch_bytes_);
  if (wrong.empty()) check(code, "ending a record");
  throw std::runtime_error("[cuda graphs] " + wrong + "; set run.cuda_graphs: off, or keep such tensors out of forward()");
}

void Context::cancel_record() noexcept {
  if (!recording_) return;
  cudaGraph_t graph = nullptr;
  if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess && graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();  // what broke the record is on its way to the caller already
  recording_ = false, asked_ = nullptr;
  std::int64_t held = 0;
  std::size_t foreign = 0;
  stop_recording(*pool_, held, foreign);
  drop_record(*pool_, noted_, record_scratch_, record_scratch_bytes_);
}

void Context::forget(Noted& noted) noexcept {
  std::lock_guard lock(pool_->mutex);
  give_chunks(*pool_, noted);
  --pool_->records_alive;
  if (give_records_back(*pool_)) record_scratch_ = nullptr, record_scratch_bytes_ = 0;
}

const void* Context::note_numbers(const void* numbers, std::size_t bytes) {
  Noted& noted = rehearsed_ != nullptr ? *rehearsed_ : noted_;
  const auto chunk = static_cast<std::size_t>(Noted::chunk);
  std::size_t at = ((rehearsed_ != nullptr ? rehearsed_bytes_ : noted.numbers.size()) + 15) / 16 * 16;
  if (at % chunk + bytes > chunk) at = (at / chunk + 1) * chunk;  // none lies across two
  if (rehearsed_ != nullptr) {
    if (at + bytes > noted.numbers.size()) throw std::runtime_error("[cuda graphs] the work is not the recorded one: it has more updates");
    rehearsed_bytes_ = at + bytes;
  } else {
    noted.numbers.resize(at + bytes);
    while (noted.chunks.size() * chunk < noted.numbers.size()) {
      void* more = nullptr;
      {
        std::lock_guard lock(pool_->mutex);
        more = pool_->records.take(Noted::chunk);
      }
      if (more == nullptr) no_room(Noted::chunk, "a record's numbers", memory_words);
      noted.chunks.push_back(more);
    }
  }
  std::memcpy(noted.numbers.data() + at, numbers, bytes);
  return static_cast<const std::byte*>(noted.chunks[at / chunk]) + at % chunk;
}

void Context::begin_rehearsal(Noted& noted) {
  refuse_in_record("a rehearsal");
  rehearsed_ = &noted, rehearsed_bytes_ = 0, rehearsed_work_ = 0, asked_ = &rehearsed_work_;
  std::lock_guard lock(pool_->mutex);
  pool_->recording = true, pool_->recorder = std::this_thread::get_id();
}

void Context::end_rehearsal() {
  const Noted& noted = *rehearsed_;
  const bool same = rehearsed_bytes_ == noted.numbers.size() && rehearsed_work_ == noted.work;
  cancel_rehearsal();
  if (!same)
    throw std::runtime_error("[cuda graphs] the work is not the recorded one: other calls, or a number that is another at each step and does not reach "
                             "the GPU through adamw(), sgd(), momentum() or axpby() of capstan/update.h; set run.cuda_graphs: off");
}

void Context::cancel_rehearsal() noexcept {
  if (rehearsed_ == nullptr) return;
  rehearsed_ = nullptr, asked_ = nullptr;
  std::int64_t held = 0;
  std::size_t foreign = 0;
  stop_recording(*pool_, held, foreign);
}

void Context::bring(const Noted& noted) {
  for (std::size_t i = 0; i < noted.chunks.size(); ++i) {
    const std::size_t begin = i * static_cast<std::size_t>(Noted::chunk), end = std::min(noted.numbers.size(), begin + static_cast<std::size_t>(Noted::chunk));
    if (begin < end) upload(noted.chunks[i], noted.numbers.data() + begin, static_cast<std::int64_t>(end - begin));
  }
}

void Context::clear(void* to, std::int64_t bytes, const char* doing) {
  if (bytes > 0 && asks(static_cast<std::uint64_t>(bytes))) check(cudaMemsetAsync(to, 0, static_cast<std::size_t>(bytes), stream_), doing);
}

void Context::move(void* to, const void* from, std::int64_t bytes, const char* doing) {
  if (bytes > 0 && asks(static_cast<std::uint64_t>(bytes))) check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice, stream_), doing);
}

void Context::set_step_offset(std::uint64_t difference) { upload(step_offset_, &difference, sizeof difference); }

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
  check(cudaMemsetAsync(faults_, 0, sizeof fault, stream_), "clearing memory");
  const auto& texts = fault_texts_->texts;
  const std::string what = fault.what <= texts.size() ? texts[fault.what - 1] : "a kernel";
  throw std::runtime_error("[" + what + "] element " + std::to_string(fault.index) + " is " + std::to_string(static_cast<long long>(fault.value)) +
                           ", out of range");
}

}  // namespace capstan::kernels::cuda
