// Muon: momentum orthogonalized by Newton-Schulz steps (Jordan et al. 2024) on hidden matrices; another rule, AdamW
// unless the recipe says otherwise, on all else.
#include <capstan/ops.h>
#include <capstan/optimizer.h>
#include <capstan/plugin.h>
#include <capstan/update.h>

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
  bool gated() const override { return rest_->gated(); }

  void update(const capstan::UpdateContext& context, std::span<capstan::UpdateItem> items) override {
    std::vector<capstan::UpdateItem> others;
    for (capstan::UpdateItem& item : items) {
      if (!is_hidden_matrix(*item.parameter)) {
        others.push_back(item);
        continue;
      }
      check(item);
      update_parameter(context, item);
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
    const DType value = item.value.dtype(), state = item.state[0].dtype();
    if ((value != DType::f32 && value != DType::f64) || (state != DType::f32 && state != value)) {
      capstan::fail(Fault::programming, where,
                    "expected f32 values with f32 state, or f64 values with f32 or f64 state: got " + std::string(name_of(value)) +
                        " and " + std::string(name_of(state)));
    }
  }

  /// Leading dimensions (experts) count matrices; the last two are rows and columns, cut into their parts.
  void update_parameter(const capstan::UpdateContext& context, const capstan::UpdateItem& item) const {
    const auto& dims = item.parameter->spec().dims;
    const Dims& shape = item.value.shape();
    const std::int64_t rows = shape[shape.size() - 2], columns = shape[shape.size() - 1];
    const std::int64_t matrices = rows * columns == 0 ? 0 : item.value.numel() / (rows * columns);
    const auto flat = [&](const Tensor& t) { return t.view(Dims{matrices * rows, columns}); };
    const Tensor value = flat(item.value), grad = flat(item.grad), buffer = flat(item.state[0]);
    for (std::int64_t m = 0; m < matrices; ++m) {
      for (const Piece& r : pieces_of(dims[dims.size() - 2])) {
        for (const Piece& c : pieces_of(dims[dims.size() - 1])) {
          const auto part = [&](const Tensor& t) { return t.narrow(0, m * rows + r.begin, r.length).narrow(1, c.begin, c.length); };
          update_matrix(context, item, part(value), part(grad), part(buffer));
        }
      }
    }
  }

  /// One matrix, whose rows may be apart.
  void update_matrix(const capstan::UpdateContext& context, const capstan::UpdateItem& item, const Tensor& value, const Tensor& grad,
                     const Tensor& buffer) const {
    const Tensor direction = capstan::update::momentum(grad, buffer, context.grad_scale, momentum_, nesterov_);
    const Tensor orthogonal = orthogonalize(direction, steps_);
    const double lr = lr_ * context.lr_scale, r = static_cast<double>(value.size(0)), c = static_cast<double>(value.size(1));
    const double shape_scale = match_rms_ ? 0.2 * std::sqrt(std::max(r, c)) : std::sqrt(std::max(1.0, r / c));
    const double keep = 1 - (decays(*item.parameter) ? lr * weight_decay_ : 0);
    capstan::update::axpby(keep, value, -lr * shape_scale, orthogonal, value);
  }

  /// Brings the singular values of x [rows, columns] near 1 and keeps its singular vectors:
  ///   x <- a x + (b A + c A^2) x,  A = x x^T, `steps` times after x <- x / |x|
  /// with the coefficients of Jordan et al. 2024, steepest at 0; values end between about 0.7 and 1.2.
  static Tensor orthogonalize(Tensor x, std::int64_t steps) {
    constexpr double a = 3.4445, b = -4.7750, c = 2.0315;
    const bool tall = x.size(0) > x.size(1);  // A is made on the short side
    if (tall) x = x.transposed(0, 1).contiguous();
    capstan::update::normalize(x, 1e-7);
    for (std::int64_t step = 0; step < steps; ++step) {
      const Tensor gram = capstan::ops::matmul(x, x.transposed(0, 1));
      const Tensor polynomial = capstan::ops::matmul(gram, gram);
      capstan::update::axpby(b, gram, c, polynomial, polynomial);
      const Tensor next = capstan::ops::matmul(polynomial, x);
      capstan::update::axpby(1, next, a, x, next);
      x = next;
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
