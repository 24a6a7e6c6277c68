// defines: Chain: a model of any length for pipeline tests, with a value that skips over stages, one without a gradient, losses
// on the way, a block that is called twice; and its microbatches.
#pragma once
#include <capstan/model.h>
#include <capstan/ops.h>
#include <capstan/walk.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace capstan::pipeline_test {

constexpr std::int64_t width = 8;

inline ParameterSpec square() {
  ParameterSpec spec;
  spec.dims = {{{"out", width, 1, ""}}, {{"in", width, 1, ""}}};
  spec.init = {Init::Kind::normal, 0.4};
  return spec;
}

/// What a block does is a function.
class Does : public Block {
 public:
  using What = std::function<void(Does&, ForwardContext&)>;
  Does(const std::string& name, What what) : Block(name), what_(std::move(what)) { w = &declare("w", square()); }
  void forward(ForwardContext& c) override { what_(*this, c); }
  Parameter* w;

 private:
  What what_;
};

class LastHead : public Head {
 public:
  LastHead() : Head("head") { w = &declare("w", square()); }
  void forward(ForwardContext& c) override {
    const Tensor h = ops::add(c.get("h"), c.get("skip"));
    c.loss("lm", ops::sum_all(ops::tanh(ops::linear(h, c.use(*w)))), static_cast<double>(h.size(0)));
  }
  Score score(ForwardContext&, const Tensor&, const Tensor*, Tensor*) override { return {}; }
  Tensor logits(ForwardContext&, const Tensor&) override { return {}; }
  std::int64_t vocabulary() const override { return 1; }
  Parameter* w;
};

/// first -> h, skip, order; middles: h -> h, the one at `mixes` reads skip and order too, the ones at 1 and at the end are the
/// same block; head: h, skip -> loss. `fault` is called in each middle's forward.
class Chain : public Model {
 public:
  explicit Chain(int middles, std::function<void(int middle, ForwardContext&)> fault = {}) {
    calls_.push_back({&first_, {}, {"h", "skip", "order"}});
    for (int i = 0; i < middles; ++i) {
      const bool mixes = i == middles / 2, repeats = i == middles - 1 && middles > 2;
      if (!repeats)
        middles_.emplace_back("middle" + std::to_string(i), [i, mixes, fault](Does& b, ForwardContext& c) {
          if (fault) fault(i, c);
          Tensor h = ops::linear(c.get("h"), c.use(*b.w), {}, c.get("h"));
          if (mixes) h = ops::add(h, ops::gather(ops::mul(c.get("skip"), c.get("skip")), c.get("order")));
          h = ops::dropout(h, c.training ? 0.25 : 0, c.random("middle" + std::to_string(i)), c.batch.space().sample_ids);
          if (i % 2 == 1) c.loss("auxiliary", ops::sum_all(ops::mul(h, h)), static_cast<double>(h.size(0)), 0.125);
          c.set("h", ops::gelu(h));
        });
      Call call{repeats ? &middles_[1] : &middles_.back(), {"h"}, {"h"}};
      if (mixes) call.reads = {"h", "skip", "order"};
      calls_.push_back(call);
    }
    calls_.push_back({&head_, {"h", "skip"}, {}});
  }
  const std::vector<Call>& calls() const override { return calls_; }
  Head& head(std::string_view) override { return head_; }
  std::int64_t vocabulary() const override { return 1; }
  std::int64_t hidden() const override { return width; }
  std::int64_t longest() const override { return 0; }
  std::string describe() const override { return "chain"; }

  void place(Device& device, DType dtype) {
    for (Parameter* p : parameters()) {
      const Tensor t = Tensor::empty(p->shape(), dtype, device);
      p->initialize(3, t);
      p->place(t);
    }
  }
  std::vector<Call>& edit() { return calls_; }

 private:
  Does first_{"first", [](Does& b, ForwardContext& c) {
    const Tensor& x = c.batch.stream("x");
    const Tensor y = ops::linear(ops::cast(ops::reshape(x, {x.numel() / width, width}), c.dtype), c.use(*b.w));
    c.set("h", ops::tanh(y));
    c.set("skip", ops::sigmoid(y));
    std::vector<std::int32_t> back(static_cast<std::size_t>(y.size(0)));
    for (std::size_t i = 0; i < back.size(); ++i) back[i] = static_cast<std::int32_t>(back.size() - 1 - i);
    c.set("order", Tensor::of<std::int32_t>(back, Dims{y.size(0)}, c.device));
  }};
  std::deque<Does> middles_;
  LastHead head_;
  std::vector<Call> calls_;
};

/// Microbatch number m of `rows` rows.
inline Batch batch_of(Device& device, std::int64_t rows, int m) {
  const std::vector<std::int32_t> tokens(static_cast<std::size_t>(rows), 0), lengths{static_cast<std::int32_t>(rows)};
  Batch batch = make_batch(device, tokens, lengths, {}, {}, 1000 * m);
  std::vector<double> x;
  const Rng rng(4, "x" + std::to_string(m));
  for (std::int64_t i = 0; i < rows * width; ++i) x.push_back(rng.normal(static_cast<std::uint64_t>(i)));
  batch.set("x", Tensor::of<double>(x, {rows * width}, device));
  return batch;
}

inline ForwardContext context_of(const Batch& batch, Device& device, DType dtype, bool grad = true) {
  ForwardContext c(batch, device, dtype);
  c.grad = c.training = grad;
  c.step = 9;
  return c;
}

}  // namespace capstan::pipeline_test
