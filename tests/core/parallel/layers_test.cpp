// Each layer alone under tensor ranks against one rank, in f64 and f32: outputs of the stream rows, and gradients of inputs
// and parameters added over the ranks. The single-rank path is the reference; its own gradients are tested with the ops.
#include "core/parallel/support.h"
#include "parallel/rows.h"

#include <capstan/autograd.h>
#include <capstan/nn.h>

#include <gmock/gmock.h>
#include <support/tolerance.h>

#include <algorithm>

namespace capstan::parallel_test {
namespace {

constexpr std::int64_t rows = 12, hidden = 6;

std::vector<std::int32_t> ids(std::int64_t vocabulary, bool some_missing) {
  const Rng rng(4, "ids");
  std::vector<std::int32_t> v;
  for (std::uint64_t i = 0; i < rows; ++i)
    v.push_back(
        some_missing && i % 5 == 3 ? -1 : static_cast<std::int32_t>(rng.below(i, static_cast<std::uint64_t>(vocabulary))));
  return v;
}

Batch batch_of(Device& device) {
  const std::vector<std::int32_t> tokens(rows, 1), lengths{5, 7};
  return make_batch(device, tokens, lengths, {}, {}, 77);
}

/// What one rank does: makes modules, places them, returns an output that gets a gradient, told which rows of the whole it
/// is.
struct Scene {
  const Rank& rank;
  DType dtype;
  ForwardContext& context;
  Gradients& result;
  std::vector<std::shared_ptr<Module>> modules;
  std::vector<Parameter*> parameters;
  std::vector<std::pair<Tensor, std::size_t>> leaves;  // and where their gradient begins in the whole

