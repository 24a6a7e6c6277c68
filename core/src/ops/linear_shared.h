// defines: SharedRows, linear_of_shared_rows(): linear() of rows that lie on several ranks.
#pragma once
#include <capstan/tensor.h>

#include <functional>

namespace capstan::ops {

/// How this rank's rows become all rows, and the transpose of that.
struct SharedRows {
  std::function<Tensor(const Tensor& mine)> gather;
  std::function<Tensor(const Tensor& all)> scatter;
};

/// linear(rows.gather(x), weight, bias, residual) with gradients, keeping x alone: all rows are gathered again for the
/// weight's gradient, since kept they would take as many times the memory as there are ranks.
Tensor linear_of_shared_rows(const Tensor& x, const SharedRows& rows, const Tensor& weight, const Tensor& bias, const Tensor& residual);

/// The same with GELU: gelu(rows.gather(x) W^T + bias).
Tensor linear_gelu_of_shared_rows(const Tensor& x, const SharedRows& rows, const Tensor& weight, const Tensor& bias);

}  // namespace capstan::ops
