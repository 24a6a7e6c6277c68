// defines: note(), Capture, waited(), elapsed(): what streams that record do with the work they are asked for; product_ran(): time,
// as far as products take any.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace capstan::emulated {

/// Runs something that may touch device memory: now, or at each replay of the record that is being made.
void touch_device_memory(const std::function<void()>& work);

/// How much of each stream's work comes before some point.
using Seen = std::map<cudaStream_t, long>;

/// A record under way. It belongs to the thread that began it: ranks are threads. Another stream becomes part of it when it waits
/// for an event of the record, and its work must be waited for, in the end, by the stream of kernels.
struct Capture {
  unsigned long long id = 0;
  std::vector<std::function<void()>> work;
  std::map<cudaStream_t, Seen> streams;  ///< those that are part of it
  bool broken = false;
  cudaStream_t collective = nullptr;  ///< where the last one is, and how much of that stream's work it ends
  long collectives = 0;

  bool has(cudaStream_t s) const { return streams.contains(s); }
  /// One more piece of a stream that is part of it.
  void add(cudaStream_t s, std::function<void()> piece) {
    ++streams[s][s];
    work.push_back(std::move(piece));
  }
  bool joined() const;
};
/// Of this thread; null.
Capture* capture();

/// True when this thread makes a record: `work` belongs to its stream of kernels and has not run.
bool note(std::function<void()> work);
/// What a wait comes to: an error while a record is being made, as CUDA's.
cudaError_t waited();

/// Milliseconds between the last two events asked about. Products take as long as EMULATED_GPU_TIMES says for each algorithm of
/// the emulated cuBLASLt ("3,1,2"), else less for each after the first; 1 when none ran.
float elapsed();
void product_ran(int algorithm);

/// Device memory that was given back: from here on it holds nothing but NaN, in records as well.
void released(void* data, std::size_t bytes);

}  // namespace capstan::emulated
