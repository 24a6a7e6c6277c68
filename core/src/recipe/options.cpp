// Options: the values that a recipe gave, asked for by name and type.
#include "recipe/options_impl.h"
#include "recipe/recipe.h"

#include <fmt/format.h>

namespace capstan {
namespace {

using Impl = Options::Impl;
using Type = OptionSpec::Type;

/// What an Options without values refers to, so that asking it is an error with words and not a null pointer.
std::shared_ptr<const Impl> empty_impl() {
  static const auto empty = std::make_shared<const Impl>(Impl{std::make_shared<const Schema>(), "", {}});
  return empty;
}

std::string options_words(const Impl& impl) { return impl.key.empty() ? "options" : "options of " + impl.key; }

std::size_t index_of(const Impl& impl, std::string_view name) {
  const auto& specs = impl.schema->options();
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].name == name) return i;
  }
  std::vector<std::string> known;
  for (const auto& spec : specs) known.push_back(spec.name);
  const std::string near = nearest(std::string(name), known);
  fail(Fault::programming, options_words(impl),
       fmt::format("no option '{}' is declared{}", name, near.empty() ? "" : "; did you mean '" + near + "'?"));
}

template <class T>
const T& get(const Impl& impl, std::string_view name, Type type) {
  const std::size_t i = index_of(impl, name);
  const OptionSpec& spec = impl.schema->options()[i];
  // A path is a text too: code that only passes it on need not care.
  const bool text = (type == Type::text && spec.type == Type::path) || (type == Type::texts && spec.type == Type::paths);
  if (spec.type != type && !text) {
    fail(Fault::programming, options_words(impl),
         fmt::format("'{}' was asked for as {} but is declared as {}", name, type_words(type), type_words(spec.type)));
  }
  if (const T* value = std::get_if<T>(&impl.slots[i].value)) return *value;
  fail(Fault::programming, options_words(impl),
       fmt::format("'{}' was not given: ask has() before an optional option", name));
}

}  // namespace

Options::Options() : impl_(empty_impl()) {}
Options::~Options() = default;
Options::Options(const Options&) = default;
Options& Options::operator=(const Options&) = default;
// A moved-from Options stays askable: moving copies the pointer.
Options::Options(Options&& other) noexcept : impl_(other.impl_) {}
Options& Options::operator=(Options&& other) noexcept {
  impl_ = other.impl_;
  return *this;
}
Options::Options(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

bool Options::flag(std::string_view name) const { return get<bool>(*impl_, name, Type::flag); }
std::int64_t Options::integer(std::string_view name) const { return get<std::int64_t>(*impl_, name, Type::integer); }
double Options::number(std::string_view name) const { return get<double>(*impl_, name, Type::number); }
const std::string& Options::text(std::string_view name) const { return get<std::string>(*impl_, name, Type::text); }
const std::string& Options::path(std::string_view name) const { return get<std::string>(*impl_, name, Type::path); }

const std::vector<std::int64_t>& Options::integers(std::string_view name) const {
  return get<std::vector<std::int64_t>>(*impl_, name, Type::integers);
}
const std::vector<double>& Options::numbers(std::string_view name) const {
  return get<std::vector<double>>(*impl_, name, Type::numbers);
}
const std::vector<std::string>& Options::texts(std::string_view name) const {
  return get<std::vector<std::string>>(*impl_, name, Type::texts);
}
const std::vector<std::string>& Options::paths(std::string_view name) const {
  return get<std::vector<std::string>>(*impl_, name, Type::paths);
}
const PluginChoice& Options::plugin(std::string_view name) const { return get<PluginChoice>(*impl_, name, Type::plugin); }
const std::vector<PluginChoice>& Options::plugins(std::string_view name) const {
  return get<std::vector<PluginChoice>>(*impl_, name, Type::plugins);
}
const Options& Options::group(std::string_view name) const { return get<Options>(*impl_, name, Type::group); }
const std::vector<Options>& Options::groups(std::string_view name) const {
  return get<std::vector<Options>>(*impl_, name, Type::groups);
}

bool Options::has(std::string_view name) const {
  return !std::holds_alternative<std::monostate>(impl_->slots[index_of(*impl_, name)].value);
}

std::string Options::where(std::string_view name) const {
  const std::size_t i = index_of(*impl_, name);
  return where_text(impl_->slots[i].origin, join_key(impl_->key, std::string(name)));
}

void Options::refuse(std::string_view name, const std::string& why) const { fail(Fault::input, where(name), why); }

Options with_path(const Options& options, std::string_view group, std::string_view name, std::string path) {
  const Options& before = options.group(group);
  (void)before.path(name);  // that it is one
  auto inner = std::make_shared<Impl>(before.impl());
  inner->slots[index_of(*inner, name)].value = std::move(path);
  auto outer = std::make_shared<Impl>(options.impl());
  outer->slots[index_of(*outer, group)].value = Options(std::move(inner));
  return Options(std::move(outer));
}

std::string join_key(const std::string& path, const std::string& name) { return path.empty() ? name : path + "." + name; }

std::string where_text(const Origin& origin, const std::string& key) {
  if (origin.kind == Origin::Kind::default_value) return key + " (default)";
  return key.empty() ? origin.text() : origin.text() + ", " + key;
}

std::string type_words(OptionSpec::Type type) {
  switch (type) {
    case Type::flag:
      return "true or false";
    case Type::integer:
      return "an integer";
    case Type::number:
      return "a number";
    case Type::text:
      return "a text";
    case Type::path:
      return "a path";
    case Type::integers:
      return "a list of integers";
    case Type::numbers:
      return "a list of numbers";
    case Type::texts:
      return "a list of texts";
    case Type::paths:
      return "a list of paths";
    case Type::plugin:
      return "a plugin";
    case Type::plugins:
      return "a list of plugins";
    case Type::group:
      return "a map";
    case Type::groups:
      return "a list of maps";
  }
  return "a value";
}

}  // namespace capstan
