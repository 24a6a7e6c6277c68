// The layer plugin "attention": causal multi-head attention with grouped key/value heads (Ainslie et al. 2023),
// rotary positions (Su et al. 2021), optional normalization of queries and keys (Henry et al. 2020) and, in every layer
// or all but every n-th, a sliding window (Beltagy et al. 2020).
#include <capstan/nn.h>

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace capstan {
namespace {

struct AttentionOptions {
  ops::AttentionShape shape;
  bool rope = true, qk_norm = false;
  double rope_theta = 10000;
};

/// h + out(attention(rope(qk_norm(q)), rope(qk_norm(k)), v)) with q, k, v from one projection of norm(h).
class Attention : public Layer {
 public:
  Attention(const LayerContext& c, const AttentionOptions& o)
      : Layer(c.name), shape_(o.shape), rope_(o.rope), rope_theta_(o.rope_theta), dropout_(c.dropout) {
    char key[64];
    std::snprintf(key, sizeof key, "rope/%lld/%.17g", static_cast<long long>(shape_.head_size), rope_theta_);
    table_key_ = key;
    const bool norm_bias = c.bias && c.norm == "layer";
    const std::int64_t heads = shape_.heads, kv_heads = shape_.kv_heads, size = shape_.head_size;
    norm_ = &child<nn::Norm>("norm", c.norm, c.hidden, "hidden", c.norm_epsilon, norm_bias);
    qkv_ = &child<nn::Linear>(
        "qkv",
        std::vector<Segment>{
            {"heads", heads, size, "q", kv_heads}, {"kv_heads", kv_heads, size, "k"}, {"kv_heads", kv_heads, size, "v"}},
        std::vector<Segment>{{"hidden", c.hidden, 1, ""}}, c.bias, c.init_std);
    if (o.qk_norm) {
      q_norm_ = &child<nn::Norm>("q_norm", c.norm, size, "head_size", c.norm_epsilon, norm_bias);
      k_norm_ = &child<nn::Norm>("k_norm", c.norm, size, "head_size", c.norm_epsilon, norm_bias);
    }
    out_ = &child<nn::Linear>("out", std::vector<Segment>{{"hidden", c.hidden, 1, ""}},
                              std::vector<Segment>{{"heads", heads, size, "", kv_heads}}, c.bias, c.residual_init_std);
  }

  Tensor apply(ForwardContext& context, const Tensor& x) override {
    const Space& space = context.batch.space();
    const auto [h, in] = norm_->with_sum(context, x);
    const std::vector<Tensor> parts = qkv_->parts(context, in);
    const Tensor q = place(context, space, parts[0], q_norm_);
    const Tensor k = place(context, space, parts[1], k_norm_);
    const Tensor& v = parts[2];
    Tensor mixed;
    if (context.state) {
      const Dims per_head{k.size(0), shape_.kv_heads, shape_.head_size};
      const PagedKV past = context.state->append(name(), ops::reshape(k, per_head), ops::reshape(v, per_head));
      mixed = ops::attention_paged(q, past, space, shape_);
    } else {
      mixed = nn::attention(context, q, k, v, shape_);
    }
    if (dropout_ == 0 || !context.training) return out_->add_to(context, mixed, h);
    return ops::add(h, nn::dropout(context, (*out_)(context, mixed), dropout_, name() + "/dropout"));
  }

  std::vector<StateSpec> state() const override {
    return {{StateSpec::Kind::paged, name(), {shape_.kv_heads, shape_.head_size}}};
  }

 private:
  /// Norm and rotation of queries or keys x [T, heads * D]; x itself when there is neither.
  Tensor place(ForwardContext& context, const Space& space, const Tensor& x, const nn::Norm* norm) const {
    if (!norm && !rope_) return x;
    Tensor y = ops::reshape(x, {x.size(0), x.size(1) / shape_.head_size, shape_.head_size});
    if (norm) y = (*norm)(context, y);
    if (rope_) {
      const Tensor table = context.memo(table_key_, [&] {
        return ops::rope_table(space.positions, shape_.head_size, rope_theta_,
                               context.dtype == DType::f64 ? DType::f64 : DType::f32);
      });
      y = ops::rope(y, table);
    }
    return ops::reshape(y, x.shape());
  }

  ops::AttentionShape shape_;
  bool rope_;
  double rope_theta_, dropout_;
  std::string table_key_;
  const nn::Norm *norm_ = nullptr, *q_norm_ = nullptr, *k_norm_ = nullptr;
  const nn::Linear *qkv_ = nullptr, *out_ = nullptr;
};

class AttentionMaker : public LayerMaker {
 public:
  explicit AttentionMaker(const Options& o) : options_(o) {}

  std::shared_ptr<Layer> make(const LayerContext& context) override {
    AttentionOptions a;
    a.shape.heads = options_.integer("heads");
    a.shape.kv_heads = options_.integer("kv_heads");
    a.shape.head_size = options_.integer("head_size");
    a.rope = options_.flag("rope");
    a.rope_theta = options_.number("rope_theta");
    a.qk_norm = options_.flag("qk_norm");
    const std::int64_t every = options_.integer("global_every");
    a.shape.window = options_.integer("window");
    if (every != 0 && a.shape.window == 0)
      options_.refuse("global_every", "without a window every layer is global: give window too, or leave this out");
    if (every != 0 && (context.index + 1) % every == 0) a.shape.window = 0;
    if (a.shape.kv_heads == 0) a.shape.kv_heads = a.shape.heads;
    if (a.shape.heads % a.shape.kv_heads != 0) {
      options_.refuse("kv_heads", "query heads share key/value heads evenly: expected a divisor of heads (" +
                                      std::to_string(a.shape.heads) + "), got " + std::to_string(a.shape.kv_heads));
    }
    if (a.shape.head_size == 0) {
      if (context.hidden % a.shape.heads != 0) {
        options_.refuse("heads", "without head_size the width is divided among the heads: expected a divisor of " +
                                     std::to_string(context.hidden) + ", got " + std::to_string(a.shape.heads));
      }
      a.shape.head_size = context.hidden / a.shape.heads;
    }
    if (a.rope && a.shape.head_size % 2 != 0) {
      options_.refuse("rope", "rotary positions turn pairs of elements: expected an even head size, got " +
                                  std::to_string(a.shape.head_size));
    }
    return std::make_shared<Attention>(context, a);
  }

 private:
  Options options_;
};

}  // namespace
}  // namespace capstan

CAPSTAN_PLUGIN("layer", "attention", "1.0.0") {
  capstan::Schema schema;
  schema.required(capstan::OptionSpec::Type::integer, "heads", "query heads").range(1, 1 << 16);
  schema.integer("kv_heads", 0, "key/value heads, a divisor of heads; 0: as many as heads").range(0, 1 << 16);
  schema.integer("head_size", 0, "elements of one head; 0: width / heads").range(0, 1 << 16);
  schema.flag("rope", true, "rotate queries and keys by their positions");
  schema.number("rope_theta", 10000, "base of the rotation's wavelengths").above(0);
  schema.flag("qk_norm", false, "normalize each head's query and key");
  schema.integer("window", 0, "keys that a token sees, its own and those just before it; 0: all before it").at_least(0).in("tokens");
  schema.integer("global_every", 0, "every n-th layer (n, 2 n, ... counted from 1) has no window; 0: all layers have it").at_least(0);
  registrar.add("layer", "attention", schema, [](const capstan::Options& o, capstan::Registrar&) {
    return capstan::as_interface<capstan::LayerMaker>(std::make_shared<capstan::AttentionMaker>(o));
  });
}
