#include <capstan/model.h>

namespace capstan {

Tensor ForwardContext::get(std::string_view value) const {
  const auto it = values_.find(value);
  if (it != values_.end()) return it->second;
  std::string known;
  for (const auto& [name, tensor] : values_) known += (known.empty() ? "" : ", ") + name;
  fail(Fault::programming, "forward", "no call has written the carried value '" + std::string(value) + "': there is " + (known.empty() ? "none" : known));
}

void ForwardContext::set(std::string_view value, Tensor t) {
  const auto it = values_.find(value);
  if (it != values_.end()) it->second = std::move(t);
  else values_.emplace(value, std::move(t));
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
