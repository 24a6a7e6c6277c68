// The walk through the graph, leaves, and the record of a node.
#include <capstan/autograd.h>
#include <kernels/backend.h>

#include <algorithm>
#include <unordered_map>

namespace capstan {

Node::~Node() {
  // Long chains would recurse once per node: unlink them one at a time instead.
  std::vector<std::shared_ptr<Node>> pending;
  auto take = [&](std::vector<Edge>& edges) {
    for (Edge& e : edges)
      if (e.node) pending.push_back(std::move(e.node));
    edges.clear();
  };
  take(inputs);
  while (!pending.empty()) {
    std::shared_ptr<Node> node = std::move(pending.back());
    pending.pop_back();
    if (node.use_count() == 1) take(node->inputs);
  }
}

Leaf::~Leaf() = default;

Leaf* Node::leaf(int input) const {
  const Edge& e = inputs[static_cast<std::size_t>(input)];
  return e.node ? dynamic_cast<Leaf*>(e.node.get()) : nullptr;
}

bool Node::wants(int input, Part part) const {
  const Edge& e = inputs[static_cast<std::size_t>(input)];
  if (!e.node) return false;
  if (part == Part::both) return true;
  const Leaf* l = leaf(input);
  return (l != nullptr && l->parameter()) == (part == Part::weight);
}

std::vector<Tensor> Leaf::backward(std::span<const Tensor> grads, Part) {
  if (grads[0].defined()) add(grads[0]);
  return {};
}

void Leaf::add(const Tensor& grad) {
  if (!filled_) {
    if (grad_.defined()) grad_.copy_from(grad);
    else grad_ = parameter_ ? grad.clone() : grad.detach();  // an activation's is copied before add() writes it
  } else {
    // A parameter adds up in its buffer; an activation's gradient is a value that others may hold: a new one.
    const Tensor before = grad_.contiguous();
    if (!parameter_) grad_ = Tensor::empty(before.shape(), before.dtype(), before.device());
    if (!grad_.is_meta()) {
      const Tensor g = grad.contiguous().to(grad_.dtype());
      if (!grad_.is_contiguous()) fail(Fault::programming, "gradient", "the buffer of a gradient must be contiguous");
      grad_.device().backend().add(static_cast<kernels::Num>(grad_.dtype()), grad_.numel(), before.raw(), g.raw(), grad_.raw());
    }
  }
  filled_ = true;
  done();
}

Tensor Leaf::accumulate_into(const Tensor& like, bool& overwrite) {
  overwrite = !filled_;
  if (!grad_.defined()) grad_ = Tensor::empty(like.shape(), like.dtype() == DType::bf16 ? DType::f32 : like.dtype(), like.device());
  filled_ = true;
  return grad_;
}

void Leaf::done() {
  if (uses_ > 0 && --uses_ == 0 && hook) hook(*this);
}

Tensor make_leaf(const Tensor& value, bool parameter) {
  Tensor t = value.detach();
  t.set_node(std::make_shared<Leaf>(parameter), 0);
  return t;
}

bool any_requires_grad(std::initializer_list<const Tensor*> inputs) {
  return std::any_of(inputs.begin(), inputs.end(), [](const Tensor* t) { return t != nullptr && t->requires_grad(); });
}

void record(const std::shared_ptr<Node>& node, std::span<const Tensor> inputs, std::span<Tensor> outputs) {
  node->inputs.clear();
  for (const Tensor& t : inputs) {
    Edge edge{t.node(), t.output_index(), {}, {}};
    if (edge.node) edge.dtype = t.dtype(), edge.shape = t.shape();
    node->inputs.push_back(std::move(edge));
    if (t.node()) ++t.node()->readers;
    if (auto* leaf = dynamic_cast<Leaf*>(t.node().get())) leaf->used();
  }
  node->outputs = static_cast<int>(outputs.size());
  int i = 0;
  for (Tensor& t : outputs) t.set_node(node, i++);
}

void record(const std::shared_ptr<Node>& node, std::initializer_list<const Tensor*> inputs, std::initializer_list<Tensor*> outputs) {
  std::vector<Tensor> in, out;
  for (const Tensor* t : inputs) in.push_back(t == nullptr ? Tensor() : *t);
  for (Tensor* t : outputs) out.push_back(*t);
  record(node, std::span<const Tensor>(in), std::span<Tensor>(out));
  std::size_t i = 0;
  for (Tensor* t : outputs) *t = out[i++];
}

namespace {

/// Adds two gradients into a new value: gradients handed around are never written.
Tensor sum_of(const Tensor& a, const Tensor& b) {
  Leaf adder(false);
  adder.add(a);
  adder.add(b);
  return adder.grad();
}

void check_alive(const Node& node) {
  if (node.released)
    fail(Fault::programming, std::string(node.name()),
         "its graph was freed by an earlier backward: run the forward again, or sum the losses and walk back once");
}

void check_count(const Node& node, std::size_t gradients, std::size_t inputs) {
  if (gradients == inputs) return;
  fail(Fault::programming, std::string(node.name()),
       "its backward returned " + std::to_string(gradients) + " gradients for " + std::to_string(inputs) + " inputs");
}

/// Gradients are added by number of elements: one of another shape would be read past its end.
void check_gradient(const Node& node, std::size_t input, const Edge& edge, const Tensor& gradient, const Leaf* leaf) {
  const bool any_type = leaf != nullptr && leaf->parameter();  // which adds in the type of its own gradient
  if (gradient.shape() == edge.shape && (any_type || gradient.dtype() == edge.dtype)) return;
  fail(Fault::programming, std::string(node.name()),
       "the gradient that its backward returned for input " + std::to_string(input) + ": expected " +
           (any_type ? "" : std::string(name_of(edge.dtype)) + " ") + to_string(edge.shape) + ", as the input, got " +
           std::string(name_of(gradient.dtype())) + " " + to_string(gradient.shape()));
}

}  // namespace

Deferred backward(std::span<const Tensor> roots, std::span<const Tensor> root_grads, Part part) {
  // Count how many times each node will be reached, so that it runs once, after all its consumers.
  std::unordered_map<Node*, int> pending;
  std::vector<Node*> stack;
  std::unordered_map<Node*, std::vector<Tensor>> grads;
  std::vector<std::shared_ptr<Node>> ready;
  auto slot = [&](Node* n) -> std::vector<Tensor>& {
    auto& g = grads[n];
    if (g.empty()) g.resize(static_cast<std::size_t>(n->outputs));
    return g;
  };
  std::vector<std::shared_ptr<Node>> root_nodes;
  for (std::size_t i = 0; i < roots.size(); ++i) {
    const Tensor& root = roots[i];
    if (!root.node()) fail(Fault::programming, "backward", "a root of shape " + to_string(root.shape()) + " has no graph: nothing it depends on needs a gradient");
    Tensor g = i < root_grads.size() ? root_grads[i] : Tensor();
    if (!g.defined()) {
      if (root.numel() != 1) fail(Fault::programming, "backward", "a root of shape " + to_string(root.shape()) + " needs a gradient: only a scalar's is 1 by itself");
      g = Tensor::full(root.shape(), 1.0, root.dtype(), root.device());
    }
    if (!(g.shape() == root.shape()))
      fail(Fault::programming, "backward", "gradient shape: expected " + to_string(root.shape()) + ", got " + to_string(g.shape()));
    ++root.node()->readers;
    Tensor& s = slot(root.node().get())[static_cast<std::size_t>(root.output_index())];
    s = s.defined() ? sum_of(s, g) : g;
    if (pending.try_emplace(root.node().get(), 0).second) stack.push_back(root.node().get()), root_nodes.push_back(root.node());
  }
  while (!stack.empty()) {
    Node* n = stack.back();
    stack.pop_back();
    for (const Edge& e : n->inputs)
      if (e.node && dynamic_cast<Leaf*>(e.node.get()) == nullptr) {
        auto [it, fresh] = pending.try_emplace(e.node.get(), 0);
        ++it->second;
        if (fresh) stack.push_back(e.node.get());
      }
  }
  for (auto& n : root_nodes)
    if (pending[n.get()] == 0) ready.push_back(n);

  Deferred deferred;
  while (!ready.empty()) {
    std::shared_ptr<Node> node = std::move(ready.back());
    ready.pop_back();
    std::vector<Tensor> out_grads = std::move(slot(node.get()));
    grads.erase(node.get());
    const bool is_leaf = dynamic_cast<Leaf*>(node.get()) != nullptr;
    std::vector<Tensor> in_grads;
    std::vector<Edge> edges;
    const bool any = std::any_of(out_grads.begin(), out_grads.end(), [](const Tensor& t) { return t.defined(); });
    if (!is_leaf) check_alive(*node);
    if (any) {
      in_grads = node->backward(out_grads, is_leaf ? Part::both : part);
      if (!is_leaf) check_count(*node, in_grads.size(), node->inputs.size());
    }
    if (!is_leaf) {
      bool later = false;
      if (part == Part::input && any)
        for (int i = 0; i < static_cast<int>(node->inputs.size()); ++i) later |= node->wants(i, Part::weight);
      if (later) {
        edges = node->inputs;
        deferred.items.push_back({node, out_grads});
        node->released = true;  // for a second walk; what it saved stays until run()
      } else {
        node->release();
        node->released = true;
        edges = std::move(node->inputs);
        node->inputs.clear();
      }
    }
    out_grads.clear();
    for (std::size_t i = 0; i < edges.size(); ++i) {
      const Edge& e = edges[i];
      if (!e.node) continue;
      if (auto* leaf = dynamic_cast<Leaf*>(e.node.get())) {  // at once: a leaf counts its uses, and memory goes down
        if (i < in_grads.size() && in_grads[i].defined()) {
          check_gradient(*node, i, e, in_grads[i], leaf);
          leaf->add(in_grads[i]);
        } else if (!any) {
          leaf->done();
        }
        continue;
      }
      if (i < in_grads.size() && in_grads[i].defined()) {
        check_gradient(*node, i, e, in_grads[i], nullptr);
        Tensor& s = slot(e.node.get())[static_cast<std::size_t>(e.index)];
        s = s.defined() ? sum_of(s, in_grads[i]) : in_grads[i];
      }
      if (--pending[e.node.get()] == 0) ready.push_back(e.node);
    }
  }
  return deferred;
}

void backward(const Tensor& root) {
  const Tensor roots[] = {root};
  backward(roots, {});
}

void Deferred::run() {
  for (Item& item : items) {
    std::vector<Tensor> g = item.node->backward(item.grads, Part::weight);
    check_count(*item.node, g.size(), item.node->inputs.size());
    for (std::size_t i = 0; i < g.size(); ++i) {
      Leaf* leaf = g[i].defined() ? item.node->leaf(static_cast<int>(i)) : nullptr;
      if (leaf == nullptr) continue;
      check_gradient(*item.node, i, item.node->inputs[i], g[i], leaf);
      leaf->add(g[i]);
    }
    item.node->release();
    item.node->released = true;
    item.node->inputs.clear();
  }
  items.clear();
}

}  // namespace capstan
