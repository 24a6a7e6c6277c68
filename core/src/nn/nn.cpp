// Linear, Norm, Embedding: what they compute and, where tensor ranks hold pieces of their weights, what they communicate.
#include "nn/local.h"
#include "ops/linear_fp8.h"
#include "ops/linear_shared.h"
#include "parallel/vocabulary.h"

#include <capstan/nn.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace capstan::nn {

Linear::Linear(std::string name, std::vector<Segment> out, std::vector<Segment> in, bool bias, double init_std)
    : Module(std::move(name)) {
  std::vector<Segment> bias_segments = out;
  ParameterSpec w;
  w.dims = {std::move(out), std::move(in)};
  w.role = Role::matrix;
  w.init = {Init::Kind::normal, init_std};
  w.linear = true;
  weight_ = &declare("weight", std::move(w));
  if (bias) {
    ParameterSpec b;
    b.dims = {std::move(bias_segments)};
    b.role = Role::bias;
    bias_ = &declare("bias", std::move(b));
  }
}
Linear::~Linear() = default;

Tensor Linear::apply(ForwardContext& context, const Tensor& x, const Tensor& residual, bool gelu) const {
  const Tensor w = local_values(context, *weight_), b = bias_ != nullptr ? local_values(context, *bias_) : Tensor();
  const bool narrow = ops::fits_fp8(context.linear, w.shape());
  Communicator* comm = cut_over(context, *weight_);
  const auto linear = [&](const ops::SharedRows& rows, const Tensor& bias, const Tensor& add) {
    return narrow ? ops::linear_fp8(x, rows, *weight_, w, bias, add, context.linear) : ops::linear_of_shared_rows(x, rows, w, bias, add);
  };
  const auto product = [&](const ops::SharedRows& rows, const Tensor& bias, const Tensor& add) {
    if (!gelu) return linear(rows, bias, add);
    return narrow ? ops::gelu(linear(rows, bias, {})) : ops::linear_gelu_of_shared_rows(x, rows, w, bias);
  };
  if (comm == nullptr) return product({}, b, residual);
  const TensorPlacement& placed = *weight_->placement();
  if (placed.dim == 0) {
    const ops::SharedRows rows{[comm](const Tensor& mine) { return parallel::gather_rows(mine, *comm); },
                               [comm](const Tensor& all) { return parallel::reduce_scatter_rows(all, *comm); }};
    return product(rows, b, residual);
  }
  const int ways = placed.runs[0].ways;
  if (std::any_of(placed.runs.begin(), placed.runs.end(), [&](const Run& r) { return r.ways != ways; }))
    fail(Fault::input, weight_->name(),
         "the segments of its in dimension are cut differently often over " + std::to_string(placed.size) +
             " tensor ranks: expected counts with the same common divisors; train with another tensor size");
  Tensor y = parallel::reduce_scatter_rows(linear({}, {}, {}), *comm);
  // Where nothing divides the axis, several ranks computed the same part: each counts for its share of it.
  if (ways != placed.size) y = ops::scale(y, static_cast<double>(ways) / placed.size);
  if (b.defined()) y = ops::add(y, b);
  if (gelu) y = ops::gelu(y);
  return residual.defined() ? ops::add(residual, y) : y;
}

Tensor Linear::operator()(ForwardContext& context, const Tensor& x) const { return apply(context, x, Tensor(), false); }

Tensor Linear::gelu(ForwardContext& context, const Tensor& x) const { return apply(context, x, Tensor(), true); }

Tensor Linear::add_to(ForwardContext& context, const Tensor& x, const Tensor& residual) const {
  return apply(context, x, residual, false);
}

std::vector<Tensor> Linear::parts(ForwardContext& context, const Tensor& x) const {
  const std::vector<Segment>& segments = weight_->spec().dims[0];
  std::vector<std::int64_t> widths;
  for (std::size_t i = 0; i < segments.size(); ++i)
    widths.push_back(weight_->cut() && weight_->placement()->dim == 0 ? weight_->placement()->runs[i].length
                                                                      : segments[i].extent());
  return ops::split((*this)(context, x), widths);
}

Norm::Norm(std::string name, const std::string& kind, std::int64_t width, std::string axis, double epsilon, bool bias)
    : Module(std::move(name)), epsilon_(epsilon), rms_(kind == "rms") {
  if (kind != "rms" && kind != "layer")
    fail(Fault::programming, this->name(), "norm: expected rms or layer, got '" + kind + "'");
  ParameterSpec w;
  w.dims = {{Segment{axis, width}}};
  w.role = Role::vector;
  w.init = {Init::Kind::ones, 0};
  weight_ = &declare("weight", w);
  if (bias && !rms_) {
    w.role = Role::bias;
    w.init = {Init::Kind::zeros, 0};
    bias_ = &declare("bias", std::move(w));
  }
}
Norm::~Norm() = default;

Tensor Norm::operator()(ForwardContext& context, const Tensor& x) const {
  if (rms_) return ops::rms_norm(x, context.use(*weight_), epsilon_);
  return ops::layer_norm(x, context.use(*weight_), bias_ != nullptr ? context.use(*bias_) : Tensor(), epsilon_);
}

ops::NormOfSum Norm::with_sum(ForwardContext& context, const Tensor& x, const Tensor& residual) const {
  if (rms_) return ops::add_rms_norm(x, residual, context.use(*weight_), epsilon_);
  return ops::add_layer_norm(x, residual, context.use(*weight_), bias_ != nullptr ? context.use(*bias_) : Tensor(), epsilon_);
}

Embedding::Embedding(std::string name, std::int64_t rows, std::string axis, std::int64_t width, double init_std)
    : Module(std::move(name)) {
  ParameterSpec w;
  w.dims = {{Segment{std::move(axis), rows}}, {Segment{"hidden", width}}};
  w.role = Role::embedding;
  w.init = {Init::Kind::normal, init_std};
  weight_ = &declare("weight", std::move(w));
}
Embedding::~Embedding() = default;

Tensor Embedding::operator()(ForwardContext& context, const Tensor& ids) const {
  const Tensor table = local_values(context, *weight_);
  if (Communicator* comm = cut_over(context, *weight_)) {
    const Run& rows = weight_->placement()->runs[0];
    return parallel::vocab_embedding(table, ids, rows.begin, weight_->shape()[0], *comm);
  }
  return ops::embedding(table, stream_rows(context, ids));
}

}  // namespace capstan::nn
