// Writes resolved options as YAML and schemas as help.
#include "recipe/options_impl.h"
#include "recipe/recipe.h"
#include "recipe/values.h"

#define XXH_INLINE_ALL
#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>

namespace capstan {
namespace {

using Impl = Options::Impl;
using Type = OptionSpec::Type;

struct Line {
  std::string text, comment;
};

template <class T, class Write>
std::string flow_list(const std::vector<T>& values, Write write) {
  std::string out = "[";
  for (std::size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + write(values[i]);
  return out + "]";
}

class Writer {
 public:
  /// `first` opens the first line, `rest` all others: "- " and "  " for an element of a list.
  void map(const Options& options, const std::string& first, const std::string& rest) {
    const Impl& impl = options.impl();
    const auto& specs = impl.schema->options();
    std::string indent = first;
    for (std::size_t i = 0; i < specs.size(); ++i) {
      if (std::holds_alternative<std::monostate>(impl.slots[i].value)) {
        lines_.push_back({rest + "# " + specs[i].name + ":", "not given"});
        continue;
      }
      slot(specs[i], impl.slots[i], indent, rest);
      indent = rest;
    }
  }

  std::string text(Origins origins) const {
    std::string out;
    std::size_t width = 0;
    for (const auto& line : lines_) width = std::max(width, std::min<std::size_t>(line.text.size(), 56));
    for (const auto& line : lines_) {
      const bool only_comment = line.text.find_first_not_of(' ') == line.text.find("# ");
      if (origins == Origins::hide) {
        if (!only_comment) out += line.text + "\n";
      } else {
        out += line.comment.empty() ? line.text + "\n" : fmt::format("{:<{}}  # {}\n", line.text, width, line.comment);
      }
    }
    return out;
  }

 private:
  void put(const std::string& indent, const std::string& name, const std::string& value, const Origin& origin) {
    lines_.push_back({indent + name + ": " + value, origin.text()});
  }

  void choice(const PluginChoice& choice, const Origin& origin, const std::string& first, const std::string& rest) {
    put(first, "plugin", yaml_text(choice.name), origin);
    map(choice.options, rest, rest);
  }

  void slot(const OptionSpec& spec, const Impl::Slot& slot, const std::string& indent, const std::string& rest) {
    const auto line = [&](const std::string& value) { put(indent, spec.name, value, slot.origin); };
    const auto header = [&] { lines_.push_back({indent + spec.name + ":", ""}); };
    const auto integer = [](std::int64_t v) { return std::to_string(v); };
    switch (spec.type) {
      case Type::flag:
        return line(std::get<bool>(slot.value) ? "true" : "false");
      case Type::integer:
        return line(integer(std::get<std::int64_t>(slot.value)));
      case Type::number:
        return line(number_text(std::get<double>(slot.value)));
      case Type::text:
      case Type::path:
        return line(yaml_text(std::get<std::string>(slot.value)));
      case Type::integers:
        return line(flow_list(std::get<std::vector<std::int64_t>>(slot.value), integer));
      case Type::numbers:
        return line(flow_list(std::get<std::vector<double>>(slot.value), number_text));
      case Type::texts:
      case Type::paths:
        return line(flow_list(std::get<std::vector<std::string>>(slot.value), yaml_text));
      case Type::plugin:
        header();
        return choice(std::get<PluginChoice>(slot.value), slot.origin, rest + "  ", rest + "  ");
      case Type::plugins: {
        const auto& choices = std::get<std::vector<PluginChoice>>(slot.value);
        if (choices.empty()) return line("[]");
        header();
        for (const auto& one : choices) choice(one, slot.origin, rest + "  - ", rest + "    ");
        return;
      }
      case Type::group:
        return group(std::get<Options>(slot.value), slot.origin, indent + spec.name + ":", rest + "  ");
      case Type::groups: {
        const auto& groups = std::get<std::vector<Options>>(slot.value);
        if (groups.empty()) return line("[]");
        header();
        for (const auto& one : groups) element(one, slot.origin, rest + "  ");
        return;
      }
    }
  }

  static bool has_values(const Options& options) {
    const auto& slots = options.impl().slots;
    return std::any_of(slots.begin(), slots.end(), [](const Impl::Slot& s) { return s.value.index() != 0; });
  }

  void group(const Options& options, const Origin& origin, const std::string& head, const std::string& indent) {
    if (!has_values(options))
      lines_.push_back({head + " {}", origin.text()});
    else
      lines_.push_back({head, ""});
    map(options, indent, indent);
  }

  void element(const Options& options, const Origin& origin, const std::string& indent) {
    if (!has_values(options)) lines_.push_back({indent + "- {}", origin.text()});
    map(options, indent + "- ", indent + "  ");
  }

  std::vector<Line> lines_;
};

std::string type_name(const OptionSpec& spec) {
  switch (spec.type) {
    case Type::flag:
      return "flag";
    case Type::integer:
      return "integer";
    case Type::number:
      return "number";
    case Type::text:
      return "text";
    case Type::path:
      return "path";
    case Type::plugin:
      return spec.plugin_kind + " plugin";
    case Type::plugins:
      return "list of " + spec.plugin_kind + " plugins";
    case Type::group:
      return "map";
    default:
      return type_words(spec.type).substr(2);  // without the article
  }
}

std::string default_words(const OptionSpec& spec) {
  if (spec.required) return "required";
  if (spec.optional) return "optional";
  return spec.default_text.empty() ? "\"\"" : spec.default_text;
}

void help_lines(const Schema& schema, const std::string& indent, std::string& out) {
  for (const auto& spec : schema.options()) {
    const bool group = spec.type == Type::group;
    std::string facts = type_name(spec);
    if (const std::string range = range_words(spec); !range.empty()) facts += ", " + range;
    if (!spec.unit.empty()) facts += ", in " + spec.unit;
    if (spec.required || spec.optional)
      facts += ", " + default_words(spec);
    else if (!group)
      facts += ", default " + default_words(spec);
    out += indent + spec.name + "  (" + facts + ")\n";
    if (!spec.help.empty()) out += indent + "    " + spec.help + "\n";
    if (spec.group) help_lines(*spec.group, indent + "  ", out);
  }
}

std::string cell(const std::string& text) {
  std::string out;
  for (const char c : text) out += c == '|' ? "\\|" : c == '\n' ? " " : std::string(1, c);
  return out;
}

void markdown_rows(const Schema& schema, const std::string& path, std::string& out) {
  for (const auto& spec : schema.options()) {
    const std::string key = join_key(path, spec.name);
    std::string values = range_words(spec);
    if (!spec.unit.empty()) values += (values.empty() ? "in " : ", in ") + spec.unit;
    if (spec.type != Type::group) {
      const std::string fallback = default_words(spec);
      out +=
          fmt::format("| `{}` | {} | {} | {} | {} |\n", key, type_name(spec),
                      spec.required || spec.optional ? fallback : "`" + cell(fallback) + "`", cell(values), cell(spec.help));
    }
    if (spec.group) markdown_rows(*spec.group, spec.type == Type::groups ? key + "[]" : key, out);
  }
}

}  // namespace

std::string to_yaml(const Options& options, Origins origins) {
  Writer writer;
  writer.map(options, "", "");
  const std::string text = writer.text(origins);
  return text.empty() ? "{}\n" : text;
}

std::string to_yaml(const Recipe& recipe, Origins origins) { return to_yaml(recipe.options, origins); }

std::string recipe_digest(const Options& options) {
  const std::string text = to_yaml(options);
  return fmt::format("{:016x}", static_cast<std::uint64_t>(XXH3_64bits(text.data(), text.size())));
}

std::string help_text(const Schema& schema) {
  std::string out;
  help_lines(schema, "  ", out);
  return out;
}

std::string help_markdown(const Schema& schema) {
  std::string out = "| Key | Type | Default | Values | Meaning |\n|---|---|---|---|---|\n";
  markdown_rows(schema, "", out);
  return out;
}

}  // namespace capstan