  /// Stream rows of an input [rows, width] by address.
  Tensor input(const std::string& name, std::int64_t width) {
    const Tensor all = tensor(noise(name, rows * width), Dims{rows, width}, dtype, *rank.device);
    const Tensor x = make_leaf(nn::stream_rows(context, all).clone(), false);
    leaves.emplace_back(x, static_cast<std::size_t>(rank.tensor_rank() * x.numel()));
    return x;
  }
  template <class M, class... Args>
  M& make(Args&&... args) {
    auto module = std::make_shared<M>(std::forward<Args>(args)...);
    for (Parameter* p : module->parameters()) place(*p, rank, dtype), parameters.push_back(p);
    modules.push_back(module);
    return *module;
  }
  /// A value of which this rank has the rows behind those of the ranks before it; differentiated with weights by address.
  void output(const std::string& name, const Tensor& y, bool differentiate = true) { outputs(name, {y}, differentiate); }
  void outputs(const std::string& name, const std::vector<Tensor>& ys, bool differentiate) {
    std::vector<Tensor> roots, grads;
    for (std::size_t i = 0; i < ys.size(); ++i) {
      const Tensor& y = ys[i];
      const auto begin = static_cast<std::size_t>(rank.tensor_rank() * y.numel());
      result.add(name + std::to_string(i), begin, host(y));
      if (!differentiate) continue;
      const std::vector<double> w = noise(name + std::to_string(i) + "/w", y.numel() * rank.tensor());
      roots.push_back(y);
      grads.push_back(tensor(
          {w.begin() + static_cast<std::ptrdiff_t>(begin), w.begin() + static_cast<std::ptrdiff_t>(begin) + y.numel()},
          y.shape(), dtype, *rank.device));
    }
    if (!roots.empty()) backward(roots, grads);
  }
  void finish() {
    result.add(parameters);
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      const auto* leaf = static_cast<Leaf*>(leaves[i].first.node().get());
      if (leaf->has_grad()) result.add("input" + std::to_string(i), leaves[i].second, host(leaf->grad()));
    }
  }
};

using Act = std::function<void(Scene&)>;

void play(const Rank& rank, DType dtype, const Act& act, Gradients& result) {
  const Batch batch = batch_of(*rank.device);
  ForwardContext context(batch, *rank.device, dtype);
  context.grad = context.training = true, context.seed = 9, context.step = 2, context.mesh = rank.mesh.get();
  Scene scene{rank, dtype, context, result, {}, {}, {}};
  act(scene);
  scene.finish();
}

void compare(const Act& act, const std::string& what) {
  for (const DType dtype : {DType::f64, DType::f32}) {
    Gradients alone;
    play(Rank(), dtype, act, alone);
    for (const int size : {2, 3, 4}) {
      Gradients together;
      run_ranks(size, [&](std::shared_ptr<World> world) { play(Rank(world, size, 1), dtype, act, together); });
      together.expect_near(alone, bounds::reordered(dtype), what + " on " + std::to_string(size));
    }
  }
}

using Segments = std::vector<Segment>;
Segments whole(std::int64_t width) { return {{"hidden", width, 1, ""}}; }

TEST(Layers, ColumnThenRow) {
  for (const std::int64_t inner : {12, 5, 1})  // 5 and 1: computed by all, each counting for its share
    for (const bool bias : {false, true})
      compare(
          [&](Scene& s) {
            nn::Linear& up = s.make<nn::Linear>("up", Segments{{"mlp", inner, 1, ""}}, whole(hidden), bias, 0.5);
            nn::Linear& down = s.make<nn::Linear>("down", whole(hidden), Segments{{"mlp", inner, 1, ""}}, bias, 0.5);
            const Tensor x = s.input("x", hidden);
            const Tensor y = ops::gelu(up(s.context, x));
            EXPECT_EQ(y.size(0), rows);
            s.output("y", down.add_to(s.context, y, x));
          },
          "inner " + std::to_string(inner));
}

TEST(Layers, FusedSegmentsKeepTheirNames) {
  compare(
      [](Scene& s) {
        nn::Linear& up =
            s.make<nn::Linear>("gate_up", Segments{{"mlp", 8, 1, "gate"}, {"mlp", 8, 1, "up"}}, whole(hidden), true, 0.5);
        nn::Linear& down = s.make<nn::Linear>("down", whole(hidden), Segments{{"mlp", 8, 1, ""}}, false, 0.5);
        s.output("y", down(s.context, ops::swiglu(up(s.context, s.input("x", hidden)))));
      },
      "swiglu");
}

TEST(Layers, QueriesAndKeysByParts) {
  for (const auto& [heads, kv] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{4, 4}, {4, 2}, {6, 3}, {3, 1}, {12, 4}, {1, 1}})
    compare(
        [&, heads = heads, kv = kv](Scene& s) {
          constexpr std::int64_t size = 2;
          nn::Linear& qkv = s.make<nn::Linear>(
              "qkv", Segments{{"heads", heads, size, "q"}, {"kv_heads", kv, size, "k"}, {"kv_heads", kv, size, "v"}},
              whole(hidden), true, 0.5);
          nn::Linear& out = s.make<nn::Linear>("out", whole(hidden), Segments{{"heads", heads, size, "", kv}}, true, 0.5);
          nn::Norm& norm = s.make<nn::Norm>("norm", "rms", size, "head_size", 1e-5, false);
          const std::vector<Tensor> parts = qkv.parts(s.context, s.input("x", hidden));
          const auto normed = [&](const Tensor& t) {
            return ops::reshape(norm(s.context, ops::reshape(t, {t.size(0), t.size(1) / size, size})), t.shape());
          };
          s.output("y", out(s.context,
                            nn::attention(s.context, normed(parts[0]), normed(parts[1]), parts[2], {heads, kv, size, 0})));
        },
        std::to_string(heads) + " heads, " + std::to_string(kv) + " of keys");
}

TEST(Layers, UncutLinearAndNormStayOnStreamRows) {
  compare(
      [](Scene& s) {
        nn::Linear& mix = s.make<nn::Linear>("mix", Segments{{"latent", 5, 1, ""}}, whole(hidden), true, 0.5);
        nn::Norm& norm = s.make<nn::Norm>("norm", "layer", 5, "latent", 1e-5, true);
        s.output("y", norm(s.context, mix(s.context, s.input("x", hidden))));
      },
      "uncut");
}

TEST(Layers, EmbeddingsOfAnyVocabulary) {
  for (const std::int64_t vocabulary : {8, 7, 3, 2, 1})
    compare(
        [&](Scene& s) {
          nn::Embedding& tokens = s.make<nn::Embedding>("tokens", vocabulary, "vocab", hidden, 0.5);
          nn::Embedding& positions = s.make<nn::Embedding>("positions", 9, "positions", hidden, 0.5);
          const Tensor id = Tensor::of<std::int32_t>(ids(vocabulary, false), Dims{rows}, *s.rank.device);
          s.output("y", ops::add(tokens(s.context, id), positions(s.context, s.context.batch.space().positions)));
        },
        "vocabulary " + std::to_string(vocabulary));
}

