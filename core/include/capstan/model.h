// defines: ForwardContext, Block, Layer, Head, Call, Model. A model is an ordered list of calls; core
// walks them: the same code is the sharding unit, the recompute unit, the pipeline stage and inference.
#pragma once
#include <capstan/batch.h>
#include <capstan/options.h>
#include <capstan/parameter.h>
#include <capstan/plugin.h>
#include <capstan/random.h>
#include <capstan/state.h>
#include <capstan/tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace capstan {

class Mesh;

/// One entry of the loss ledger: a scalar `sum` that may carry a graph, already divided by the step's
/// normalizer (Batch::step_weight), so that microbatches and ranks only add; `count` is what it was summed
/// over in this batch, `weight` its part in the objective.
struct LossEntry { std::string name; Tensor sum; double count = 0; double weight = 1; };

struct Call;

/// What the products of nn::Linear multiply (recipe: precision.linear). Under fp8 and mxfp8 activations and weights become e4m3,
/// gradients `gradient`; sums and results stay as they are.
struct LinearPrecision {
  enum class Kind : std::uint8_t { compute, fp8, mxfp8 } kind = Kind::compute;
  DType gradient = DType::f8e5m2;  ///< or f8e4m3
  bool narrow() const { return kind != Kind::compute; }
};

/// What a block sees of the world during one forward.
class CAPSTAN_API ForwardContext {
 public:
  ForwardContext(const Batch& batch, Device& device, DType dtype) : batch(batch), device(device), dtype(dtype) {}
  const Batch& batch;
  Device& device;
  DType dtype;                        ///< of activations and parameters' working copies
  SequenceState* state = nullptr;     ///< null in training
  bool grad = false;                  ///< record the graph
  bool training = false;              ///< dropout is on
  std::uint64_t step = 0, seed = 0;
  /// Among which ranks core's layers share their work; null: none.
  Mesh* mesh = nullptr;
  LinearPrecision linear{};

  /// Carried values: "h" is the hidden state [T, hidden]. Error(programming) when nobody wrote it.
  Tensor get(std::string_view value) const;
  void set(std::string_view value, Tensor t);
  bool has(std::string_view value) const;
  /// Made once in a forward and kept to its end: RoPE tables and the like.
  Tensor memo(std::string_view key, const std::function<Tensor()>& make);
  /// A parameter's values for this forward: with its gradient leaf when the graph is recorded. Error(programming) when
  /// tensor ranks hold pieces of it: an op would take the piece for the whole.
  Tensor use(const Parameter& parameter) const;
  /// Adds to the loss ledger.
  void loss(std::string_view name, Tensor sum, double count, double weight = 1);
  const std::vector<LossEntry>& losses() const { return losses_; }
  void clear_losses() { losses_.clear(); }
  /// Keeps the sums, frees what they hang on.
  void drop_loss_graphs() { for (LossEntry& l : losses_) l.sum = l.sum.detach(); }
  void drop(std::string_view value);
  /// Forgets the losses that are added during its life (a recomputed call adds its own again).
  class LossMark {
   public:
    explicit LossMark(ForwardContext& context) : context_(context), size_(context.losses_.size()) {}
    ~LossMark() { context_.losses_.resize(size_); }
    LossMark(const LossMark&) = delete;
    LossMark& operator=(const LossMark&) = delete;

   private:
    ForwardContext& context_;
    std::size_t size_;
  };
  /// During its life, get() refuses values that `call` neither declared in `reads` nor wrote itself, and set() those with a
  /// graph that it did not declare in `writes`: the walk would lose their gradients.
  class CAPSTAN_API CallMark {
   public:
    CallMark(ForwardContext& context, const Call& call);
    ~CallMark();
    CallMark(const CallMark&) = delete;
    CallMark& operator=(const CallMark&) = delete;

   private:
    ForwardContext& context_;
  };
  /// Randomness by address: the stream `name` at this step.
  Rng random(std::string_view name) const { return Rng(seed, name, step); }

 private:
  std::map<std::string, Tensor, std::less<>> values_;
  std::map<std::string, Tensor, std::less<>> memo_;
  std::vector<LossEntry> losses_;
  const Call* call_ = nullptr;        // that a CallMark watches
  std::vector<std::string> written_;  // by it, so far
};

/// Owns parameters and sub-modules, in order of declaration. Names are identities: "layers.3.attn.qkv".
class CAPSTAN_API Module {
 public:
  explicit Module(std::string name) : name_(std::move(name)) {}
  virtual ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  const std::string& name() const { return name_; }
  /// Every parameter of this module and those below it, once each, in order of declaration.
  std::vector<Parameter*> parameters() const;

