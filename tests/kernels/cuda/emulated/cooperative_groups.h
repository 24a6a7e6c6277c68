// In place of CUDA's header: clusters of one block.
#pragma once
#include <emulated.h>

namespace cooperative_groups {
struct cluster_group {
  unsigned num_blocks() const { return 1; }
  unsigned block_rank() const { return 0; }
  void sync() const { __syncthreads(); }
  void barrier_arrive() const {}
  void barrier_wait() const {}
  template <class T> T* map_shared_rank(T* p, int) const { return p; }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups
