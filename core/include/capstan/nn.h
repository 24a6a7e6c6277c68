// defines: Linear, Norm, Embedding: the modules that models are made of; attention, dropout, score, logits: what a model
// calls instead of the ops of that name, so that it runs on any mesh.
//
// Rows. The residual stream is cut by rows over the tensor ranks: of a batch's T rows each rank holds T / t, its "stream
// rows". Norms, residuals and dropout work on them. A Linear whose out dimension lies on an axis that the mesh cuts
// (heads, kv_heads, mlp, vocab) takes stream rows and gives all T rows of its part of the width; one whose in dimension is
// cut takes those and gives stream rows. So a layer is `down(f(up(norm(h))))` with any f that treats rows, or sequences, or
// heads alone; widths come from the tensors, never from options. With one tensor rank stream rows are all rows.
#pragma once
#include <capstan/model.h>
#include <capstan/ops.h>

#include <string_view>
#include <vector>

namespace capstan::nn {

/// y = x W^T + b. Weight [out, in], by segments so that fused projections keep their names. Multiplies as the forward's
/// LinearPrecision says, where both dimensions (of this rank's part) allow it.
class CAPSTAN_API Linear : public Module {
 public:
  Linear(std::string name, std::vector<Segment> out, std::vector<Segment> in, bool bias, double init_std);
  ~Linear() override;
  Tensor operator()(ForwardContext& context, const Tensor& x) const;
  /// y = residual + x W^T + b.
  Tensor add_to(ForwardContext& context, const Tensor& x, const Tensor& residual) const;
  /// gelu(x W^T + b): the activation is taken as the product is stored.
  Tensor gelu(ForwardContext& context, const Tensor& x) const;
  /// y in pieces, one for each segment of the out dimension, as wide as this rank has of it. Views of one tensor.
  std::vector<Tensor> parts(ForwardContext& context, const Tensor& x) const;
  Parameter& weight() const { return *weight_; }

 private:
  Tensor apply(ForwardContext& context, const Tensor& x, const Tensor& residual, bool gelu) const;
  Parameter* weight_;
  Parameter* bias_ = nullptr;
};

/// RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last dimension.
class CAPSTAN_API Norm : public Module {
 public:
  Norm(std::string name, const std::string& kind, std::int64_t width, std::string axis, double epsilon, bool bias);
  ~Norm() override;
  Tensor operator()(ForwardContext& context, const Tensor& x) const;
  /// x (+ residual) and its norm, for a layer that goes on with both: ops::add_rms_norm, ops::add_layer_norm.
  ops::NormOfSum with_sum(ForwardContext& context, const Tensor& x, const Tensor& residual = {}) const;

 private:
  Parameter* weight_;
  Parameter* bias_ = nullptr;
  double epsilon_;
  bool rms_;
};

/// Rows of a table [vocabulary, width]: ids of all T rows -> stream rows.
class CAPSTAN_API Embedding : public Module {
 public:
  Embedding(std::string name, std::int64_t rows, std::string axis, std::int64_t width, double init_std);
  ~Embedding() override;
  Tensor operator()(ForwardContext& context, const Tensor& ids) const;
  Parameter& weight() const { return *weight_; }

 private:
  Parameter* weight_;
};

/// This rank's rows of something that has all T of them (a stream of the batch, positions). A view, without gradient.
CAPSTAN_API Tensor stream_rows(const ForwardContext& context, const Tensor& all);

/// Rows of the residual stream `h` by i32 ids of [0, T), on every tensor rank: [n, hidden].
CAPSTAN_API Tensor take_rows(ForwardContext& context, const Tensor& h, const Tensor& rows);

/// ops::dropout of stream rows x [rows, C] under the random stream `name`; x itself outside of training.
CAPSTAN_API Tensor dropout(ForwardContext& context, const Tensor& x, double p, std::string_view name);

/// ops::attention over the batch's sequences, wherever their keys are. q [T, heads * D], k and v [T, kv_heads * D] with the
/// heads that this rank has: of `shape` only head_size, scale and window count.
CAPSTAN_API Tensor attention(ForwardContext& context, const Tensor& q, const Tensor& k, const Tensor& v, const ops::AttentionShape& shape);

/// Head::score of stream rows x [rows, C] under softmax(x W^T), W [V, C] on the axis "vocab".
CAPSTAN_API Score score(ForwardContext& context, const Tensor& x, const Parameter& weight, const Tensor& targets, const Tensor* weights,
                        Tensor* objective);

/// x W^T [n, V] of rows x [n, C] that every tensor rank has (take_rows), in x's element type.
CAPSTAN_API Tensor logits(ForwardContext& context, const Tensor& x, const Parameter& weight);

}  // namespace capstan::nn
