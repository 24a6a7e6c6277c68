// defines: Pool: a fixed piece of device memory that units take turns in.
#pragma once
#include <capstan/export.h>
#include <capstan/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace capstan {

/// Memory of a size known before the run; what it hands out are ranges of it, first fit.
class CAPSTAN_API Pool {
 public:
  /// `memory` null: of the device's own.
  Pool(Device& device, std::int64_t bytes, std::shared_ptr<void> memory = nullptr);
  std::int64_t bytes() const { return memory_.bytes(); }
  /// Offset of `bytes` free bytes; nothing when no gap is as large.
  std::optional<std::int64_t> take(std::int64_t bytes);
  void give(std::int64_t offset);
  void give_all() { taken_.clear(); }
  void* at(std::int64_t offset) const;  ///< null on the meta device

 private:
  struct Range { std::int64_t begin, end; };
  Tensor memory_;
  std::vector<Range> taken_;  // ascending
};

}  // namespace capstan
