// defines: Node, Edge, Leaf, backward(). The graph hangs on tensors; there is no tape and no context.
#pragma once
#include <capstan/tensor.h>

#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

namespace capstan {

class Leaf;

/// Which gradients a backward pass computes: those of activations, those of parameters, or both. A
/// zero-bubble pipeline runs `input` first and `weight` when the pipeline would idle.
enum class Part : unsigned char { input = 1, weight = 2, both = 3 };

struct Edge {
  std::shared_ptr<Node> node;  ///< null: this input needs no gradient
  int index = 0;               ///< which output of that node
  DType dtype = DType::f32;    ///< of the input, and so of its gradient
  Dims shape;                  ///< likewise
};

/// The backward of one op. Saved tensors are freed by release() once the node has run.
class CAPSTAN_API Node {
 public:
  virtual ~Node();
  virtual std::string_view name() const = 0;
  /// Gradients of the inputs, in the order of `inputs`, each of its input's shape and type (a parameter's may be of
  /// another type); undefined where wants(i, part) is false or the gradient went straight into a leaf (see
  /// Leaf::accumulate_into). `grads` has one tensor for each output; undefined means zero.
  virtual std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) = 0;
  /// Drops saved tensors.
  virtual void release() = 0;

  bool wants(int input, Part part) const;
  /// The leaf behind input i, or null when it is an activation.
  Leaf* leaf(int input) const;

  std::vector<Edge> inputs;
  int outputs = 1;
  bool released = false;
  int readers = 0;  ///< ops recorded on its outputs, and walks that began at them
};

/// Where a gradient ends: a parameter or a detached input of a call. Accumulates over uses.
class CAPSTAN_API Leaf : public Node {
 public:
  explicit Leaf(bool parameter) : parameter_(parameter) {}
  ~Leaf() override;
  std::string_view name() const override { return "leaf"; }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override;
  void release() override {}
  bool parameter() const { return parameter_; }

  /// Adds `grad` to the gradient (casts to the gradient's dtype).
  void add(const Tensor& grad);
  /// For ops that add in place: the gradient's buffer, made if need be; `overwrite` says that it holds
  /// nothing yet and is to be written, not added to. Call done() afterwards.
  Tensor accumulate_into(const Tensor& like, bool& overwrite);
  void done();

  /// The buffer was filled behind our back, by recorded work.
  void mark_filled() { filled_ = true; }

  const Tensor& grad() const { return grad_; }
  bool has_grad() const { return filled_; }
  /// The gradient is kept here from now on (engines point it into a flat buffer); contents are ignored.
  void set_buffer(Tensor buffer) { grad_ = std::move(buffer), filled_ = false; }
  /// Forgets the gradient; keeps the buffer.
  void clear() { filled_ = false; uses_ = 0; if (!parameter_) grad_ = Tensor(); }

  /// Called each time the gradient has received the contribution of its last recorded use. A forward
  /// records a use for each op that reads the leaf; a call that is going to be run again (train.recompute) counts
  /// as one use of each of its block's parameters until then. So: once in a microbatch, however often it is read.
  std::function<void(Leaf&)> hook;
  void used() { ++uses_; }
  /// Recorded uses whose contributions are still to come.
  int uses() const { return uses_; }

 private:
  bool parameter_;
  bool filled_ = false;
  int uses_ = 0;
  Tensor grad_;
};

/// A tensor over the same storage that collects a gradient: `t.node()` is its Leaf.
CAPSTAN_API Tensor make_leaf(const Tensor& value, bool parameter);

/// True when any of `inputs` needs a gradient and so the op has to record a node.
CAPSTAN_API bool any_requires_grad(std::initializer_list<const Tensor*> inputs);

/// Hangs `node` on an op's outputs and fills node->inputs from `inputs` (null or undefined: no gradient).
CAPSTAN_API void record(const std::shared_ptr<Node>& node, std::initializer_list<const Tensor*> inputs,
                        std::initializer_list<Tensor*> outputs);
CAPSTAN_API void record(const std::shared_ptr<Node>& node, std::span<const Tensor> inputs, std::span<Tensor> outputs);

/// The weight part that backward(Part::input) left for later.
struct CAPSTAN_API Deferred {
  struct Item { std::shared_ptr<Node> node; std::vector<Tensor> grads; };
  std::vector<Item> items;
  void run();  ///< computes the weight gradients and frees the graph
};

/// Walks the graph from `roots` in reverse order of recording. `grads[i]` is the gradient of roots[i];
/// undefined means ones for a scalar. Frees each node after use: a second walk is Error(programming).
CAPSTAN_API Deferred backward(std::span<const Tensor> roots, std::span<const Tensor> grads, Part part = Part::both);
CAPSTAN_API void backward(const Tensor& root);

}  // namespace capstan
