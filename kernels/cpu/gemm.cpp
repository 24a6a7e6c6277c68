// Matrix products: own panels for f32 forward products with AVX-512 or AVX2, oneDNN for the others, a plain loop for the f64
// reference. Why which path: see
// docs/maintainers/numerics.md (row invariance) and performance.md (rates).
#include <kernels/cpu/copy.h>
#include <kernels/cpu/gemm.h>
#include <kernels/cpu/gemm_cache.h>
#include <kernels/cpu/panel_gemm.h>
#include <kernels/cpu/tile_gemm.h>

#include <capstan/kernels/bf16.h>

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::kernels::cpu {

namespace {

using dnnl::memory;

memory::data_type type_of(Num n) { return n == Num::bf16 ? memory::data_type::bf16 : memory::data_type::f32; }

memory::desc matrix(const Gemm& g, Num num, std::int64_t rows, std::int64_t cols, std::int64_t row_stride, std::int64_t col_stride,
                    std::int64_t batch_stride) {
  if (g.batch == 1) return memory::desc({rows, cols}, type_of(num), memory::dims{row_stride, col_stride});
  return memory::desc({g.batch, rows, cols}, type_of(num), memory::dims{batch_stride, row_stride, col_stride});
}

const char* at(const void* p, Num num, std::int64_t elements) { return static_cast<const char*>(p) + static_cast<std::size_t>(elements) * (num == Num::bf16 ? 2 : 4); }

const GemmCache::Entry& matmul_for(GemmCache& cache, const Gemm& g) {
  const GemmCache::Key key{static_cast<int>(g.a) * 16 + static_cast<int>(g.b) * 4 + static_cast<int>(g.c),
                           g.trans_a * 2 + g.trans_b, g.accumulate, g.bias, g.m, g.n, g.k, g.lda, g.ldb, g.ldc,
                           g.batch, g.stride_a, g.stride_b, g.stride_c};
  if (auto it = cache.entries.find(key); it != cache.entries.end()) return it->second;
  GemmCache::Entry e;
  e.a = matrix(g, g.a, g.m, g.k, g.trans_a ? 1 : g.lda, g.trans_a ? g.lda : 1, g.stride_a);
  e.b = matrix(g, g.b, g.k, g.n, g.trans_b ? 1 : g.ldb, g.trans_b ? g.ldb : 1, g.stride_b);
  e.c = matrix(g, g.c, g.m, g.n, g.ldc, 1, g.stride_c);
  dnnl::primitive_attr attr;
  if (g.accumulate) {
    dnnl::post_ops ops;
    ops.append_sum(1.0f);
    attr.set_post_ops(ops);
  }
  if (g.bias) e.bias = g.batch == 1 ? memory::desc({1, g.n}, memory::data_type::f32, memory::dims{g.n, 1})
                                    : memory::desc({1, 1, g.n}, memory::data_type::f32, memory::dims{g.n, g.n, 1});
  // With many rows the library's own layout of B pays for the copy into it (the same bits either way).
  e.packed = g.batch == 1 && g.trans_b && g.m >= 1024 && g.n <= 8192;
  const memory::desc b = e.packed ? memory::desc({g.k, g.n}, type_of(g.b), memory::format_tag::any) : e.b;
#if DNNL_VERSION_MAJOR >= 3
  const auto pd = g.bias ? dnnl::matmul::primitive_desc(cache.engine, e.a, b, e.bias, e.c, attr)
                         : dnnl::matmul::primitive_desc(cache.engine, e.a, b, e.c, attr);
#else
  const auto pd = g.bias ? dnnl::matmul::primitive_desc({e.a, b, e.bias, e.c}, attr, cache.engine)
                         : dnnl::matmul::primitive_desc({e.a, b, e.c}, attr, cache.engine);
#endif
  e.primitive = dnnl::matmul(pd);
  e.primitive_b = pd.weights_desc();
  if (e.packed) e.pack = dnnl::reorder(dnnl::reorder::primitive_desc(cache.engine, e.b, cache.engine, e.primitive_b));
  // Shapes of inference vary without end; primitives are cheap to make again.
  if (cache.entries.size() > 4096) cache.entries.clear();
  return cache.entries.emplace(key, std::move(e)).first->second;
}

void run_matmul(GemmCache& cache, const Gemm& g, const void* a, const void* b, void* c, const void* bias) {
  const GemmCache::Entry& e = matmul_for(cache, g);
  if (e.packed) {
    void* const packed = cache.packed.of(e.primitive_b.get_size());
    memory from(e.b, cache.engine, const_cast<void*>(b)), to(e.primitive_b, cache.engine, packed);
    e.pack.execute(cache.stream, from, to);
    b = packed;
  }
  std::unordered_map<int, memory> args{{DNNL_ARG_SRC, memory(e.a, cache.engine, const_cast<void*>(a))},
                                       {DNNL_ARG_WEIGHTS, memory(e.primitive_b, cache.engine, const_cast<void*>(b))},
                                       {DNNL_ARG_DST, memory(e.c, cache.engine, c)}};
  if (g.bias) args.emplace(DNNL_ARG_BIAS, memory(e.bias, cache.engine, const_cast<void*>(bias)));
  e.primitive.execute(cache.stream, args);
  cache.stream.wait();
}

void reference(Context& context, const Gemm& g, const double* a, const double* b, double* c, const double* bias) {
  std::vector<double> packed;
  for (std::int64_t z = 0; z < g.batch; ++z, a += g.stride_a, b += g.stride_b, c += g.stride_c) {
    const double* rows = b;
    std::int64_t ld = g.ldb;
    if (g.trans_b) {  // one layout of B, so that one loop serves
      packed.resize(static_cast<std::size_t>(g.k * g.n));
      for (std::int64_t j = 0; j < g.n; ++j)
        for (std::int64_t p = 0; p < g.k; ++p) packed[static_cast<std::size_t>(p * g.n + j)] = b[j * g.ldb + p];
      rows = packed.data(), ld = g.n;
    }
#pragma omp parallel for num_threads(context.threads()) if (g.m * g.n * g.k > 32768)
    for (std::int64_t i = 0; i < g.m; ++i) {
      double* out = c + i * g.ldc;
      if (!g.accumulate) std::fill(out, out + g.n, 0.0);
      for (std::int64_t p = 0; p < g.k; ++p) {
        const double x = g.trans_a ? a[p * g.lda + i] : a[i * g.lda + p];
        const double* row = rows + p * ld;
        for (std::int64_t j = 0; j < g.n; ++j) out[j] += x * row[j];
      }
      if (g.bias) for (std::int64_t j = 0; j < g.n; ++j) out[j] += bias[j];
    }
  }
}

/// Whether this CPU's matmul gives a row other bits for other row counts. Found by trying: on AVX-512 it
/// does not, on AVX2 it does.
bool rows_depend_on_count(GemmCache& cache) {
  if (cache.probed) return cache.rows_depend;
  bool depend = false;
  struct Probe { std::int64_t k, n, most; };
  for (const auto& [k, n, most] : {Probe{64, 64, 96}, {384, 192, 96}, {96, 257, 96}, {3072, 64, 1024}}) {  // the last one packs B
    std::vector<float> a(static_cast<std::size_t>(most * k)), b(static_cast<std::size_t>(n * k)), whole(static_cast<std::size_t>(most * n)), part;
    std::uint32_t x = 12345;
    auto next = [&] { return static_cast<float>((x = x * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f; };
    for (float& v : a) v = next();
    for (float& v : b) v = next();
    Gemm g;
    g.trans_b = true, g.m = most, g.n = n, g.k = k, g.lda = k, g.ldb = k, g.ldc = n;
    run_matmul(cache, g, a.data(), b.data(), whole.data(), nullptr);
    part.resize(whole.size());
    for (std::int64_t m : {2, 3, 7, 16, 33, 64}) {  // one row runs as two
      g.m = m;
      run_matmul(cache, g, a.data(), b.data(), part.data(), nullptr);
      depend |= std::memcmp(part.data(), whole.data(), static_cast<std::size_t>(m * n) * sizeof(float)) != 0;
    }
  }
  cache.probed = true;
  cache.rows_depend = depend;
  return depend;
}

/// One row, run as two: libraries keep a path of its own for a single row (oneDNN 3.7 splits a long k there).
void run_single_row(GemmCache& cache, const Gemm& single, const void* a, const void* b, void* c, const void* bias) {
  const std::size_t row_a = static_cast<std::size_t>(single.k) * (single.a == Num::bf16 ? 2 : 4), row_c = static_cast<std::size_t>(single.n) * (single.c == Num::bf16 ? 2 : 4);
  std::vector<char> in(2 * row_a), out(2 * row_c);
  std::memcpy(in.data(), a, row_a);
  std::memcpy(in.data() + row_a, a, row_a);
  if (single.accumulate) std::memcpy(out.data(), c, row_c);
  Gemm g = single;
  g.m = 2;
  run_matmul(cache, g, in.data(), b, out.data(), bias);
  std::memcpy(c, out.data(), row_c);
}

/// Whether this CPU has bf16 products at all (oneDNN asks for AVX-512).
bool has_bf16(GemmCache& cache) {
  if (cache.bf16 >= 0) return cache.bf16 == 1;
  Gemm g;
  g.a = g.b = Num::bf16;
  g.trans_b = true, g.m = g.n = g.k = g.lda = g.ldb = g.ldc = 16;
  try {
    matmul_for(cache, g);
    cache.bf16 = 1;
  } catch (const dnnl::error&) {
    cache.bf16 = 0;
  }
  return cache.bf16 == 1;
}

float widened(const void* from, Num num, std::int64_t at) {
  return num == Num::bf16 ? static_cast<float>(static_cast<const bf16*>(from)[at]) : static_cast<const float*>(from)[at];
}

/// The product in own register tiles, f32, every element's sum over k in order: a row's bits depend on nothing but
/// the row. For CPUs whose library does not keep that, or has no bf16; slower than the library's blocking.
void run_in_tiles(Context& context, const Gemm& g, const void* a, const void* b, void* c, const float* bias) {
  constexpr std::int64_t tile_m = 48, tile_n = 64;
  const std::int64_t cols = (g.n + tile_n - 1) / tile_n, rows = (g.m + tile_m - 1) / tile_m;
  const std::int64_t a_row = g.trans_a ? 1 : g.lda, a_col = g.trans_a ? g.lda : 1;
  const std::int64_t b_row = g.trans_b ? 1 : g.ldb, b_col = g.trans_b ? g.ldb : 1;
  const std::size_t need = static_cast<std::size_t>((tile_n + tile_m) * g.k + tile_m * tile_n) * sizeof(float);
  context.reserve_scratch(context.threads(), need);
#pragma omp parallel for num_threads(context.threads()) schedule(dynamic, 1)
  for (std::int64_t column = 0; column < cols; ++column) {
    const std::int64_t j0 = column * tile_n, n = std::min(tile_n, g.n - j0);
    float* packed = static_cast<float*>(context.scratch(omp_get_thread_num(), need));
    float* wide = packed + tile_n * g.k;
    float* out = wide + tile_m * g.k;
    for (std::int64_t j = 0; j < tile_n; ++j)
      for (std::int64_t p = 0; p < g.k; ++p) packed[p * tile_n + j] = j < n ? widened(b, g.b, p * b_row + (j0 + j) * b_col) : 0.0f;
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t i0 = row * tile_m, m = std::min(tile_m, g.m - i0);
      const float* in = wide;
      std::int64_t in_row = g.k, in_col = 1;
      if (g.a == Num::f32) {
        in = static_cast<const float*>(a) + i0 * a_row, in_row = a_row, in_col = a_col;
      } else {
        for (std::int64_t r = 0; r < m; ++r)
          for (std::int64_t p = 0; p < g.k; ++p) wide[r * g.k + p] = widened(a, g.a, (i0 + r) * a_row + p * a_col);
      }
      tile_gemm<float>(m, tile_n, g.k, in, in_row, in_col, packed, tile_n, out, tile_n, false);
      for (std::int64_t r = 0; r < m; ++r)
        for (std::int64_t j = 0; j < n; ++j) {
          const std::int64_t at = (i0 + r) * g.ldc + j0 + j;
          float v = out[r * tile_n + j];
          if (bias != nullptr) v += bias[j0 + j];
          if (g.accumulate) v += widened(c, g.c, at);
          if (g.c == Num::bf16) static_cast<bf16*>(c)[at] = bf16(v);
          else static_cast<float*>(c)[at] = v;
        }
    }
  }
}

/// The product of widened operands in own panels, every element rounded once at the end; some rows of A at a time. For CPUs
/// without bf16 products.
void run_widened(Context& context, GemmCache& cache, const Gemm& g, const void* a, const void* b, void* c, const float* bias) {
  constexpr std::int64_t most_rows = 2048;
  const auto matrix = [](std::int64_t rows, std::int64_t cols, std::int64_t to, std::int64_t from) {
    Strided s;
    s.rank = 2;
    s.shape[0] = rows, s.shape[1] = cols, s.to[0] = to, s.from[0] = from, s.to[1] = s.from[1] = 1;
    return s;
  };
  const auto room = [](GemmCache::Room& r, std::int64_t elements) { return static_cast<float*>(r.of(static_cast<std::size_t>(elements) * sizeof(float))); };
    Gemm f = g;
  f.a = f.b = f.c = Num::f32;
  const float* wide_b = static_cast<const float*>(b);
  if (g.b == Num::bf16) {
    const std::int64_t rows = g.trans_b ? g.n : g.k, cols = g.trans_b ? g.k : g.n;
    float* to = room(cache.wide_b, rows * cols);
    copy(context, matrix(rows, cols, cols, g.ldb), Num::f32, to, Num::bf16, b);
    wide_b = to, f.ldb = cols;
  }
  for (std::int64_t i = 0; i < g.m; i += most_rows) {
    f.m = std::min(most_rows, g.m - i);
    const void* part_a = at(a, g.a, g.trans_a ? i : i * g.lda);
    void* part_c = const_cast<char*>(at(c, g.c, i * g.ldc));
    f.lda = g.lda, f.ldc = g.ldc;
    if (g.a == Num::bf16) {
      const std::int64_t rows = g.trans_a ? g.k : f.m, cols = g.trans_a ? f.m : g.k;
      float* to = room(cache.wide_a, rows * cols);
      copy(context, matrix(rows, cols, cols, g.lda), Num::f32, to, Num::bf16, part_a);
      part_a = to, f.lda = cols;
    }
    if (g.c != Num::bf16) {
      panel_gemm(context, f, static_cast<const float*>(part_a), wide_b, static_cast<float*>(part_c), bias);
      continue;
    }
    float* out = room(cache.wide_c, f.m * g.n);
    f.ldc = g.n;
    if (g.accumulate) copy(context, matrix(f.m, g.n, g.n, g.ldc), Num::f32, out, Num::bf16, part_c);
    panel_gemm(context, f, static_cast<const float*>(part_a), wide_b, out, bias);
    copy(context, matrix(f.m, g.n, g.ldc, g.n), Num::bf16, part_c, Num::f32, out);
  }
}

void run_batch_in_tiles(Context& context, const Gemm& whole, const void* a, const void* b, void* c, const void* bias) {
  Gemm g = whole;
  g.batch = 1;
    for (std::int64_t z = 0; z < whole.batch; ++z)
    run_in_tiles(context, g, at(a, g.a, z * whole.stride_a), at(b, g.b, z * whole.stride_b), const_cast<char*>(at(c, g.c, z * whole.stride_c)), static_cast<const float*>(bias));
}

}  // namespace

void gemm(Context& context, const Gemm& g, const void* a, const void* b, void* c, const void* bias) {
  if (g.m == 0 || g.n == 0 || g.batch == 0) return;
  if (g.a == Num::f64) {
    reference(context, g, static_cast<const double*>(a), static_cast<const double*>(b), static_cast<double*>(c), static_cast<const double*>(bias));
    return;
  }
  GemmCache& cache = context.gemms();
  std::lock_guard lock(cache.mutex);
  const int before = omp_get_max_threads();  // this thread's setting, which oneDNN reads when it makes and runs a primitive
  omp_set_num_threads(context.threads());
  struct Restore { int n; ~Restore() { omp_set_num_threads(n); } } restore{before};
  try {
    if (g.k == 0) throw std::invalid_argument("an inner dimension of 0");
    if ((g.a == Num::bf16 || g.b == Num::bf16) && !has_bf16(cache)) {
      Gemm one = g;
      one.batch = 1;
      Gemm wide = one;
      wide.a = wide.b = wide.c = Num::f32;
      if (!has_panel_gemm(wide)) return run_batch_in_tiles(context, g, a, b, c, bias);
            for (std::int64_t z = 0; z < g.batch; ++z)
        run_widened(context, cache, one, at(a, g.a, z * g.stride_a), at(b, g.b, z * g.stride_b), const_cast<char*>(at(c, g.c, z * g.stride_c)), static_cast<const float*>(bias));
      return;
    }
    const bool f32 = g.a == Num::f32 && g.b == Num::f32 && g.c == Num::f32;
    if (g.invariant) {
      // Padded rows select another implementation, whose bits depend on the row count.
      if (g.trans_a || g.lda != g.k || g.ldc != g.n) throw std::invalid_argument("rows of A and C must lie close together in an invariant product");
      if (has_panel_gemm(g)) return panel_gemm(context, g, static_cast<const float*>(a), static_cast<const float*>(b), static_cast<float*>(c), static_cast<const float*>(bias));
      if (rows_depend_on_count(cache)) return run_batch_in_tiles(context, g, a, b, c, bias);
      if (g.m == 1 && g.batch == 1) return run_single_row(cache, g, a, b, c, bias);
      return run_matmul(cache, g, a, b, c, bias);
    }
    Gemm one = g;
    one.batch = 1;
    if (panels_are_better(one)) {
      for (std::int64_t z = 0; z < g.batch; ++z)
        panel_gemm(context, one, static_cast<const float*>(a) + z * g.stride_a, static_cast<const float*>(b) + z * g.stride_b,
                   static_cast<float*>(c) + z * g.stride_c, static_cast<const float*>(bias));
      return;
    }
    // sgemm is the faster path where A is read along its rows (gradients of activations), and where rows of B a
    // multiple of 4 KiB apart would fall on the same cache sets (it packs B). The choice hangs on the shape
    // alone: the same run gives the same bits.
    if (f32 && g.batch == 1 && !g.bias && g.m >= 16 && (!g.trans_a || g.ldb % 1024 == 0 || (g.m <= 1280 && g.n <= 1280))) {
      const auto status = dnnl_sgemm(g.trans_a ? 'T' : 'N', g.trans_b ? 'T' : 'N', g.m, g.n, g.k, 1.0f, static_cast<const float*>(a), g.lda,
                                     static_cast<const float*>(b), g.ldb, g.accumulate ? 1.0f : 0.0f, static_cast<float*>(c), g.ldc);
      if (status != dnnl_success) throw std::runtime_error("dnnl_sgemm returned " + std::to_string(static_cast<int>(status)));
      return;
    }
    run_matmul(cache, g, a, b, c, bias);
  } catch (const std::exception& e) {
    throw std::runtime_error("[gemm] " + std::to_string(g.m) + " x " + std::to_string(g.n) + " x " + std::to_string(g.k) +
                             " failed in oneDNN: " + e.what());
  }
}

}  // namespace capstan::kernels::cpu
