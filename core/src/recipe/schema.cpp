// Schema: how core and plugins declare what a recipe may say.
#include "recipe/values.h"
#include "recipe/yaml.h"

#include <capstan/options.h>

#include <algorithm>

namespace capstan {
namespace {

OptionSpec make(OptionSpec::Type type, std::string name, std::string default_text, std::string help) {
  OptionSpec spec;
  spec.type = type;
  spec.name = std::move(name);
  spec.default_text = std::move(default_text);
  spec.help = std::move(help);
  return spec;
}

/// Names are path parts in messages and overrides; one that is a number would read as a list index there.
bool is_name(const std::string& name) {
  const auto part = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  return !name.empty() && std::all_of(name.begin(), name.end(), part) && !(name[0] >= '0' && name[0] <= '9');
}

}  // namespace

OptionSpec& Schema::add(OptionSpec spec) {
  if (!is_name(spec.name)) {
    fail(Fault::programming, "schema",
         "the option name " + shown(spec.name) + ": expected letters, digits and _, no digit first");
  }
  if (spec.name == "plugin") {
    fail(Fault::programming, "schema", "an option named 'plugin': that key names the plugin itself; choose another name");
  }
  if (find(spec.name)) fail(Fault::programming, "schema", "the option '" + spec.name + "' is declared twice");
  options_.push_back(std::move(spec));
  return options_.back();
}

const OptionSpec* Schema::find(std::string_view name) const {
  const auto at = std::find_if(options_.begin(), options_.end(), [&](const OptionSpec& o) { return o.name == name; });
  return at == options_.end() ? nullptr : &*at;
}

OptionSpec& Schema::flag(std::string name, bool default_value, std::string help) {
  return add(make(OptionSpec::Type::flag, std::move(name), default_value ? "true" : "false", std::move(help)));
}

OptionSpec& Schema::integer(std::string name, std::int64_t default_value, std::string help) {
  return add(make(OptionSpec::Type::integer, std::move(name), std::to_string(default_value), std::move(help)));
}

OptionSpec& Schema::number(std::string name, double default_value, std::string help) {
  return add(make(OptionSpec::Type::number, std::move(name), number_text(default_value), std::move(help)));
}

OptionSpec& Schema::text(std::string name, std::string default_value, std::string help) {
  return add(make(OptionSpec::Type::text, std::move(name), yaml_text(default_value), std::move(help)));
}

OptionSpec& Schema::path(std::string name, std::string default_value, std::string help) {
  return add(make(OptionSpec::Type::path, std::move(name), yaml_text(default_value), std::move(help)));
}

OptionSpec& Schema::list(OptionSpec::Type type, std::string name, std::string default_text, std::string help) {
  using Type = OptionSpec::Type;
  if (type != Type::integers && type != Type::numbers && type != Type::texts && type != Type::paths) {
    fail(Fault::programming, "schema", "list('" + name + "'): expected integers, numbers, texts or paths");
  }
  if (default_text.empty()) default_text = "[]";
  return add(make(type, std::move(name), std::move(default_text), std::move(help)));
}

OptionSpec& Schema::plugin(std::string kind, std::string name, std::string default_plugin, std::string help) {
  OptionSpec spec = make(OptionSpec::Type::plugin, std::move(name), std::move(default_plugin), std::move(help));
  spec.required = spec.default_text.empty();
  spec.plugin_kind = std::move(kind);
  return add(std::move(spec));
}

OptionSpec& Schema::plugins(std::string kind, std::string name, std::string help) {
  OptionSpec spec = make(OptionSpec::Type::plugins, std::move(name), "[]", std::move(help));
  spec.plugin_kind = std::move(kind);
  return add(std::move(spec));
}

OptionSpec& Schema::group(std::string name, Schema schema, std::string help) {
  OptionSpec spec = make(OptionSpec::Type::group, std::move(name), "{}", std::move(help));
  spec.group = std::make_shared<const Schema>(std::move(schema));
  return add(std::move(spec));
}

OptionSpec& Schema::groups(std::string name, Schema schema, std::string help) {
  OptionSpec spec = make(OptionSpec::Type::groups, std::move(name), "[]", std::move(help));
  spec.group = std::make_shared<const Schema>(std::move(schema));
  return add(std::move(spec));
}

OptionSpec& Schema::required(OptionSpec::Type type, std::string name, std::string help) {
  OptionSpec spec = make(type, std::move(name), "", std::move(help));
  spec.required = true;
  return add(std::move(spec));
}

OptionSpec& Schema::optional(OptionSpec::Type type, std::string name, std::string help) {
  OptionSpec spec = make(type, std::move(name), "", std::move(help));
  spec.optional = true;
  return add(std::move(spec));
}

}  // namespace capstan