TEST(Layers, DropoutHasTheMaskOfOneRank) {
  compare(
      [](Scene& s) {
        const Tensor x = s.input("x", hidden), y = nn::dropout(s.context, x, 0.4, "here");
        const std::vector<double> values = host(y);
        EXPECT_GT(std::count(values.begin(), values.end(), 0.0), 0);
        s.output("y", y);
        s.context.training = false;
        EXPECT_EQ(nn::dropout(s.context, x, 0.4, "here").raw(), x.raw());
      },
      "dropout");
}

ParameterSpec head_spec(std::int64_t vocabulary) {
  ParameterSpec spec;
  spec.dims = {{{"vocab", vocabulary, 1, ""}}, {{"hidden", hidden, 1, ""}}};
  spec.role = Role::head;
  spec.init = {Init::Kind::normal, 1};
  return spec;
}

/// A module of one weight, as heads have.
class Weight : public Module {
 public:
  explicit Weight(std::int64_t vocabulary) : Module("head"), weight(declare("weight", head_spec(vocabulary))) {}
  Parameter& weight;
};

TEST(Layers, ObjectiveWithKnownWeights) {
  for (const std::int64_t vocabulary : {8, 37, 3, 2})
    compare(
        [&](Scene& s) {
          Weight& head = s.make<Weight>(vocabulary);
          std::vector<float> w;
          for (const double x : noise("weights", rows)) w.push_back(static_cast<float>(x));
          const Tensor weights = Tensor::of<float>(w, Dims{rows}, *s.rank.device);
          const Tensor targets = Tensor::of<std::int32_t>(ids(vocabulary, true), Dims{rows}, *s.rank.device);
          Tensor objective;
          const Score score = nn::score(s.context, s.input("x", hidden), head.weight, targets, &weights, &objective);
          s.outputs("score", {score.logprob, score.logsumexp, score.entropy}, false);
          s.result.add("objective", 0, host(objective));  // ranks only add
          backward(objective);
        },
        "vocabulary " + std::to_string(vocabulary));
}

TEST(Layers, ScoresWhoseGradientComesLater) {
  for (const std::int64_t vocabulary : {8, 37, 3, 2})
    compare(
        [&](Scene& s) {
          Weight& head = s.make<Weight>(vocabulary);
          const Tensor targets = Tensor::of<std::int32_t>(ids(vocabulary, true), Dims{rows}, *s.rank.device);
          const Score score = nn::score(s.context, s.input("x", hidden), head.weight, targets, nullptr, nullptr);
          s.outputs("score", {score.logprob, score.logsumexp, score.entropy}, true);
        },
        "vocabulary " + std::to_string(vocabulary));
}

TEST(Layers, LogitsOfRowsHaveTheWholeVocabulary) {
  for (const std::int64_t vocabulary : {8, 7, 2})
    compare(
        [&](Scene& s) {
          Weight& head = s.make<Weight>(vocabulary);
          nn::Norm& norm = s.make<nn::Norm>("norm", "rms", hidden, "hidden", 1e-5, false);
          const std::vector<std::int32_t> some{11, 0, 5, 5};
          const Tensor at = Tensor::of<std::int32_t>(some, Dims{4}, *s.rank.device);
          const Tensor y =
              nn::logits(s.context, norm(s.context, nn::take_rows(s.context, s.input("x", hidden), at)), head.weight);
          EXPECT_EQ(y.shape(), (Dims{4, vocabulary}));
          // Every rank has them all; each answers for its share of the gradient.
          s.result.add("logits", 0, host(ops::scale(y, 1.0 / s.rank.tensor())));
          const std::vector<double> w = noise("logits/w", y.numel(), 1.0 / s.rank.tensor());
          const Tensor roots[] = {y}, grads[] = {tensor(w, y.shape(), s.dtype, *s.rank.device)};
          backward(roots, grads);
        },
        "vocabulary " + std::to_string(vocabulary));
}

