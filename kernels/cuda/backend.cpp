// The CUDA kernels behind Gpu, and the library's one exported function.
#include <kernels/cuda/attention.h>
#include <kernels/cuda/context.h>
#include <kernels/cuda/copy_stream.h>
#include <kernels/cuda/elementwise.h>
#include <kernels/cuda/fingerprint.h>
#include <kernels/cuda/fp8.h>
#include <kernels/cuda/gemm.h>
#include <kernels/cuda/gpu.h>
#include <kernels/cuda/queue.h>
#include <kernels/cuda/reduce.h>
#include <kernels/cuda/rows.h>
#include <kernels/cuda/scan.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>

namespace capstan::kernels::cuda {

namespace {

/// Every call binds the thread to the GPU first: data loaders and savers are other threads.
class CudaGpu final : public Gpu {
 public:
  explicit CudaGpu(int device) : ctx_(device), queue_(ctx_) {}
  Queue* queue() override { return &queue_; }

  void* allocate(std::int64_t bytes) override { return bound().allocate(bytes); }
  void release(void* data) noexcept override {
    cudaSetDevice(ctx_.device());
    ctx_.release(data);
  }
  std::int64_t reserved() const override { return ctx_.reserved(); }
  std::int64_t capacity() const override { return ctx_.capacity(); }
  std::int64_t available() const override {
    ctx_.bind();
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "reading how much memory is free");
    return static_cast<std::int64_t>(free);
  }
  void explain_memory(std::function<std::string()> words) override { ctx_.memory_words = std::move(words); }
  void allow_any_order(bool on) override { any_order_ = on; }
  std::string name() const override {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, ctx_.device()), "reading the GPU's properties");
    return properties.name;
  }
  int index() const override { return ctx_.device(); }
  std::string address() const override {
    char text[32] = "";
    check(cudaDeviceGetPCIBusId(text, sizeof text, ctx_.device()), "reading the GPU's address");
    return text;
  }

  std::shared_ptr<Mark> mark() override { return std::make_shared<StreamMark>(bound().device(), ctx_.stream()); }
  void after(const Mark& mark) override { wait_for(bound().stream(), mark); }
  std::unique_ptr<CopyStream> make_copy_stream() override { return cuda::make_copy_stream(bound().device()); }
  void pin(void* host, std::int64_t bytes) override {
    ctx_.bind();
    check(cudaHostRegister(host, static_cast<std::size_t>(bytes), cudaHostRegisterPortable), "pinning host memory for copies");
  }
  void unpin(void* host) noexcept override {
    cudaSetDevice(ctx_.device());
    cudaHostUnregister(host);
  }
  void* stream() const override { return ctx_.stream(); }

  void upload(void* to, const void* host_from, std::int64_t bytes) override { bound().upload(to, host_from, bytes); }
  void download(void* host_to, const void* from, std::int64_t bytes) override {
    bound().download(host_to, from, bytes);
    ctx_.throw_fault();
  }
  void synchronize() override {
    Context& ctx = bound();
    ctx.refuse_in_record("waiting for the GPU");
    check(cudaStreamSynchronize(ctx.stream()), "waiting for the GPU");
    ctx.throw_fault();
  }
  void clear(void* to, std::int64_t bytes) override {
    bound().clear(to, bytes, "clearing memory");
  }
  void copy(const Strided& shape, Num to_num, void* to, Num from_num, const void* from) override { cuda::copy(bound(), shape, to_num, to, from_num, from); }
  void fill(const Strided& shape, Num num, void* to, double value) override { cuda::fill(bound(), shape, num, to, value); }

  void binary(BinaryOp op, const Broadcast& shape, Num num, const void* a, const void* b, void* out) override { cuda::binary(bound(), op, shape, num, a, b, out); }
  void unary(UnaryOp op, Num num, std::int64_t n, const void* x, void* y) override { cuda::unary(bound(), op, num, n, x, y); }
  void unary_backward(UnaryOp op, Num num, std::int64_t n, const void* saved, const void* g, void* dx) override {
    cuda::unary_backward(bound(), op, num, n, saved, g, dx);
  }
  void gelu_backward_sum(Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* g, void* dx, Num sum_num, void* sum,
                         bool accumulate) override {
    cuda::unary_backward(bound(), UnaryOp::gelu, num, rows * cols, x, g, dx);
    cuda::column_sum(bound(), num, dx, rows, cols, cols, sum_num, sum, accumulate);
  }
  void scale(Num num, std::int64_t n, const void* x, double factor, double shift, void* y) override { cuda::scale(bound(), num, n, x, factor, shift, y); }
  void add(Num num, std::int64_t n, const void* x, const void* y, void* out) override { cuda::add(bound(), num, n, x, y, out); }
  void swiglu(Num num, std::int64_t rows, std::int64_t width, const void* gate_up, void* y) override { cuda::swiglu(bound(), num, rows, width, gate_up, y); }
  void swiglu_backward(Num num, std::int64_t rows, std::int64_t width, const void* gate_up, const void* g, void* dx) override {
    cuda::swiglu_backward(bound(), num, rows, width, gate_up, g, dx);
  }
  void dropout(Num num, std::int64_t rows, std::int64_t cols, const void* x, const std::int64_t* sample_ids, double p, std::uint64_t key,
               std::uint64_t step, void* y) override {
    cuda::dropout(bound(), num, rows, cols, x, sample_ids, p, key, step, y);
  }
  void rope_table(Num num, std::int64_t rows, std::int64_t size, double theta, const std::int32_t* positions, void* table) override {
    cuda::rope_table(bound(), num, rows, size, theta, positions, table);
  }
  void rope(Num num, std::int64_t rows, std::int64_t heads, std::int64_t size, const void* x, std::int64_t stride, const void* table, void* y,
            bool inverse) override {
    cuda::rope(bound(), num, rows, heads, size, x, stride, table, y, inverse);
  }
  void random(Num num, const RandomFill& fill, std::int64_t n, void* to) override {
    bound().refuse_in_record("filling memory with random numbers");
    cuda::random(bound(), num, fill, n, to);
  }

  void sum_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, double factor, Num out_num, void* out) override {
    cuda::sum_middle(bound(), num, outer, n, inner, a, factor, out_num, out);
  }
  void spread_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* g, double factor, void* out) override {
    cuda::spread_middle(bound(), num, outer, n, inner, g, factor, out);
  }
  void max_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, void* out) override {
    cuda::max_middle(bound(), num, outer, n, inner, a, out);
  }
  void max_middle_backward(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, const void* m, const void* g, void* da) override {
    cuda::max_middle_backward(bound(), num, outer, n, inner, a, m, g, da);
  }
  void scan_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, bool reverse, void* out) override {
    cuda::scan_middle(bound(), num, outer, n, inner, a, reverse, out);
  }
  void sum_flat(Num num, std::int64_t n, const void* a, void* out) override { cuda::sum_middle(bound(), num, 1, n, 1, a, 1, num, out); }
  void column_sum(Num num, const void* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, Num to_num, void* to, bool accumulate) override {
    cuda::column_sum(bound(), num, from, rows, cols, stride, to_num, to, accumulate);
  }
  double sum_of_squares(std::span<const Piece> pieces) override {
    bound().refuse_in_record("a sum that the host reads");
    return cuda::sum_of_squares(bound(), pieces);
  }
  std::int64_t first_nonfinite(std::span<const Piece> pieces) override {
    bound().refuse_in_record("a search that the host reads");
    return cuda::first_nonfinite(bound(), pieces);
  }
  std::uint64_t fingerprint(Num num, std::int64_t n, const void* data, std::uint64_t first) override {
    bound().refuse_in_record("a fingerprint that the host reads");
    return cuda::fingerprint(bound(), num, n, data, first);
  }
  void normalize(Num num, std::int64_t n, void* x, double least) override { cuda::normalize(bound(), num, n, x, least); }

  std::int64_t norm_blocks(std::int64_t rows, std::int64_t cols) override { return cuda::norm_blocks(bound(), rows, cols); }
  void norm(Num num, const NormRows& n) override { cuda::norm(bound(), num, n); }
  void norm_backward(Num num, const NormRowsBackward& n) override { cuda::norm_backward(bound(), num, n); }
  void softmax(Num num, std::int64_t rows, std::int64_t cols, const void* x, void* y, bool logarithm) override {
    cuda::softmax(bound(), num, rows, cols, x, y, logarithm);
  }
  void softmax_backward(Num num, std::int64_t rows, std::int64_t cols, const void* y, const void* g, void* dx, bool logarithm) override {
    cuda::softmax_backward(bound(), num, rows, cols, y, g, dx, logarithm);
  }

  std::int64_t first_outside(const char* what, std::int64_t count, const std::int32_t* ids, std::int64_t low, std::int64_t high) override {
    cuda::check_ids(bound(), what, count, ids, low, high);
    return -1;
  }
  void local_ids(std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, Num num, void* mine,
                 void* others) override {
    cuda::local_ids(bound(), count, ids, begin, rows, local, num, mine, others);
  }
  void gather_rows(std::int64_t count, std::int64_t row_bytes, const void* table, std::int64_t table_rows, const std::int32_t* ids, void* out) override {
    cuda::gather_rows(bound(), count, row_bytes, table, table_rows, ids, out);
  }
  void scatter_add_rows(Num num, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const void* g, std::int64_t table_rows, Num table_num,
                        void* table, bool overwrite) override {
    cuda::scatter_add_rows(bound(), num, count, cols, ids, g, table_rows, table_num, table, overwrite);
  }
  void store_pages(Num num, std::int64_t tokens, std::int64_t heads, std::int64_t size, std::int64_t page, const void* from, std::int64_t row_stride,
                   std::int64_t head_stride, const std::int64_t* rows, void* pages) override {
    cuda::store_pages(bound(), num, tokens, heads, size, page, from, row_stride, head_stride, rows, pages);
  }

  void gemm(const Gemm& g, const void* a, const void* b, void* c, const void* bias, const void* residual) override {
    cuda::gemm(bound(), g, a, b, c, bias, residual);
  }
  bool takes_gelu_slope(const Gemm& g) override { return cuda::takes_gelu_slope(g); }
  bool takes_sums_of_a(const Gemm& g) override { return cuda::takes_sums_of_a(g); }
  double gemm_rate(Num num) override { return num == Num::f8e4m3 ? cuda::gemm_rate_fp8(bound()) : cuda::gemm_rate(bound(), num); }
  void quantize(const Quantize& q) override {
    if (q.rows > 0 && q.cols > 0) cuda::quantize(bound(), q);
  }
  void gemm_fp8(const GemmFp8& g, const void* a, const void* b, void* c, const void* bias, const void* residual) override {
    cuda::gemm_fp8(bound(), g, a, b, c, bias, residual);
  }
  std::string fp8_problem(Scaling scaling) override { return cuda::fp8_problem(bound(), scaling); }
  void attention(const Attention& a) override { cuda::attention(bound(), a); }
  void attention_backward(const Attention& asked) override {
    Attention a = asked;
    a.any_order = asked.any_order || any_order_;
    cuda::attention_backward(bound(), a);
  }
  void attention_paged(const PagedAttention& a) override { cuda::attention_paged(bound(), a); }
  void score_rows(const ScoreRows& s) override { cuda::score_rows(bound(), s); }
  void score_rows_backward(const ScoreRows& s) override { cuda::score_rows_backward(bound(), s); }
  void weighted_sum(Num compute, std::int64_t n, const float* weights, const void* logprob, void* out) override {
    cuda::weighted_sum(bound(), compute, n, weights, logprob, out);
  }
  bool is_one(const char* what, Num num, const void* x) override {
    cuda::check_one(bound(), what, num, x);
    return true;
  }

  void adamw(const AdamWStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* m, void* v) override {
    cuda::adamw(bound(), s, num, state_num, n, value, grad, m, v);
  }
  void sgd(const SgdStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* buffer) override {
    cuda::sgd(bound(), s, num, state_num, n, value, grad, buffer);
  }
  void momentum(const MomentumStep& s, Num num, Num state_num, std::int64_t rows, std::int64_t cols, std::int64_t stride, const void* grad,
                void* buffer, void* direction) override {
    cuda::momentum(bound(), s, num, state_num, rows, cols, stride, grad, buffer, direction);
  }
  void axpby(Num num, std::int64_t rows, std::int64_t cols, double a, const void* x, std::int64_t x_stride, double b, const void* y,
             std::int64_t y_stride, void* out, std::int64_t out_stride) override {
    cuda::axpby(bound(), num, rows, cols, a, x, x_stride, b, y, y_stride, out, out_stride);
  }

 private:
  Context& bound() {
    ctx_.bind();
    return ctx_;
  }
  Context ctx_;
  CudaQueue queue_;
  bool any_order_ = false;
};

