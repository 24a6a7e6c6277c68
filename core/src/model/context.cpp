// Carried values, the loss ledger, and the watch over what a call declares.
#include <capstan/model.h>

#include <algorithm>

namespace capstan {

namespace {

bool contains(const std::vector<std::string>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string listed(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all.empty() ? "none" : all;
}

}  // namespace

ForwardContext::CallMark::CallMark(ForwardContext& context, const Call& call) : context_(context) {
  context_.call_ = &call;
  context_.written_.clear();
}

ForwardContext::CallMark::~CallMark() { context_.call_ = nullptr; }

Tensor ForwardContext::get(std::string_view value) const {
  const auto it = values_.find(value);
  if (it != values_.end()) {
    if (call_ != nullptr && !contains(call_->reads, value) && !contains(written_, value))
      fail(Fault::programming, call_->block->name(), "reads the carried value '" + std::string(value) + "', which its call does not declare (reads: " +
                                                         listed(call_->reads) + "): its gradient would be lost; add it to the call's `reads`");
    return it->second;
  }
  std::string known;
  for (const auto& [name, tensor] : values_) known += (known.empty() ? "" : ", ") + name;
  fail(Fault::programming, "forward", "no call has written the carried value '" + std::string(value) + "': there is " + (known.empty() ? "none" : known));
}

void ForwardContext::set(std::string_view value, Tensor t) {
  if (call_ != nullptr) {
    if (t.requires_grad() && !contains(call_->writes, value))
      fail(Fault::programming, call_->block->name(), "writes the carried value '" + std::string(value) + "', which its call does not declare (writes: " +
                                                         listed(call_->writes) + "): its gradient would be lost; add it to the call's `writes`");
    if (!contains(written_, value)) written_.emplace_back(value);
  }
  const auto it = values_.find(value);
  if (it != values_.end()) it->second = std::move(t);
  else values_.emplace(value, std::move(t));
}

Tensor ForwardContext::use(const Parameter& parameter) const {
  if (parameter.cut())
    fail(Fault::programming, parameter.name(),
         "tensor ranks hold pieces of this parameter (its axes are heads, kv_heads, mlp or vocab): use it through nn::Linear, nn::Embedding, "
         "nn::score or nn::logits, which know what to communicate; or give it another axis name, so that every rank holds it whole");
  return grad ? parameter.local() : parameter.local().detach();
}

bool ForwardContext::has(std::string_view value) const { return values_.find(value) != values_.end(); }

void ForwardContext::drop(std::string_view value) {
  const auto it = values_.find(value);
  if (it != values_.end()) values_.erase(it);
}

Tensor ForwardContext::memo(std::string_view key, const std::function<Tensor()>& make) {
  const auto it = memo_.find(key);
  if (it != memo_.end()) return it->second;
  return memo_.emplace(key, make()).first->second;
}

void ForwardContext::loss(std::string_view name, Tensor sum, double count, double weight) {
  losses_.push_back({std::string(name), std::move(sum), count, weight});
}

}  // namespace capstan