TEST(Layers, OneTensorRankHasTheBitsOfNoMesh) {
  Gradients without, with;
  const Act act = [](Scene& s) {
    nn::Linear& up =
        s.make<nn::Linear>("up", Segments{{"mlp", 8, 1, "gate"}, {"mlp", 8, 1, "up"}}, whole(hidden), true, 0.5);
    nn::Linear& down = s.make<nn::Linear>("down", whole(hidden), Segments{{"mlp", 8, 1, ""}}, true, 0.5);
    nn::Embedding& tokens = s.make<nn::Embedding>("tokens", 7, "vocab", hidden, 0.5);
    const Tensor h = tokens(s.context, Tensor::of<std::int32_t>(ids(7, false), Dims{rows}, *s.rank.device));
    s.output("y", nn::dropout(s.context, down.add_to(s.context, ops::swiglu(up(s.context, h)), h), 0.3, "d"));
  };
  play(Rank(), DType::f32, act, without);
  run_ranks(1, [&](std::shared_ptr<World> world) { play(Rank(world, 1, 1), DType::f32, act, with); });
  EXPECT_EQ(without.all(), with.all());
}

template <class F>
std::string message(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Layers, RefuseWhatWouldBeSilentlyWrong) {
  run_ranks(2, [](std::shared_ptr<World> world) {
    const Rank rank(world, 2, 1);
    const Batch batch = batch_of(*rank.device);
    ForwardContext context(batch, *rank.device, DType::f32);
    nn::Linear up("layer.up", {{"mlp", 4, 1, ""}}, whole(hidden), false, 0.5);
    place(up.weight(), rank, DType::f32);
    context.mesh = rank.mesh.get();
    EXPECT_THAT(message([&] { (void)context.use(up.weight()); }),
                testing::AllOf(testing::HasSubstr("layer.up.weight"), testing::HasSubstr("use it through nn::Linear")));
    context.mesh = nullptr;  // an engine that forgot to say where it placed it
    const Tensor x = Tensor::zeros(Dims{rows / 2, hidden}, DType::f32, *rank.device);
    EXPECT_THAT(message([&] { up(context, x); }), testing::HasSubstr("cut for 2 tensor ranks, the forward has 1"));
    context.mesh = rank.mesh.get();
    const Tensor odd = Tensor::zeros(Dims{5}, DType::f32, *rank.device);
    EXPECT_THAT(message([&] { nn::stream_rows(context, odd); }),
                testing::HasSubstr("a multiple of the 2 tensor ranks, got 5"));
    // Targets and tokens of another tokenizer are named on every rank, before anyone waits for anyone.
    nn::Embedding tokens("tokens", 4, "vocab", hidden, 0.5);
    place(tokens.weight(), rank, DType::f32);
    std::vector<std::int32_t> bad(rows, 1);
    bad[7] = 4;
    const Tensor id = Tensor::of<std::int32_t>(bad, Dims{rows}, *rank.device);
    EXPECT_THAT(message([&] { tokens(context, id); }), testing::HasSubstr("ids[7]: expected a row of [0, 4), got 4"));
    EXPECT_THAT(message([&] { nn::score(context, x, tokens.weight(), id, nullptr, nullptr); }),
                testing::HasSubstr("target 4 of row 7 is outside the vocabulary of 4"));
  });
}

TEST(Rows, ArePaddedWithTheDeadSequence) {
  const auto device = make_cpu_device(1);
  const std::vector<std::int32_t> tokens{5, 6, 7, 8, 9}, lengths{2, 3}, targets{6, -1, 8, 9, -1};
  const Batch batch = make_batch(*device, tokens, lengths, targets, {}, 40), padded = parallel::pad_rows(batch, 4);
  EXPECT_EQ(padded.space().capacity, 8);
  EXPECT_EQ(padded.space().host_starts, batch.space().host_starts);
  EXPECT_EQ(padded.step_weight, 3);
  EXPECT_EQ(host(padded.stream("tokens")), (std::vector<double>{5, 6, 7, 8, 9, 0, 0, 0}));
  EXPECT_EQ(host(padded.stream("targets")), (std::vector<double>{6, -1, 8, 9, -1, -1, -1, -1}));
  EXPECT_EQ(host(padded.stream("weight")), (std::vector<double>{1, 0, 1, 1, 0, 0, 0, 0}));
  EXPECT_EQ(host(padded.space().sample_ids), (std::vector<double>{40, 41, 42, 43, 44, 0, 0, 0}));
  EXPECT_EQ(parallel::pad_rows(batch, 5).stream("tokens").raw(), batch.stream("tokens").raw());
}

}  // namespace
}  // namespace capstan::parallel_test
