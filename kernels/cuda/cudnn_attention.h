// defines: CudnnAttention: attention forward and backward as cuDNN graphs (composite form: products, masks, softmax),
// with plans kept by shape.
#pragma once
#include <kernels/cuda/context.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace capstan::kernels::cuda {

/// What a plan is made for. Sequences of one length are a plain batch; others are ragged: `batch` and `length` are then
/// rounded up, so that few plans serve many batches, and the true lengths are read on the GPU.
struct CudnnShape {
  std::int64_t batch = 0, length = 0, heads = 0, kv_heads = 0, head_size = 0, rows = 0, window = 0;
  std::int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0, dout_stride = 0, dq_stride = 0, dkv_stride = 0;
  bool ragged = false, backward = false, stats = false;
  bool ordered = false;  ///< backward: sums in one order, at the price of a workspace of batch * heads * length^2
  bool padded = false;   ///< backward of a plain batch: what lies past a sequence's end in the last tile is masked by the graph
  auto operator<=>(const CudnnShape&) const = default;
};
/// Plain host code, tested without a GPU.
CudnnShape cudnn_shape(const Attention& a, bool backward, bool ordered);
/// Whether the backward of this shape must be `padded`: up to 9.15.0 cuDNN does not mask the last tile by itself.
bool cudnn_wants_padding(const CudnnShape& shape, std::int64_t version);
/// Empty when cuDNN may be asked, else why not.
std::string cudnn_refuses(const Attention& a, bool backward, int capability);
/// Batches and key/value heads of one run of a backward over a plain batch; both divide the whole. Heads 0: none.
struct CudnnChunk { std::int64_t batch = 0, kv_heads = 0; };
/// Of an ordered backward, so that its workspace stays within `bytes`, by what engines are known to want: what a plan wants is only
/// known once it is made. None when not even one head fits.
CudnnChunk cudnn_ordered_chunk(const CudnnShape& shape, std::int64_t bytes);
/// The first for which fits() says yes of `largest` and ever smaller pieces, or none.
CudnnChunk cudnn_fit(const CudnnShape& shape, CudnnChunk largest, const std::function<bool(const CudnnChunk&)>& fits);

class CudnnAttention {
 public:
  /// Throws std::runtime_error when the library is missing or does not start.
  explicit CudnnAttention(Context& ctx);
  ~CudnnAttention();
  /// False when no engine takes the shape with a plan that works in at most the limit, in bytes: nothing has run (why() says
  /// more). A backward's sums in f32, of the size of its gradients, come on top.
  bool forward(Context& ctx, const Attention& a, std::int64_t workspace_limit);
  bool backward(Context& ctx, const Attention& a, bool ordered, std::int64_t workspace_limit);
  const std::string& why() const { return why_; }
  std::int64_t version() const;
  std::int64_t plans() const;
  /// Of the last run, bytes.
  std::int64_t last_workspace() const { return last_workspace_; }

  /// Builds both graphs of a shape and finalizes their operation graphs: what can be checked without a GPU.
  static void check_graphs(const CudnnShape& shape);
  /// The operations of one of them, by name.
  static std::vector<std::string> operations(const CudnnShape& shape);

 private:
  struct State;
  std::unique_ptr<State> state_;
  std::string why_;
  std::int64_t last_workspace_ = 0;
};

/// Offsets and lengths of ragged sequences: offsets[k][i] = starts[min(i, sequences)] * strides[k] for i <= batch, arrays
/// ragged_pitch(batch) apart; then lengths[batch], 0 past the last sequence.
struct RaggedStrides { std::int64_t count = 0, strides[8] = {}; };
/// Elements: each array begins on the 16 bytes that the graphs promise.
constexpr std::int64_t ragged_pitch(std::int64_t batch) { return (batch + 1 + 3) / 4 * 4; }
void ragged_offsets(Context& ctx, const std::int32_t* starts, std::int64_t sequences, std::int64_t batch, const RaggedStrides& strides, std::int32_t* to);

}  // namespace capstan::kernels::cuda
