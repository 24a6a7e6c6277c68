// The layer plugin "mlp": the position-wise feed-forward layer, gated (SwiGLU, Shazeer 2020) or plain (GELU).
#include <capstan/nn.h>

#include <string>
#include <vector>

namespace capstan {
namespace {

/// h + down(swiglu(gate_up(norm(h)))) or h + down(gelu(up(norm(h)))).
class Mlp : public Layer {
 public:
  Mlp(const LayerContext& c, bool gated, std::int64_t width) : Layer(c.name), gated_(gated), dropout_(c.dropout) {
    norm_ = &child<nn::Norm>("norm", c.norm, c.hidden, "hidden", c.norm_epsilon, c.bias && c.norm == "layer");
    const std::vector<Segment> hidden{{"hidden", c.hidden, 1, ""}};
    if (gated_) {
      up_ = &child<nn::Linear>("gate_up", std::vector<Segment>{{"mlp", width, 1, "gate"}, {"mlp", width, 1, "up"}}, hidden,
                               c.bias, c.init_std);
    } else {
      up_ = &child<nn::Linear>("up", std::vector<Segment>{{"mlp", width, 1, ""}}, hidden, c.bias, c.init_std);
    }
    down_ = &child<nn::Linear>("down", hidden, std::vector<Segment>{{"mlp", width, 1, ""}}, c.bias, c.residual_init_std);
  }

  Tensor apply(ForwardContext& context, const Tensor& x) override {
    const auto [h, in] = norm_->with_sum(context, x);
    const Tensor inner = gated_ ? ops::swiglu((*up_)(context, in)) : up_->gelu(context, in);
    if (dropout_ == 0 || !context.training) return down_->add_to(context, inner, h);
    return ops::add(h, nn::dropout(context, (*down_)(context, inner), dropout_, name() + "/dropout"));
  }

 private:
  bool gated_;
  double dropout_;
  const nn::Norm* norm_ = nullptr;
  const nn::Linear *up_ = nullptr, *down_ = nullptr;
};

class MlpMaker : public LayerMaker {
 public:
  explicit MlpMaker(const Options& o) : options_(o) {}

  std::shared_ptr<Layer> make(const LayerContext& context) override {
    const bool gated = options_.text("activation") == "swiglu";
    std::int64_t width = options_.integer("ffn");
    if (width == 0) {
      // Gated: two thirds of 4 * hidden hold as many parameters as the plain form's two matrices; whole cache lines.
      width = gated ? (8 * context.hidden / 3 + 63) / 64 * 64 : 4 * context.hidden;
    }
    return std::make_shared<Mlp>(context, gated, width);
  }

 private:
  Options options_;
};

}  // namespace
}  // namespace capstan

CAPSTAN_PLUGIN("layer", "mlp", "1.0.0") {
  capstan::Schema schema;
  schema.text("activation", "swiglu", "what stands between the two projections").one_of({"swiglu", "gelu"});
  schema.integer("ffn", 0, "inner width; 0: 4 * width for gelu, 8/3 * width up to a multiple of 64 for swiglu").range(0, 1 << 22);
  registrar.add("layer", "mlp", schema, [](const capstan::Options& o, capstan::Registrar&) {
    return capstan::as_interface<capstan::LayerMaker>(std::make_shared<capstan::MlpMaker>(o));
  });
}
