// defines: Linear, Norm, Embedding: the modules that models are made of.
#pragma once
#include <capstan/model.h>
#include <capstan/ops.h>

namespace capstan::nn {

/// y = x W^T + b. Weight [out, in], by segments so that fused projections keep their names.
class CAPSTAN_API Linear : public Module {
 public:
  Linear(std::string name, std::vector<Segment> out, std::vector<Segment> in, bool bias, double init_std);
  ~Linear() override;
  Tensor operator()(ForwardContext& context, const Tensor& x) const;
  /// y = residual + x W^T + b.
  Tensor add_to(ForwardContext& context, const Tensor& x, const Tensor& residual) const;
  Parameter& weight() const { return *weight_; }

 private:
  Parameter* weight_;
  Parameter* bias_ = nullptr;
};

/// RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last dimension.
class CAPSTAN_API Norm : public Module {
 public:
  Norm(std::string name, const std::string& kind, std::int64_t width, std::string axis, double epsilon, bool bias);
  ~Norm() override;
  Tensor operator()(ForwardContext& context, const Tensor& x) const;

 private:
  Parameter* weight_;
  Parameter* bias_ = nullptr;
  double epsilon_;
  bool rms_;
};

/// Rows of a table [vocabulary, width].
class CAPSTAN_API Embedding : public Module {
 public:
  Embedding(std::string name, std::int64_t rows, std::string axis, std::int64_t width, double init_std);
  ~Embedding() override;
  Tensor operator()(ForwardContext& context, const Tensor& ids) const;
  Parameter& weight() const { return *weight_; }

 private:
  Parameter* weight_;
};

}  // namespace capstan::nn
