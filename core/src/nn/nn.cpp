// Linear, Norm, Embedding.
#include <capstan/nn.h>

namespace capstan::nn {

Linear::Linear(std::string name, std::vector<Segment> out, std::vector<Segment> in, bool bias, double init_std) : Module(std::move(name)) {
  std::vector<Segment> bias_segments = out;
  ParameterSpec w;
  w.dims = {std::move(out), std::move(in)};
  w.role = Role::matrix;
  w.init = {Init::Kind::normal, init_std};
  weight_ = &declare("weight", std::move(w));
  if (bias) {
    ParameterSpec b;
    b.dims = {std::move(bias_segments)};
    b.role = Role::bias;
    bias_ = &declare("bias", std::move(b));
  }
}
Linear::~Linear() = default;

Tensor Linear::apply(ForwardContext& context, const Tensor& x, const Tensor& residual) const {
  return ops::linear(x, context.use(*weight_), bias_ != nullptr ? context.use(*bias_) : Tensor(), residual);
}

Tensor Linear::operator()(ForwardContext& context, const Tensor& x) const { return apply(context, x, Tensor()); }

Tensor Linear::add_to(ForwardContext& context, const Tensor& x, const Tensor& residual) const { return apply(context, x, residual); }

std::vector<Tensor> Linear::parts(ForwardContext& context, const Tensor& x) const {
  std::vector<std::int64_t> widths;
  for (const Segment& s : weight_->spec().dims[0]) widths.push_back(s.extent());
  return ops::split((*this)(context, x), widths);
}

Norm::Norm(std::string name, const std::string& kind, std::int64_t width, std::string axis, double epsilon, bool bias)
    : Module(std::move(name)), epsilon_(epsilon), rms_(kind == "rms") {
  if (kind != "rms" && kind != "layer") fail(Fault::programming, this->name(), "norm: expected rms or layer, got '" + kind + "'");
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

Embedding::Embedding(std::string name, std::int64_t rows, std::string axis, std::int64_t width, double init_std) : Module(std::move(name)) {
  ParameterSpec w;
  w.dims = {{Segment{std::move(axis), rows}}, {Segment{"hidden", width}}};
  w.role = Role::embedding;
  w.init = {Init::Kind::normal, init_std};
  weight_ = &declare("weight", std::move(w));
}
Embedding::~Embedding() = default;

Tensor Embedding::operator()(ForwardContext& context, const Tensor& ids) const { return ops::embedding(context.use(*weight_), ids); }

Tensor stream_rows(const ForwardContext&, const Tensor& all) { return all; }

Tensor take_rows(ForwardContext&, const Tensor& h, const Tensor& rows) { return ops::gather(h, rows); }

Tensor dropout(ForwardContext& context, const Tensor& x, double p, std::string_view name) {
  if (p == 0 || !context.training) return x;
  return ops::dropout(x, p, context.random(name), stream_rows(context, context.batch.space().sample_ids));
}

Tensor attention(ForwardContext& context, const Tensor& q, const Tensor& k, const Tensor& v, const ops::AttentionShape& shape) {
  return ops::attention(q, k, v, context.batch.space(), shape);
}

Score score(ForwardContext& context, const Tensor& x, const Parameter& weight, const Tensor& targets, const Tensor* weights, Tensor* objective) {
  const ops::HeadScore s = ops::linear_cross_entropy(x, context.use(weight), targets, weights, context.grad);
  if (objective != nullptr) *objective = s.objective;
  return {s.logprob, s.logsumexp, s.entropy};
}

Tensor logits(ForwardContext& context, const Tensor& x, const Parameter& weight) { return ops::linear(x, context.use(weight)); }

}  // namespace capstan::nn
