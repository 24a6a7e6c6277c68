// RMSNorm and LayerNorm: a row is read once and stays in registers while the next one is already on its way. The
// backwards' blocks each take every n-th group of rows and keep their sums for the weights in registers: no atomics,
// one order for a shape.
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/rows.h>

namespace capstan::kernels::cuda {

namespace {

/// Blocks of norm_kernel that a multiprocessor's registers hold.
constexpr int norm_blocks_at_once(bool added, int packs) { return added && packs > 2 ? 1 : 2; }

/// Added: the row is x + residual, which is left in `total`.
template <class T, bool Centre, bool Added, int Width, int Packs>
__global__ void __launch_bounds__(row_threads, norm_blocks_at_once(Added, Packs))
    norm_kernel(std::int64_t rows, int cols, Compute<T> per, const T* __restrict__ x, const T* __restrict__ residual, T* total, const Compute<T>* __restrict__ w,
                const Compute<T>* __restrict__ b, Compute<T> epsilon, T* __restrict__ y, Compute<T>* __restrict__ mean_out, Compute<T>* __restrict__ inverse_out) {
  using C = Compute<T>;
  using V = std::conditional_t<Centre, Moments<C>, Sums<C, 1>>;
  __shared__ V room[64];
  RowReducer<V> reduce{room};
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  std::int64_t base = static_cast<std::int64_t>(blockIdx.x) * blockDim.y;
  constexpr bool ahead = Packs < 4;  // with more, registers end
  Row<T, Width, Packs> r, other, next, next_other;
  const auto load = [&](std::int64_t row, auto& to, auto& to_other) {
    to.load(x + row * cols, row < rows, cols);
    if constexpr (Added) to_other.load(residual + row * cols, row < rows, cols);
  };
  if constexpr (ahead) load(base + threadIdx.y, r, other);
  for (; base < rows; base += stride) {
    const std::int64_t row = base + threadIdx.y;
    if constexpr (ahead) load(row + stride, next, next_other);
    else load(row, r, other);
    if constexpr (Added) r.add(other, total + row * cols, cols);
    C mean = 0, inverse;
    if constexpr (Centre) {
      Moments<C> m{};
      r.sweep(cols, [&](int, int, const Pack<T, Width>& v) {  // a pack's own moments, then joined
        C sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < Width; ++i) sum += widen(v.v[i]);
        sum *= C(1) / C(Width);
#pragma unroll
        for (int i = 0; i < Width; ++i) squares += (widen(v.v[i]) - sum) * (widen(v.v[i]) - sum);
        m.join({C(Width), sum, squares});
      });
      m = reduce(m);
      mean = m.mean, inverse = inverse_root(m.squares * per + epsilon);
    } else {
      C squares = 0;
      r.sweep(cols, [&](int, int, const Pack<T, Width>& v) {
#pragma unroll
        for (int i = 0; i < Width; ++i) squares += widen(v.v[i]) * widen(v.v[i]);
      });
      inverse = inverse_root(reduce({{squares}}).v[0] * per + epsilon);
    }
    if (r.live && threadIdx.x == 0) {
      inverse_out[row] = inverse;
      if constexpr (Centre) mean_out[row] = mean;
    }
    r.sweep(cols, [&](int, int c, const Pack<T, Width>& v) {
      C scale[Width], out[Width];
      load_wide<C, Width>(w + c, scale);
#pragma unroll
      for (int i = 0; i < Width; ++i) out[i] = (widen(v.v[i]) - mean) * inverse * scale[i];
      if constexpr (Centre) {
        if (b != nullptr) {
          load_wide<C, Width>(b + c, scale);
#pragma unroll
          for (int i = 0; i < Width; ++i) out[i] += scale[i];
        }
      }
      store_pack<T, Width>(y + row * cols + c, out);
    });
    if constexpr (ahead) {
      r = next;
      if constexpr (Added) other = next_other;
    }
  }
}

/// Rows are taken by group: blockDim.y rows at once, group after group gridDim.x apart. Added: dx takes in g_sum.
template <class T, bool Centre, bool Added, int Width, int Packs>
__global__ void __launch_bounds__(row_threads, 1) norm_backward_kernel(std::int64_t rows, int cols, Compute<T> per, const T* __restrict__ x,
                                                                       const Compute<T>* __restrict__ w, const Compute<T>* __restrict__ means,
                                                                       const Compute<T>* __restrict__ inverses, const T* __restrict__ g, const T* __restrict__ g_sum, T* __restrict__ dx,
                                                                       Compute<T>* __restrict__ partial_w, Compute<T>* __restrict__ partial_b) {
  using C = Compute<T>;
  using V = Sums<C, Centre ? 2 : 1>;
  constexpr bool ahead = Packs <= 2, more_ahead = ahead && !(Centre && sizeof(T) == 2 && Packs == 2);  // with more, registers end
  unsigned char* shared = dynamic_shared();
  __shared__ V room[64];
  RowReducer<V> reduce{room};
  const int step = static_cast<int>(blockDim.x) * Width, first = static_cast<int>(threadIdx.x) * Width;
  C dw[Packs][Width] = {};
  C db[Centre ? Packs : 1][Centre ? Width : 1] = {};
  const std::int64_t groups = (rows + blockDim.y - 1) / blockDim.y;
  Row<T, Width, Packs> xs, gs, more, next_x, next_g, next_more;
  C inverse = 0, mean = 0;
  const auto load = [&](std::int64_t row, auto& to_x, auto& to_g, auto& to_more, C& to_inverse, C& to_mean) {
    const bool live = row < rows;
    to_x.load(x + row * cols, live, cols), to_g.load(g + row * cols, live, cols);
    if constexpr (Added && more_ahead) to_more.load(g_sum + row * cols, live, cols);
    to_inverse = live ? inverses[row] : C(0);
    if constexpr (Centre) to_mean = live ? means[row] : C(0);
  };
  if constexpr (ahead) load(static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, xs, gs, more, inverse, mean);
  for (std::int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const std::int64_t row = group * blockDim.y + threadIdx.y;
    C next_inverse = 0, next_mean = 0;
    if constexpr (ahead) load(row + static_cast<std::int64_t>(gridDim.x) * blockDim.y, next_x, next_g, next_more, next_inverse, next_mean);
    else load(row, xs, gs, more, inverse, mean);
    V sums{};
    xs.sweep(cols, [&](int p, int c, const Pack<T, Width>& v) {
      C scale[Width];
      load_wide<C, Width>(w + c, scale);
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const C unit = (widen(v.v[i]) - mean) * inverse, grad = widen(gs.raw[p].v[i]);
        dw[p][i] += grad * unit;
        sums.v[0] += grad * scale[i] * unit;
        if constexpr (Centre) db[p][i] += grad, sums.v[1] += grad * scale[i];
      }
    });
    if (dx != nullptr) {
      sums = reduce(sums);
      const C dot = sums.v[0] * per;
      C total = 0;
      if constexpr (Centre) total = sums.v[1] * per;
      xs.sweep(cols, [&](int p, int c, const Pack<T, Width>& v) {
        C scale[Width], out[Width];
        load_wide<C, Width>(w + c, scale);
#pragma unroll
        for (int i = 0; i < Width; ++i)
          out[i] = inverse * (widen(gs.raw[p].v[i]) * scale[i] - (widen(v.v[i]) - mean) * inverse * dot - total);
        if constexpr (Added) {
          const Pack<T, Width> rest = more_ahead ? more.raw[p] : load_pack<T, Width>(g_sum + row * cols + c);
#pragma unroll
          for (int i = 0; i < Width; ++i) out[i] += widen(rest.v[i]);
        }
        store_pack<T, Width>(dx + row * cols + c, out);
      });
    }
    if constexpr (ahead) {
      xs = next_x, gs = next_g, inverse = next_inverse, mean = next_mean;
      if constexpr (Added) more = next_more;
    }
  }
  // The block's rows of threads add up in order, through shared memory.
  const auto leave = [&](auto& sums, C* partial) {
    if (partial == nullptr) return;
    C* to = partial + static_cast<std::int64_t>(blockIdx.x) * cols;
    C* pool = reinterpret_cast<C*>(shared);  // [blockDim.y, cols]; empty when blockDim.y is 1
    if (blockDim.y == 1) {
#pragma unroll
      for (int p = 0; p < Packs; ++p)
        if (first + p * step < cols)
#pragma unroll
          for (int i = 0; i < Width; ++i) to[first + p * step + i] = sums[p][i];
      return;
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < Packs; ++p)
      if (first + p * step < cols)
#pragma unroll
        for (int i = 0; i < Width; ++i) pool[static_cast<int>(threadIdx.y) * cols + first + p * step + i] = sums[p][i];
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); c < cols; c += static_cast<int>(blockDim.x * blockDim.y)) {
      C s = 0;
      for (int r = 0; r < static_cast<int>(blockDim.y); ++r) s += pool[r * cols + c];
      to[c] = s;
    }
  };
  leave(dw, partial_w);
  if constexpr (Centre) leave(db, partial_b);
}

