// Muon: momentum orthogonalized by Newton-Schulz steps (Jordan et al. 2024) on hidden matrices; another rule, AdamW
// unless the recipe says otherwise, on all else.
#include <capstan/ops.h>
#include <capstan/optimizer.h>
#include <capstan/plugin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

using capstan::Dims;
using capstan::DType;
using capstan::Fault;
using capstan::Segment;
using capstan::Tensor;

/// A run of one dimension that is a matrix of its own.
struct Piece { std::int64_t begin, length; };

/// Named parts (q, k, v; gate, up) are matrices apart, fused for speed only; what has no part name is one matrix.
std::vector<Piece> pieces_of(const std::vector<Segment>& segments) {
  std::vector<Piece> pieces;
  std::string previous;
  std::int64_t at = 0;
  for (const Segment& segment : segments) {
    if (pieces.empty() || segment.part != previous) pieces.push_back({at, 0});
    pieces.back().length += segment.extent();
    at += segment.extent();
    previous = segment.part;
  }
  return pieces;
}

/// f(i) for each row of a matrix of that size. Threads take whole rows, so nothing depends on their number.
template <class F>
void for_rows(std::int64_t rows, std::int64_t columns, F f) {
#pragma omp parallel for schedule(static) if (rows * columns > (1 << 14))
  for (std::int64_t i = 0; i < rows; ++i) f(i);
}

class Muon final : public capstan::Optimizer {
 public:
  Muon(const capstan::Options& options, std::shared_ptr<capstan::Optimizer> rest)
      : lr_(options.number("lr")), momentum_(options.number("momentum")), weight_decay_(options.number("weight_decay")),
        steps_(options.integer("steps")), nesterov_(options.flag("nesterov")), match_rms_(options.text("scale") == "rms"),
        rest_(std::move(rest)) {}

  std::vector<capstan::StateDecl> state_of(const capstan::Parameter& parameter) const override {
    if (!is_hidden_matrix(parameter)) return rest_->state_of(parameter);
    return {{"momentum", DType::f32}};
  }
  capstan::Atomicity atomicity(const capstan::Parameter& parameter) const override {
    return is_hidden_matrix(parameter) ? capstan::Atomicity::tensor : rest_->atomicity(parameter);
  }
  double peak_lr() const override { return lr_; }

  void update(const capstan::UpdateContext& context, std::span<capstan::UpdateItem> items) override {
    std::vector<capstan::UpdateItem> others;
    for (capstan::UpdateItem& item : items) {
      if (!is_hidden_matrix(*item.parameter)) {
        others.push_back(item);
        continue;
      }
      check(item);
      const DType value = item.value.dtype(), state = item.state[0].dtype();
      if (value == DType::f32 && state == DType::f32) {
        update_parameter<float, float>(context, item);
      } else if (value == DType::f64 && state == DType::f64) {
        update_parameter<double, double>(context, item);
      } else if (value == DType::f64 && state == DType::f32) {
        update_parameter<double, float>(context, item);
      } else {
        capstan::fail(Fault::programming, "muon, " + item.parameter->name(),
                      "expected f32 values with f32 state, or f64 values with f32 or f64 state: got " +
                          std::string(name_of(value)) + " and " + std::string(name_of(state)));
      }
    }
    if (!others.empty()) rest_->update(context, others);
  }

 private:
  static void check(const capstan::UpdateItem& item) {
    const std::string where = "muon, " + item.parameter->name();
    if (item.state.size() != 1) {
      capstan::fail(Fault::programming, where, "expected state momentum: got " + std::to_string(item.state.size()) + " tensors");
    }
    for (const Tensor* t : {&item.value, &item.grad, &item.state[0]}) {
      if (!t->defined() || !t->is_contiguous() || !(t->shape() == item.parameter->shape())) {
        capstan::fail(Fault::programming, where,
                      "an orthogonalized matrix must be whole: expected contiguous value, gradient and momentum of shape " +
                          to_string(item.parameter->shape()) + ", got value " + to_string(item.value.shape()));
      }
    }
    if (item.grad.dtype() != item.value.dtype()) {
      capstan::fail(Fault::programming, where, "the gradient must have the value's dtype");
    }
  }

  /// Leading dimensions (experts) count matrices; the last two are rows and columns, cut into their parts.
  template <class T, class S>
  void update_parameter(const capstan::UpdateContext& context, const capstan::UpdateItem& item) const {
    const auto& dims = item.parameter->spec().dims;
    const Dims& shape = item.value.shape();
    const std::int64_t rows = shape[shape.size() - 2], columns = shape[shape.size() - 1];
    const std::int64_t matrices = rows * columns == 0 ? 0 : item.value.numel() / (rows * columns);
    for (std::int64_t m = 0; m < matrices; ++m) {
      for (const Piece& r : pieces_of(dims[dims.size() - 2])) {
        for (const Piece& c : pieces_of(dims[dims.size() - 1])) {
          update_matrix<T, S>(context, item, (m * rows + r.begin) * columns + c.begin, r.length, c.length, columns);
        }
      }
    }
  }