/// Why no GPU can be used; "" when `device` can.
std::string problem(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "this machine has no NVIDIA driver (libcuda.so.1 was not found): install it, or set run.device: cpu";
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaErrorInsufficientDriver)
    return "the NVIDIA driver is too old: it supports CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", this build needs " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  if (code != cudaSuccess) return std::string("the NVIDIA driver gives no GPU: ") + cudaGetErrorString(code);
  if (count == 0) return "the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES hides those that are not in it)";
  if (device >= count) return "there is no GPU " + std::to_string(device) + ": this machine has " + std::to_string(count) + ", counted from 0";
  return "";
}

}  // namespace

}  // namespace capstan::kernels::cuda

extern "C" __attribute__((visibility("default"))) capstan::kernels::cuda::Gpu* capstan_cuda_open(int interface, int device, char* message, std::size_t size) {
  using namespace capstan::kernels::cuda;
  std::snprintf(message, size, "%s", "");
  try {
    std::string why = problem(std::max(device, 0));
    if (why.empty() && interface != gpu_interface) why = "libcapstan_cuda.so is from another build: rebuild or reinstall both";
    if (!why.empty() || device < 0) {
      std::snprintf(message, size, "%s", why.c_str());
      return nullptr;
    }
    return new CudaGpu(device);
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
    return nullptr;
  }
}

extern "C" __attribute__((visibility("default"))) int capstan_cuda_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
