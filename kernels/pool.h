// defines: Pool: best fit over large regions of memory, with splitting and coalescing. Knows no device: regions come
// from and go to two functions. Not synchronized.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace capstan::kernels {

/// The base of a new region, aligned for every use, or null when there is none of that size.
using TakeRegion = std::function<char*(std::int64_t bytes)>;
using GiveRegion = std::function<void(char* base, std::int64_t bytes)>;

class Pool {
 public:
  /// Sizes given to take() are multiples of `alignment`; regions are multiples of `granule` of at least `region` bytes.
  Pool(TakeRegion take, GiveRegion give, std::int64_t alignment, std::int64_t region, std::int64_t granule)
      : take_region_(std::move(take)), give_region_(std::move(give)), alignment_(alignment), region_(region), granule_(granule) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (const Region& r : regions_)
      if (r.base != nullptr) give_region_(r.base, r.size);
  }

  /// Null when no region holds it and no new one can be had.
  void* take(std::int64_t bytes) {
    auto fit = free_.lower_bound({bytes, nullptr});
    if (fit == free_.end()) {
      if (!grow(bytes)) return nullptr;
      fit = free_.lower_bound({bytes, nullptr});
    }
    auto [size, at] = *fit;
    free_.erase(fit);
    Chunk& chunk = chunks_.at(at);
    chunk.free = false;
    if (size - bytes >= alignment_) {
      char* rest = at + bytes;
      const int region = chunk.region;
      chunk.size = bytes;
      chunks_[rest] = {size - bytes, true, region};
      free_.insert({size - bytes, rest});
    }
    return at;
  }

  void give(void* data) {
    auto it = chunks_.find(static_cast<char*>(data));
    it->second.free = true;
    auto next = std::next(it);
    if (next != chunks_.end() && next->second.free && next->second.region == it->second.region) {
      free_.erase({next->second.size, next->first});
      it->second.size += next->second.size;
      chunks_.erase(next);
    }
    if (it != chunks_.begin()) {
      auto before = std::prev(it);
      if (before->second.free && before->second.region == it->second.region) {
        free_.erase({before->second.size, before->first});
        before->second.size += it->second.size;
        chunks_.erase(it);
        it = before;
      }
    }
    free_.insert({it->second.size, it->first});
  }

  /// Whether `data` is a piece that take() gave out; its size then.
  bool holds(const void* data) const { return chunks_.contains(static_cast<char*>(const_cast<void*>(data))); }
  std::int64_t size_of(const void* data) const { return chunks_.at(static_cast<char*>(const_cast<void*>(data))).size; }

  /// Regions taken so far, those given back included: what trim() counts from.
  std::size_t regions() const { return regions_.size(); }
  /// Gives back the regions from number `first` on of which nothing is in use; returns their bytes.
  std::int64_t trim(std::size_t first = 0) {
    std::int64_t bytes = 0;
    for (std::size_t i = first; i < regions_.size(); ++i) {
      Region& r = regions_[i];
      if (r.base == nullptr) continue;
      const auto it = chunks_.find(r.base);
      if (!it->second.free || it->second.size != r.size) continue;
      free_.erase({r.size, r.base});
      chunks_.erase(it);
      give_region_(r.base, r.size);
      bytes += r.size;
      reserved_ -= r.size;
      r.base = nullptr;
    }
    return bytes;
  }

  std::int64_t reserved() const { return reserved_; }
  /// The largest piece that can be had without a new region.
  std::int64_t largest_free() const { return free_.empty() ? 0 : free_.rbegin()->first; }

 private:
  struct Chunk { std::int64_t size; bool free; int region; };
  struct Region { char* base; std::int64_t size; };

  bool grow(std::int64_t bytes) {
    const auto round_up = [&](std::int64_t n) { return (n + granule_ - 1) / granule_ * granule_; };
    std::int64_t size = round_up(bytes < region_ ? region_ : bytes);
    char* base = take_region_(size);
    if (base == nullptr && size > round_up(bytes)) base = take_region_(size = round_up(bytes));
    if (base == nullptr) return false;
    const int region = static_cast<int>(regions_.size());
    regions_.push_back({base, size});
    chunks_[base] = {size, true, region};
    free_.insert({size, base});
    reserved_ += size;
    return true;
  }

  TakeRegion take_region_;
  GiveRegion give_region_;
  std::int64_t alignment_, region_, granule_, reserved_ = 0;
  std::map<char*, Chunk> chunks_;
  std::set<std::pair<std::int64_t, char*>> free_;
  std::vector<Region> regions_;
};

}  // namespace capstan::kernels
