// The row kernels and attention, by the CPU's: they use the GPU's own instructions, which this emulation has not.
#include <kernels/cpu/backend.h>
#include <kernels/cuda/attention.h>
#include <kernels/cuda/rows.h>

#include <functional>
#include <string>

namespace capstan::emulated {
void touch_device_memory(const std::function<void()>& work);
}

namespace capstan::kernels::cuda {

namespace {

std::int64_t on_cpu_now(const std::function<std::int64_t(cpu::CpuBackend&)>& work) {
  static cpu::Context context(1);  // a second thread would only be waited for
  static cpu::CpuBackend backend(context);
  return work(backend);
}
/// Now, or whenever the record that is being made is replayed.
void on_cpu(const std::function<void(cpu::CpuBackend&)>& work) {
  emulated::touch_device_memory([=] { on_cpu_now([&](auto& backend) { return work(backend), 0; }); });
}
/// As the kernels do: where sequences begin is read on the device.
Attention by_device(const Attention& a) {
  Attention b = a;
  if (a.starts != nullptr) b.host_starts = a.starts;
  return b;
}

}  // namespace

std::int64_t norm_blocks(Context&, std::int64_t rows, std::int64_t cols) {
  return on_cpu_now([=](auto& b) { return b.norm_blocks(rows, cols); });
}
void norm(Context&, Num num, const NormRows& n) {
  on_cpu([=](auto& b) { b.norm(num, n); });
}
void norm_backward(Context&, Num num, const NormRowsBackward& n) {
  on_cpu([=](auto& b) { b.norm_backward(num, n); });
}
void scan_middle(Context&, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, bool reverse, void* out) {
  on_cpu([=](auto& b) { b.scan_middle(num, outer, n, inner, a, reverse, out); });
}
void softmax(Context&, Num num, std::int64_t rows, std::int64_t cols, const void* x, void* y, bool logarithm) {
  on_cpu([=](auto& b) { b.softmax(num, rows, cols, x, y, logarithm); });
}
void softmax_backward(Context&, Num num, std::int64_t rows, std::int64_t cols, const void* y, const void* g, void* dx, bool logarithm) {
  on_cpu([=](auto& b) { b.softmax_backward(num, rows, cols, y, g, dx, logarithm); });
}
void check_ids(Context& ctx, const char* what, std::int64_t count, const std::int32_t* ids, std::int64_t low, std::int64_t high) {
  Context::Fault* faults = ctx.faults();
  const unsigned long long number = ctx.fault_number(what);
  const std::string name = what;
  on_cpu([=](auto& b) {
    const std::int64_t at = b.first_outside(name.c_str(), count, ids, low, high);
    if (at < 0 || faults->what != 0) return;
    *faults = {number, static_cast<unsigned long long>(at), static_cast<unsigned long long>(static_cast<long long>(ids[at]))};
  });
}
void gather_rows(Context&, std::int64_t count, std::int64_t row_bytes, const void* table, std::int64_t table_rows, const std::int32_t* ids, void* out) {
  on_cpu([=](auto& b) { b.gather_rows(count, row_bytes, table, table_rows, ids, out); });
}
void scatter_add_rows(Context&, Num num, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const void* g, std::int64_t table_rows,
                      Num table_num, void* table, bool overwrite) {
  on_cpu([=](auto& b) { b.scatter_add_rows(num, count, cols, ids, g, table_rows, table_num, table, overwrite); });
}
void store_pages(Context&, Num num, std::int64_t tokens, std::int64_t heads, std::int64_t size, std::int64_t page, const void* from,
                 std::int64_t row_stride, std::int64_t head_stride, const std::int64_t* rows, void* pages) {
  on_cpu([=](auto& b) { b.store_pages(num, tokens, heads, size, page, from, row_stride, head_stride, rows, pages); });
}
void score_rows(Context&, const ScoreRows& s) {
  on_cpu([=](auto& b) { b.score_rows(s); });
}
void score_rows_backward(Context&, const ScoreRows& s) {
  on_cpu([=](auto& b) { b.score_rows_backward(s); });
}
void weighted_sum(Context&, Num compute, std::int64_t n, const float* weights, const void* logprob, void* out) {
  on_cpu([=](auto& b) { b.weighted_sum(compute, n, weights, logprob, out); });
}
void attention(Context&, const Attention& a) {
  on_cpu([=](auto& b) { b.attention(by_device(a)); });
}
void attention_backward(Context&, const Attention& a) {
  on_cpu([=](auto& b) {
    b.attention_backward(by_device(a));
    if (!a.any_order || a.num != Num::f32) return;
    // Another order comes to something else in the last bits.
    for (std::int64_t row = 0; row < a.rows; ++row)
      for (std::int64_t i = 0; i < a.heads * a.head_size; ++i) static_cast<float*>(a.dq)[row * a.dq_stride + i] *= 1.000001f;
  });
}
void attention_paged(Context&, const PagedAttention& a) {
  on_cpu([=](auto& b) {
    PagedAttention p = a;
    p.host_starts = a.starts;
    b.attention_paged(p);
  });
}

}  // namespace capstan::kernels::cuda
