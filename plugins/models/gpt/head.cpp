// LmHead: see head.h.
#include "head.h"

#include <memory>

namespace capstan {

LmHead::LmHead(const std::string& norm, std::int64_t hidden, double norm_epsilon, bool bias, std::int64_t vocabulary,
               double init_std, Parameter* tied)
    : Head("head"), vocabulary_(vocabulary) {
  auto final_norm = std::make_shared<nn::Norm>("norm", norm, hidden, "hidden", norm_epsilon, bias && norm == "layer");
  norm_ = final_norm.get();
  adopt(std::move(final_norm));
  if (tied) {
    share(*tied);
    weight_ = tied;
  } else {
    ParameterSpec spec;
    spec.dims = {{{"vocab", vocabulary, 1, ""}}, {{"hidden", hidden, 1, ""}}};
    spec.role = Role::head;
    spec.init = {Init::Kind::normal, init_std};
    weight_ = &declare("weight", std::move(spec));
  }
}

Score LmHead::score(ForwardContext& context, const Tensor& targets, const Tensor* weights, Tensor* objective) {
  const Tensor x = (*norm_)(context, context.get("h"));
  return nn::score(context, x, *weight_, targets, weights, objective);
}

Tensor LmHead::logits(ForwardContext& context, const Tensor& rows) {
  const Tensor x = (*norm_)(context, nn::take_rows(context, context.get("h"), rows));
  const Tensor y = nn::logits(context, x, *weight_);
  return y.dtype() == DType::f64 ? y : ops::cast(y, DType::f32);
}

}  // namespace capstan
