// defines: element by element kernels, copies, RoPE, dropout, random numbers and the optimizers' arithmetic over CUDA.
// Arguments as in kernels/backend.h.
#pragma once
#include <kernels/cuda/context.h>

namespace capstan::kernels::cuda {

void copy(Context& ctx, const Strided& shape, Num to_num, void* to, Num from_num, const void* from);
void fill(Context& ctx, const Strided& shape, Num num, void* to, double value);

void binary(Context& ctx, BinaryOp op, const Broadcast& shape, Num num, const void* a, const void* b, void* out);
void unary(Context& ctx, UnaryOp op, Num num, std::int64_t n, const void* x, void* y);
void unary_backward(Context& ctx, UnaryOp op, Num num, std::int64_t n, const void* saved, const void* g, void* dx);
void scale(Context& ctx, Num num, std::int64_t n, const void* x, double factor, double shift, void* y);
void add(Context& ctx, Num num, std::int64_t n, const void* x, const void* y, void* out);
void swiglu(Context& ctx, Num num, std::int64_t rows, std::int64_t width, const void* gate_up, void* y);
void swiglu_backward(Context& ctx, Num num, std::int64_t rows, std::int64_t width, const void* gate_up, const void* g, void* dx);
void dropout(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, const std::int64_t* sample_ids, double p,
             std::uint64_t key, std::uint64_t step, void* y);
void rope_table(Context& ctx, Num num, std::int64_t rows, std::int64_t size, double theta, const std::int32_t* positions, void* table);
void rope(Context& ctx, Num num, std::int64_t rows, std::int64_t heads, std::int64_t size, const void* x, std::int64_t stride,
          const void* table, void* y, bool inverse);
void local_ids(Context& ctx, std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, Num num,
               void* mine, void* others);
void random(Context& ctx, Num num, const RandomFill& fill, std::int64_t n, void* to);

void adamw(Context& ctx, const AdamWStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* m, void* v);
void sgd(Context& ctx, const SgdStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* buffer);
void momentum(Context& ctx, const MomentumStep& s, Num num, Num state_num, std::int64_t rows, std::int64_t cols, std::int64_t stride,
              const void* grad, void* buffer, void* direction);
void axpby(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, double a, const void* x, std::int64_t x_stride, double b,
           const void* y, std::int64_t y_stride, void* out, std::int64_t out_stride);

}  // namespace capstan::kernels::cuda
