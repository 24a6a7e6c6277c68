// Resolved options as JSON, for programs beside this one.
#include "recipe/options_impl.h"
#include "recipe/recipe.h"

#include <nlohmann/json.hpp>

namespace capstan {

namespace {

using Json = nlohmann::ordered_json;

Json json_of(const Options& options);

struct Writer {
  Json operator()(std::monostate) const { return nullptr; }
  Json operator()(const PluginChoice& c) const {
    Json j{{"plugin", c.name}};
    j.update(json_of(c.options));
    return j;
  }
  Json operator()(const Options& o) const { return json_of(o); }
  Json operator()(const std::vector<PluginChoice>& list) const { return each(list); }
  Json operator()(const std::vector<Options>& list) const { return each(list); }
  template <class T>
  Json operator()(const T& value) const { return value; }

 private:
  template <class T>
  Json each(const std::vector<T>& list) const {
    Json j = Json::array();
    for (const T& x : list) j.push_back((*this)(x));
    return j;
  }
};

Json json_of(const Options& options) {
  const Options::Impl& impl = options.impl();
  Json j = Json::object();
  for (std::size_t i = 0; i < impl.slots.size(); ++i) j[impl.schema->options()[i].name] = std::visit(Writer{}, impl.slots[i].value);
  return j;
}

}  // namespace

std::string to_json(const Options& options) { return json_of(options).dump(); }

}  // namespace capstan
