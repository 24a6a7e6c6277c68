// defines: note(), waited(), elapsed(): what a stream that records does with the work it is asked for; product_ran(): time, as
// far as products take any.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>

namespace capstan::emulated {

/// Runs something that may touch device memory: now, or at each replay of the record that is being made.
void touch_device_memory(const std::function<void()>& work);

/// True when a record is being made: `work` belongs to it and has not run.
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
