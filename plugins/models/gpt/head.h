// defines: LmHead, the final norm and the projection onto the vocabulary.
#pragma once
#include <capstan/nn.h>

#include <string>

namespace capstan {

/// Distributions over the next token. The final norm belongs to it, so that logits() of some rows and score() of all
/// come from the same steps: a row's bits do not depend on which other rows are asked for.
class LmHead : public Head {
 public:
  /// `tied` null: it has a weight "head.weight" of its own [vocabulary, hidden].
  LmHead(const std::string& norm, std::int64_t hidden, double norm_epsilon, bool bias, std::int64_t vocabulary,
         double init_std, Parameter* tied);
  Score score(ForwardContext& context, const Tensor& targets, const Tensor* weights, Tensor* objective) override;
  Tensor logits(ForwardContext& context, const Tensor& rows) override;
  std::int64_t vocabulary() const override { return vocabulary_; }

 private:
  std::int64_t vocabulary_;
  const nn::Norm* norm_;
  Parameter* weight_;
};

}  // namespace capstan
