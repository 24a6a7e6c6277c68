// Module, Block, Layer, Head, Model: the parts that do not depend on what a model is.
#include <capstan/model.h>
#include <capstan/nn.h>
#include <capstan/ops.h>
#include <kernels/backend.h>

#include <algorithm>

namespace capstan {

Module::~Module() = default;
Block::~Block() = default;
Layer::~Layer() = default;
LayerMaker::~LayerMaker() = default;
Head::~Head() = default;
Model::Model() = default;
Model::~Model() = default;

std::string Module::path(std::string_view leaf_name) const {
  return name_.empty() ? std::string(leaf_name) : name_ + "." + std::string(leaf_name);
}

Parameter& Module::declare(std::string_view leaf_name, ParameterSpec spec) {
  Item item;
  item.own = std::make_unique<Parameter>(path(leaf_name), std::move(spec));
  items_.push_back(std::move(item));
  return *items_.back().own;
}

void Module::share(Parameter& parameter) {
  Item item;
  item.shared = &parameter;
  items_.push_back(std::move(item));
}

void Module::adopt(std::shared_ptr<Module> module) {
  Item item;
  item.module = std::move(module);
  items_.push_back(std::move(item));
}

namespace {
void append_once(std::vector<Parameter*>& all, Parameter* p) {
  if (std::find(all.begin(), all.end(), p) == all.end()) all.push_back(p);
}
}  // namespace

std::vector<Parameter*> Module::parameters() const {
  std::vector<Parameter*> all;
  for (const Item& item : items_) {
    if (item.own) append_once(all, item.own.get());
    if (item.shared != nullptr) append_once(all, item.shared);
    if (item.module)
      for (Parameter* p : item.module->parameters()) append_once(all, p);
  }
  return all;
}

void Head::forward(ForwardContext& context) {
  const Tensor& targets = context.batch.stream("targets");
  const Tensor& weight = context.batch.stream("weight");
  const double normalizer = context.batch.step_weight > 0 ? context.batch.step_weight : 1;
  const Tensor scaled = ops::scale(weight.detach(), 1 / normalizer);
  Tensor objective;
  score(context, targets, &scaled, &objective);
  double count = 0;
  const Tensor mine = nn::stream_rows(context, weight);  // as score() does, so that ranks only add
  if (mine.numel() == weight.numel() && context.batch.own_weight >= 0) {
    count = context.batch.own_weight;
  } else if (!mine.is_meta() && mine.device().backend().queue() == nullptr) {  // where calls run behind the host, it does not wait for this
    std::vector<float> host(static_cast<std::size_t>(mine.numel()));
    mine.contiguous().copy_to_host(host.data(), mine.bytes());
    for (const float w : host) count += static_cast<double>(w);
  }
  context.loss("lm", objective, count);
}

std::vector<Parameter*> Model::parameters() const {
  std::vector<Parameter*> all;
  std::vector<const Block*> seen;
  for (const Call& call : calls()) {
    if (std::find(seen.begin(), seen.end(), call.block) != seen.end()) continue;
    seen.push_back(call.block);
    for (Parameter* p : call.block->parameters()) append_once(all, p);
  }
  for (std::size_t i = 0; i < all.size(); ++i)
    for (std::size_t j = i + 1; j < all.size(); ++j)
      if (all[i]->name() == all[j]->name())
        fail(Fault::programming, "model", "two parameters are called '" + all[i]->name() + "': names are identities");
  return all;
}

std::vector<StateSpec> Model::state() const {
  std::vector<StateSpec> all;
  for (const Call& call : calls())
    for (StateSpec& s : call.block->state()) all.push_back(std::move(s));
  return all;
}

}  // namespace capstan
