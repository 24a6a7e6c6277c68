// defines: Staging, the memory that a snapshot is copied into.
#pragma once
#include <capstan/checkpoint.h>

#include <cstdint>
#include <span>
#include <vector>

namespace capstan::checkpoint {

/// One buffer, allocated and faulted in once and used for every save: fresh pages would cost several times
/// the copy itself.
class Staging {
 public:
  explicit Staging(int threads);
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  /// Grows the buffer when it is smaller than tensors of these many bytes want. Throws Error(runtime) when the memory is not there.
  void reserve(std::span<const std::int64_t> bytes);
  /// Copies all tensors and points their `data` at the copies.
  void copy(std::vector<SavedTensor>& tensors);

 private:
  void release();
  void grow(std::int64_t bytes);
  int threads_;
  char* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace capstan::checkpoint