/// Rows too long for registers: x and g are read twice (the second time mostly from the cache), and the sums for the
/// weights stay in shared memory, or where it ends in place.
template <class T, bool Centre, bool Added, int Width>
__global__ void __launch_bounds__(row_threads, 1) norm_backward_long_kernel(std::int64_t rows, int cols, Compute<T> per, const T* __restrict__ x,
                                                                            const Compute<T>* __restrict__ w, const Compute<T>* __restrict__ means,
                                                                            const Compute<T>* __restrict__ inverses, const T* __restrict__ g, const T* __restrict__ g_sum, T* __restrict__ dx,
                                                                            Compute<T>* __restrict__ partial_w, Compute<T>* __restrict__ partial_b, bool in_shared) {
  using C = Compute<T>;
  using V = Sums<C, Centre ? 2 : 1>;
  __shared__ V room[64];
  RowReducer<V> reduce{room};
  const int step = static_cast<int>(blockDim.x) * Width, first = static_cast<int>(threadIdx.x) * Width;
  unsigned char* shared = dynamic_shared();
  C* const leave_w = partial_w == nullptr ? nullptr : partial_w + static_cast<std::int64_t>(blockIdx.x) * cols;
  C* const leave_b = !Centre || partial_b == nullptr ? nullptr : partial_b + static_cast<std::int64_t>(blockIdx.x) * cols;
  C* to_w = leave_w;
  C* to_b = leave_b;
  if (in_shared) {
    if (to_w != nullptr) to_w = reinterpret_cast<C*>(shared);
    if (to_b != nullptr) to_b = reinterpret_cast<C*>(shared) + cols;
  }
  bool fresh = true;
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x, fresh = false) {
    const C inverse = inverses[row];
    C mean = 0;
    if constexpr (Centre) mean = means[row];
    V sums{};
    for (int c = first; c < cols; c += step) {
      const Pack<T, Width> xs = load_pack<T, Width>(x + row * cols + c), gs = load_pack<T, Width>(g + row * cols + c);
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const C unit = (widen(xs.v[i]) - mean) * inverse, grad = widen(gs.v[i]);
        sums.v[0] += grad * w[c + i] * unit;
        if constexpr (Centre) sums.v[1] += grad * w[c + i];
        if (to_w != nullptr) to_w[c + i] = (fresh ? C(0) : to_w[c + i]) + grad * unit;
        if (to_b != nullptr) to_b[c + i] = (fresh ? C(0) : to_b[c + i]) + grad;
      }
    }
    if (dx == nullptr) continue;
    sums = reduce(sums);
    const C dot = sums.v[0] * per;
    C total = 0;
    if constexpr (Centre) total = sums.v[1] * per;
    for (int c = first; c < cols; c += step) {
      const Pack<T, Width> xs = load_pack<T, Width>(x + row * cols + c), gs = load_pack<T, Width>(g + row * cols + c);
      C out[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i)
        out[i] = inverse * (widen(gs.v[i]) * w[c + i] - (widen(xs.v[i]) - mean) * inverse * dot - total);
      if constexpr (Added) {
        const Pack<T, Width> more = load_pack<T, Width>(g_sum + row * cols + c);
#pragma unroll
        for (int i = 0; i < Width; ++i) out[i] += widen(more.v[i]);
      }
      store_pack<T, Width>(dx + row * cols + c, out);
    }
  }
  if (!in_shared) return;
  for (int c = first; c < cols; c += step)  // each thread's own columns
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      if (leave_w != nullptr) leave_w[c + i] = to_w[c + i];
      if (leave_b != nullptr) leave_b[c + i] = to_b[c + i];
    }
}

