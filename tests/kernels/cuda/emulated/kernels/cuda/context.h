// In place of the real context: one of a GPU that is not there, with three multiprocessors.
#pragma once
#include <emulated.h>
#include <kernels/types.h>

#include <string>

namespace capstan::kernels::cuda {

inline void check(cudaError_t code, const char* doing) {
  if (code != cudaSuccess) throw std::runtime_error(doing);
}

template <class T> struct compute_of { using type = float; };
template <> struct compute_of<double> { using type = double; };
template <class T> using Compute = typename compute_of<T>::type;

template <class F>
decltype(auto) visit(Num num, F&& f) {
  switch (num) {
    case Num::f64: return f.template operator()<double>();
    case Num::f32: return f.template operator()<float>();
    case Num::bf16: return f.template operator()<bf16>();
    default: throw std::invalid_argument("element type");
  }
}

class Context {
 public:
  cudaStream_t stream() const { return nullptr; }
  void clear(void* to, std::int64_t bytes, const char*) { std::memset(to, 0, static_cast<std::size_t>(bytes)); }
  int multiprocessors() const { return 3; }
  int shared_limit() const { return 232448; }
  int capability() const { return 90; }
  void* scratch(std::int64_t bytes) {
    room_.resize(static_cast<std::size_t>(bytes) / 256 + 2);
    std::memset(static_cast<void*>(room_.data()), 0xff, room_.size() * 256);
    return room_.data();
  }
  struct Fault { unsigned long long what, index, value; };
  struct AttentionChoice { bool cudnn = false; std::int64_t workspace = 0; } attention_choice;
  std::shared_ptr<void> attention_state;
  Fault* faults() { return &fault_; }
  unsigned long long fault_number(const char*) { return 7; }

 private:
  struct alignas(256) Piece { unsigned char bytes[256]; };
  std::vector<Piece> room_;
  Fault fault_{};
};

struct Launch { unsigned grid_x = 1, grid_y = 1, grid_z = 1, block = 1, shared = 0; };

/// All blocks, one after another.
template <class... Parameters, class... Arguments>
void launch_block(Context&, const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::int64_t shared, Arguments... arguments) {
  emulated::run(grid, block, shared, [&] { kernel(arguments...); });
}
template <class... Parameters, class... Arguments>
void launch(Context& ctx, const Launch& l, const char* name, void (*kernel)(Parameters...), Arguments... arguments) {
  if (l.grid_x == 0 || l.grid_y == 0 || l.grid_z == 0) return;
  launch_block(ctx, name, kernel, dim3(l.grid_x, l.grid_y, l.grid_z), dim3(l.block), l.shared, arguments...);
}
template <class... Parameters, class... Arguments>
void launch_clusters(Context& ctx, const char* name, void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, std::int64_t shared, Arguments... arguments) {
  if (cluster != 1) throw std::runtime_error("emulated launch: clusters of several blocks are not emulated");
  launch_block(ctx, name, kernel, grid, block, shared, arguments...);
}
inline unsigned char* dynamic_shared() { return emulated::shared(); }

}  // namespace capstan::kernels::cuda