  /// The matrix of `rows` x `columns` at element `offset`, whose rows are `stride` apart.
  template <class T, class S>
  void update_matrix(const capstan::UpdateContext& context, const capstan::UpdateItem& item, std::int64_t offset,
                     std::int64_t rows, std::int64_t columns, std::int64_t stride) const {
    T* const value = item.value.data<T>() + offset;
    const T* const grad = item.grad.data<T>() + offset;
    S* const buffer = item.state[0].data<S>() + offset;
    const T grad_scale = static_cast<T>(context.grad_scale), mu = static_cast<T>(momentum_);
    const bool nesterov = nesterov_;

    Tensor update = Tensor::empty({rows, columns}, capstan::dtype_of<T>, item.value.device());
    T* const direction = update.data<T>();
    for_rows(rows, columns, [=](std::int64_t i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        const T g = grad[i * stride + j] * grad_scale;
        const T b = mu * static_cast<T>(buffer[i * stride + j]) + (1 - mu) * g;
        buffer[i * stride + j] = static_cast<S>(b);
        direction[i * columns + j] = nesterov ? (1 - mu) * g + mu * b : b;
      }
    });

    const Tensor orthogonal = orthogonalize<T>(std::move(update), steps_);
    const T* const o = orthogonal.data<T>();
    const double lr = lr_ * context.lr_scale, r = static_cast<double>(rows), c = static_cast<double>(columns);
    const double shape_scale = match_rms_ ? 0.2 * std::sqrt(std::max(r, c)) : std::sqrt(std::max(1.0, r / c));
    const T keep = static_cast<T>(1 - (decays(*item.parameter) ? lr * weight_decay_ : 0));
    const T rate = static_cast<T>(lr * shape_scale);
    for_rows(rows, columns, [=](std::int64_t i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        value[i * stride + j] = keep * value[i * stride + j] - rate * o[i * columns + j];
      }
    });
  }

  /// Brings the singular values of x [rows, columns] near 1 and keeps its singular vectors:
  ///   x <- a x + (b A + c A^2) x,  A = x x^T, `steps` times after x <- x / |x|
  /// with the coefficients of Jordan et al. 2024, steepest at 0; values end between about 0.7 and 1.2.
  template <class T>
  static Tensor orthogonalize(Tensor x, std::int64_t steps) {
    const T a = static_cast<T>(3.4445), b = static_cast<T>(-4.7750), c = static_cast<T>(2.0315);
    const bool tall = x.size(0) > x.size(1);  // A is made on the short side
    if (tall) x = x.transposed(0, 1).contiguous();
    const std::int64_t rows = x.size(0), columns = x.size(1);

    // Row sums first, then the rows in order: the norm's bits do not depend on the threads.
    std::vector<double> row_squares(static_cast<std::size_t>(rows));
    T* values = x.data<T>();
    for_rows(rows, columns, [&](std::int64_t i) {
      double sum = 0;
      for (std::int64_t j = 0; j < columns; ++j) sum += static_cast<double>(values[i * columns + j]) * values[i * columns + j];
      row_squares[static_cast<std::size_t>(i)] = sum;
    });
    double squares = 0;
    for (const double s : row_squares) squares += s;
    const T scale = static_cast<T>(1 / std::max(std::sqrt(squares), 1e-7));
    for_rows(rows, columns, [=](std::int64_t i) {
      for (std::int64_t j = 0; j < columns; ++j) values[i * columns + j] *= scale;
    });

    for (std::int64_t step = 0; step < steps; ++step) {
      const Tensor gram = capstan::ops::matmul(x, x.transposed(0, 1));
      Tensor polynomial = capstan::ops::matmul(gram, gram);
      const T* const g = gram.data<T>();
      T* const p = polynomial.data<T>();
      for_rows(rows, rows, [=](std::int64_t i) {
        for (std::int64_t j = 0; j < rows; ++j) p[i * rows + j] = b * g[i * rows + j] + c * p[i * rows + j];
      });
      Tensor next = capstan::ops::matmul(polynomial, x);
      T* const n = next.data<T>();
      const T* const old = x.data<T>();
      for_rows(rows, columns, [=](std::int64_t i) {
        for (std::int64_t j = 0; j < columns; ++j) n[i * columns + j] += a * old[i * columns + j];
      });
      x = std::move(next);
    }
    return tall ? x.transposed(0, 1).contiguous() : x;
  }

  double lr_, momentum_, weight_decay_;
  std::int64_t steps_;
  bool nesterov_, match_rms_;
  std::shared_ptr<capstan::Optimizer> rest_;
};

}  // namespace

CAPSTAN_PLUGIN("optimizer", "muon", "1.0.0") {
  capstan::Schema schema;
  schema.number("lr", 0.02, "peak learning rate of hidden matrices").above(0);
  schema.number("momentum", 0.95, "share of the gradient's running mean that each step keeps").range(0, 0.999999);
  schema.flag("nesterov", true, "look ahead along the momentum");
  schema.number("weight_decay", 0.1, "pull towards zero per unit of learning rate").at_least(0);
  schema.integer("steps", 5, "Newton-Schulz steps").range(1, 20);
  schema.text("scale", "shape", "size of an update: shape is sqrt(max(1, rows / columns)); rms is 0.2 sqrt(max(rows, columns)), "
              "as large as AdamW's, so that its learning rate serves here too").one_of({"shape", "rms"});
  schema.plugin("optimizer", "rest", "adamw", "the rule of embeddings, heads, vectors and all that is no hidden matrix");
  registrar.add("optimizer", "muon", schema, [](const capstan::Options& options, capstan::Registrar& plugins) {
    auto rest = plugins.make_as<capstan::Optimizer>(options.plugin("rest"));
    return capstan::as_interface<capstan::Optimizer>(std::make_shared<Muon>(options, std::move(rest)));
  });
}