 protected:
  /// Declares a parameter called `<module>.<leaf_name>`.
  Parameter& declare(std::string_view leaf_name, ParameterSpec spec);
  /// Uses a parameter that another module declared (tied weights).
  void share(Parameter& parameter);
  /// Adds a sub-module that this one owns.
  template <class M, class... Args>
  M& child(std::string_view leaf_name, Args&&... args) {
    auto m = std::make_shared<M>(path(leaf_name), std::forward<Args>(args)...);
    M& ref = *m;
    adopt(std::move(m));
    return ref;
  }
  void adopt(std::shared_ptr<Module> module);
  std::string path(std::string_view leaf_name) const;

 private:
  std::string name_;
  struct Item { std::unique_ptr<Parameter> own; Parameter* shared = nullptr; std::shared_ptr<Module> module; };
  std::vector<Item> items_;
};

/// What a call runs.
class CAPSTAN_API Block : public Module {
 public:
  using Module::Module;
  ~Block() override;
  virtual void forward(ForwardContext& context) = 0;
  /// What it keeps between forwards of one sequence.
  virtual std::vector<StateSpec> state() const { return {}; }
};

/// What a decoder tells each layer of its pattern when it makes one (plugin kind "layer").
struct LayerContext {
  std::string name;                ///< "layers.3.attention"
  std::int64_t hidden = 0;         ///< width of the residual stream
  std::int64_t index = 0, layers = 0;
  double init_std = 0.02;
  double residual_init_std = 0.02; ///< for the projection back into the residual stream
  std::string norm = "rms";        ///< "rms" or "layer"
  double norm_epsilon = 1e-5;
  bool bias = false;
  double dropout = 0;
  std::int64_t longest = 0;        ///< longest sequence that the model is made for
};

/// Reads and writes the residual stream: [T, hidden] -> [T, hidden], its own norm and residual included.
class CAPSTAN_API Layer : public Block {
 public:
  using Block::Block;
  ~Layer() override;
  virtual Tensor apply(ForwardContext& context, const Tensor& h) = 0;
  void forward(ForwardContext& context) override { context.set("h", apply(context, context.get("h"))); }
};

/// The object that a plugin of kind "layer" registers: makes one Layer for each place in a pattern.
class CAPSTAN_API LayerMaker {
 public:
  virtual ~LayerMaker();
  virtual std::shared_ptr<Layer> make(const LayerContext& context) = 0;
};

/// Per-token scores of given targets, all f32 (f64 in f64 models): [T], or this rank's stream rows of them (nn.h).
struct Score { Tensor logprob, logsumexp, entropy; };

/// Turns the hidden state into distributions over tokens.
class CAPSTAN_API Head : public Block {
 public:
  using Block::Block;
  ~Head() override;
  /// Scores `targets` (i32 [T], all rows of the batch; -1: none, its log-probability is 0). Never holds T x vocabulary logits at
  /// once. With `weights` (f32 [T]) known and context.grad set, the gradient of -sum_t weights[t] *
  /// logprob[t] is computed here, so that logits are computed once; put every scaling into the weights.
  /// The scalar -sum_t weights[t] * logprob[t] is `objective`, when it is not null. Under tensor parallelism scores and
  /// objective are of this rank's stream rows: over all ranks each row counts once.
  virtual Score score(ForwardContext& context, const Tensor& targets, const Tensor* weights, Tensor* objective) = 0;
  /// Logits of some rows of the hidden state: i32 [n] -> [n, vocabulary], f32.
  virtual Tensor logits(ForwardContext& context, const Tensor& rows) = 0;
  virtual std::int64_t vocabulary() const = 0;
  /// Adds the loss "lm" over the batch's targets and weight to the ledger.
  void forward(ForwardContext& context) override;
};

/// One step of a model: the block and the carried values that it reads and writes.
struct Call {
  Block* block = nullptr;
  std::vector<std::string> reads{"h"}, writes{"h"};
  bool recompute = false;  ///< its graph is dropped after the forward and rebuilt in the backward
};

struct Runtime;

/// Interface of plugin kind "model".
class CAPSTAN_API Model {
 public:
  Model();
  virtual ~Model();
  virtual const std::vector<Call>& calls() const = 0;
  virtual Head& head(std::string_view name = "lm") = 0;
  virtual std::int64_t vocabulary() const = 0;
  virtual std::int64_t hidden() const = 0;
  virtual std::int64_t longest() const = 0;  ///< longest sequence; 0: no limit
  /// One line: "GPT, 12 layers, 12 heads, width 768".
  virtual std::string describe() const = 0;
  /// Every parameter once, in call order.
  std::vector<Parameter*> parameters() const;
  std::vector<StateSpec> state() const;

  /// What an engine set to be told of each call, in whoever's walk (walk.h); null before.
  const Runtime* runtime() const { return runtime_.get(); }
  void set_runtime(std::shared_ptr<const Runtime> runtime) { runtime_ = std::move(runtime); }

 private:
  std::shared_ptr<const Runtime> runtime_;
};

}  // namespace capstan