template <class T, bool Centre, bool Added>
void launch_norm(Context& ctx, const NormRows& n) {
  using C = Compute<T>;
  const bool vector = all_on_16(n.x, n.residual, n.sum, n.w, n.b, n.y);
  RowPlan plan = rows_for<T>(n.cols, vector, 3);
  if (plan.packs == 0) plan = rows_for<T>(n.cols, vector, 4);
  const dim3 blocks(static_cast<unsigned>(walking_blocks(ctx.multiprocessors(), plan, n.rows, row_threads * norm_blocks_at_once(Added, plan.packs))));
  const dim3 block(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
  by_plan<T>(plan, [&](auto wide, auto packs) {
    launch_block(ctx, Centre ? "layer_norm" : "rms_norm", norm_kernel<T, Centre, Added, decltype(wide)::value, decltype(packs)::value>, blocks, block, 0, n.rows,
                 static_cast<int>(n.cols), C(1) / static_cast<C>(n.cols), static_cast<const T*>(n.x), static_cast<const T*>(n.residual), static_cast<T*>(n.sum),
                 static_cast<const C*>(n.w), static_cast<const C*>(n.b), static_cast<C>(n.epsilon), static_cast<T*>(n.y), static_cast<C*>(n.mean), static_cast<C*>(n.inverse));
  });
}

template <class T, bool Centre, bool Added>
void launch_norm_backward(Context& ctx, const NormRowsBackward& n) {
  using C = Compute<T>;
  const char* name = Centre ? "layer_norm_backward" : "rms_norm_backward";
  const std::int64_t blocks = norm_backward_blocks(n.rows, n.cols);
  if (n.rows == 0) {
    for (void* p : {n.partial_w, n.partial_b})
      if (p != nullptr) check(cudaMemsetAsync(p, 0, static_cast<std::size_t>(blocks * n.cols) * sizeof(C), ctx.stream()), name);
    return;
  }
  const bool vector = all_on_16(n.x, n.w, n.g, n.g_sum, n.dx);
  RowPlan plan = rows_for<T>(n.cols, vector, 2);
  if (plan.packs == 0) plan = rows_for<T>(n.cols, vector, 4);
  const auto run = [&](auto kernel, dim3 block, std::int64_t shared, auto... more) {
    launch_block(ctx, name, kernel, dim3(static_cast<unsigned>(blocks)), block, shared, n.rows, static_cast<int>(n.cols), C(1) / static_cast<C>(n.cols),
                 static_cast<const T*>(n.x), static_cast<const C*>(n.w), static_cast<const C*>(n.mean), static_cast<const C*>(n.inverse), static_cast<const T*>(n.g),
                 static_cast<const T*>(n.g_sum), static_cast<T*>(n.dx), static_cast<C*>(n.partial_w), static_cast<C*>(n.partial_b), more...);
  };
  by_plan<T>(plan, [&](auto wide, auto packs) {
    constexpr int width = decltype(wide)::value, count = decltype(packs)::value;
    constexpr bool too_many = count == 4 && Centre && sizeof(T) == 2;  // sums and rows do not fit into the registers
    if constexpr (count == 0 || too_many) {
      const std::int64_t shared = (Centre ? 2 : 1) * n.cols * static_cast<std::int64_t>(sizeof(C));
      const bool fits = shared <= ctx.shared_limit() - 4096;
      run(norm_backward_long_kernel<T, Centre, Added, width>, dim3(row_threads), fits ? shared : 0, fits);
    } else {
      run(norm_backward_kernel<T, Centre, Added, width, count>, dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows)),
          plan.rows > 1 ? plan.rows * n.cols * static_cast<std::int64_t>(sizeof(C)) : 0);
    }
  });
}

/// f<T, Centre, Added>.
template <class F>
void by_form(Num num, bool centre, bool added, F&& f) {
  visit(num, [&]<class T>() {
    if (centre && added) f.template operator()<T, true, true>();
    else if (centre) f.template operator()<T, true, false>();
    else if (added) f.template operator()<T, false, true>();
    else f.template operator()<T, false, false>();
  });
}

}  // namespace

std::int64_t norm_blocks(Context&, std::int64_t rows, std::int64_t cols) { return norm_backward_blocks(rows, cols); }

void norm(Context& ctx, Num num, const NormRows& n) {
  if (n.rows == 0 || n.cols == 0) return;
  by_form(num, n.centre, n.residual != nullptr, [&]<class T, bool Centre, bool Added>() { launch_norm<T, Centre, Added>(ctx, n); });
}

void norm_backward(Context& ctx, Num num, const NormRowsBackward& n) {
  if (n.cols == 0) return;
  by_form(num, n.centre, n.g_sum != nullptr && n.dx != nullptr, [&]<class T, bool Centre, bool Added>() { launch_norm_backward<T, Centre, Added>(ctx, n); });
}

}  // namespace capstan::kernels::cuda
