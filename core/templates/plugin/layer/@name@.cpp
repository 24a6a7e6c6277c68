// The layer plugin "@name@": a start to write your own from. A decoder's pattern names it, and it adds
// down(tanh(up(norm(h)))) to the residual stream.
#include <capstan/nn.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace {

using namespace capstan;

/// [T, hidden] -> [T, hidden], its own norm and residual included.
class @Name@ : public Layer {
 public:
  @Name@(const LayerContext& c, std::int64_t inner)
      : Layer(c.name),
        norm_(child<nn::Norm>("norm", c.norm, c.hidden, "hidden", c.norm_epsilon, c.bias && c.norm == "layer")),
        up_(child<nn::Linear>("up", std::vector<Segment>{{"mlp", inner, 1, ""}},
                              std::vector<Segment>{{"hidden", c.hidden, 1, ""}}, c.bias, c.init_std)),
        down_(child<nn::Linear>("down", std::vector<Segment>{{"hidden", c.hidden, 1, ""}},
                                std::vector<Segment>{{"mlp", inner, 1, ""}}, c.bias, c.residual_init_std)) {}

  Tensor apply(ForwardContext& context, const Tensor& x) override {
    const auto [h, in] = norm_.with_sum(context, x);
    return down_.add_to(context, ops::tanh(up_(context, in)), h);
  }

 private:
  nn::Norm& norm_;
  nn::Linear &up_, &down_;
};

/// Makes one for each place that the pattern gives it.
class @Name@Maker : public LayerMaker {
 public:
  explicit @Name@Maker(const Options& options) : factor_(options.integer("factor")) {}
  std::shared_ptr<Layer> make(const LayerContext& context) override {
    return std::make_shared<@Name@>(context, factor_ * context.hidden);
  }

 private:
  std::int64_t factor_;
};

}  // namespace

CAPSTAN_PLUGIN("layer", "@name@", "0.1.0") {
  Schema schema;
  schema.integer("factor", 2, "inner width over the width of the residual stream").at_least(1);
  registrar.add("layer", "@name@", schema, [](const Options& options, Registrar&) {
    return as_interface<LayerMaker>(std::make_shared<@Name@Maker>(options));
  });
}
