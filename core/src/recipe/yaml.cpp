// Reads YAML through yaml-cpp's events, so that duplicate keys, aliases and sizes are judged before anything is built.
#include "recipe/yaml.h"

#include <capstan/error.h>

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>
#include <system_error>

namespace capstan {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void refuse(const Origin& origin, const std::string& message) { fail(Fault::input, origin.text(), message); }

/// The length of the UTF-8 sequence at `at`, or 0: overlong forms, surrogates and points past U+10FFFF do not count.
std::size_t utf8_length(const std::string& s, std::size_t at) {
  const auto byte = [&](std::size_t i) { return i < s.size() ? static_cast<unsigned char>(s[i]) : 0U; };
  const unsigned first = byte(at);
  std::size_t length = 0;
  std::uint32_t point = 0, least = 0;
  if (first < 0x80) return 1;
  if ((first & 0xE0) == 0xC0)
    length = 2, point = first & 0x1F, least = 0x80;
  else if ((first & 0xF0) == 0xE0)
    length = 3, point = first & 0x0F, least = 0x800;
  else if ((first & 0xF8) == 0xF0)
    length = 4, point = first & 0x07, least = 0x10000;
  else
    return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) return 0;
    point = point << 6 | (byte(at + i) & 0x3F);
  }
  const bool surrogate = point >= 0xD800 && point <= 0xDFFF;
  return point < least || point > 0x10FFFF || surrogate ? 0 : length;
}

/// Refuses what no recipe needs and what the parser would read in surprising ways.
void check_bytes(const std::string& text, const Origin& start) {
  Origin origin = start;
  bool indentation = true;
  for (std::size_t i = 0; i < text.size();) {
    const auto c = static_cast<unsigned char>(text[i]);
    const std::size_t length = utf8_length(text, i);
    if (length == 0) refuse(origin, fmt::format("byte 0x{:02x} is not UTF-8; save the file as UTF-8", c));
    if (c == 0) refuse(origin, "NUL byte: a recipe is plain text");
    if ((c < 0x20 && c != '\t' && c != '\n' && c != '\r') || c == 0x7F)
      refuse(origin, fmt::format("control character 0x{:02x}; in a text write \"\\x{:02x}\"", c, c));
    if (c == '\t' && indentation) refuse(origin, "tab in the indentation; YAML indents with spaces");
    if (c == '\n') {
      if (origin.line > 0) ++origin.line;
      indentation = true;
    } else if (c != ' ') {
      indentation = false;
    }
    i += length;
  }
}

/// Builds the tree from the parser's events.
class Builder : public YAML::EventHandler {
 public:
  Builder(Origin origin, const YamlLimits& limits, bool many_documents)
      : origin_(std::move(origin)),
        first_line_(std::max(origin_.line, 1)),
        limits_(limits),
        many_documents_(many_documents) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    // The parser never advances past some stray characters: it would hand out empty documents for ever.
    if (++documents_ == 1) return;
    if (many_documents_) refuse(at(mark), "a second YAML document starts here ('---'); a recipe is one document");
    refuse(at(mark), "cannot be read as YAML from here on; is a quote, a bracket or a colon missing before it?");
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    YamlNode node;
    node.origin = at(mark);
    add(std::move(node), anchor);
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end()) refuse(at(mark), "an alias inside the value that it names: such a value has no end");
    count(found->second.nodes, found->second.text, at(mark));
    add(found->second.node, 0, found->second.nodes, found->second.text);
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, const std::string& value) override {
    check_tag(tag, mark);
    YamlNode node;
    node.kind = YamlNode::Kind::scalar;
    node.text = value;
    node.quoted = tag == "!";
    node.origin = at(mark);
    if (value.find('\0') != std::string::npos) refuse(node.origin, "a text that holds a NUL character");
    count(1, value.size(), node.origin);
    add(std::move(node), anchor, 1, value.size());
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::list, mark, tag, anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::map, mark, tag, anchor);
  }
  void OnMapEnd() override { close(); }

  YamlNode take() { return root_ ? std::move(*root_) : YamlNode{}; }

  Origin at(const YAML::Mark& mark) const {
    Origin origin = origin_;
    if (origin.line > 0 || origin.kind == Origin::Kind::file) origin.line = first_line_ + std::max(mark.line, 0);
    return origin;
  }

 private:
  struct Frame {
    YamlNode node;
    YAML::anchor_t anchor = 0;
    std::optional<YamlNode> name;  ///< of a map: the key whose value comes next
    std::size_t nodes = 1, text = 0;
  };
  struct Anchored {
    YamlNode node;
    std::size_t nodes, text;
  };

  void check_tag(const std::string& tag, const YAML::Mark& mark) const {
    if (!tag.empty() && tag != "?" && tag != "!") refuse(at(mark), "the tag " + shown(tag) + "; recipes have no tags");
  }

  void count(std::size_t nodes, std::size_t text, const Origin& origin) {
    nodes_ += nodes;
    text_ += text;
    if (nodes_ > limits_.nodes)
      refuse(origin, fmt::format("more than {} values, aliases counted each time they are used", limits_.nodes));
    if (text_ > limits_.text)
      refuse(origin, fmt::format("more than {} bytes of text, aliases counted each time they are used", limits_.text));
  }

  void open(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    check_tag(tag, mark);
    Frame frame;
    frame.node.kind = kind;
    frame.node.origin = at(mark);
    frame.anchor = anchor;
    count(1, 0, frame.node.origin);
    if (static_cast<int>(stack_.size()) >= limits_.depth)
      refuse(frame.node.origin, fmt::format("nested more than {} levels deep", limits_.depth));
    stack_.push_back(std::move(frame));
  }

  void close() {
    Frame frame = std::move(stack_.back());
    stack_.pop_back();
    add(std::move(frame.node), frame.anchor, frame.nodes, frame.text);
  }

  void add(YamlNode node, YAML::anchor_t anchor, std::size_t nodes = 1, std::size_t text = 0) {
    if (anchor != 0) anchors_[anchor] = {node, nodes, text};
    if (stack_.empty()) {
      root_ = std::move(node);
      return;
    }
    Frame& parent = stack_.back();
    parent.nodes += nodes;
    parent.text += text;
    if (parent.node.kind == YamlNode::Kind::list) {
      parent.node.items.push_back(std::move(node));
    } else if (!parent.name) {
      check_name(node, parent.node);
      parent.name = std::move(node);
    } else {
      if (node.kind == YamlNode::Kind::null) node.origin = parent.name->origin;  // the parser marks what comes after it
      parent.node.entries.push_back({parent.name->text, parent.name->origin, std::move(node)});
      parent.name.reset();
    }
  }

  void check_name(const YamlNode& name, const YamlNode& map) const {
    if (name.kind != YamlNode::Kind::scalar || name.text.empty())
      refuse(name.origin, "a key must be a name, not " + name.describe());
    if (name.text == "<<") refuse(name.origin, "the merge key '<<'; a recipe takes over another one with 'extends:'");
    if (const auto* other = map.find(name.text)) {
      refuse(name.origin,
             fmt::format("the key {} twice in one map, first on line {}; keep one", shown(name.text), other->origin.line));
    }
  }

  Origin origin_;
  int first_line_;
  YamlLimits limits_;
  bool many_documents_;
  int documents_ = 0;
  std::size_t nodes_ = 0, text_ = 0;
  std::vector<Frame> stack_;
  std::map<YAML::anchor_t, Anchored> anchors_;
  std::optional<YamlNode> root_;
};

/// Whether a line after the first content opens a document, to tell that fault from a stray character.
bool has_document_marker(const std::string& text) {
  for (std::size_t at = text.find("\n---"); at != std::string::npos; at = text.find("\n---", at + 1)) {
    const std::size_t end = at + 4;
    if (end >= text.size() || text[end] == ' ' || text[end] == '\n' || text[end] == '\r' || text[end] == '\t') return true;
  }
  return false;
}

std::string plain_words(const std::string& library_message) {
  if (library_message == YAML::ErrorMsg::DOC_IN_SCALAR) return "a quote that opens above this line is never closed";
  return library_message.empty() ? "cannot be read" : library_message;
}

YamlNode parse(const std::string& text, const Origin& origin, const YamlLimits& limits) {
  if (text.size() > limits.bytes) refuse(origin, fmt::format("{} bytes; a recipe may have {}", text.size(), limits.bytes));
  Origin start = origin;
  if (start.kind == Origin::Kind::file) start.line = std::max(start.line, 1);
  check_bytes(text, start);
  const bool bom = text.compare(0, 3, "\xEF\xBB\xBF") == 0;
  // The parser takes the end of the text for a closing quote, but not the end of a document.
  std::istringstream stream((bom ? text.substr(3) : text) + (text.empty() || text.back() != '\n' ? "\n...\n" : "...\n"));
  Builder builder(start, limits, has_document_marker(text));
  try {
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const Error&) {
    throw;
  } catch (const YAML::Exception& e) {
    refuse(builder.at(e.mark), "not YAML: " + plain_words(e.msg));
  } catch (const std::exception& e) {
    refuse(start, std::string("not YAML: ") + e.what());
  }
  return builder.take();
}

}  // namespace

std::string Origin::text() const {
  if (kind == Kind::command_line) return "command line";
  if (kind == Kind::default_value) return "default";
  return line > 0 ? fmt::format("{}:{}", file, line) : file;
}

std::string Origin::folder() const {
  std::error_code error;
  const fs::path cwd = fs::current_path(error);
  if (error) fail(Fault::runtime, text(), "the working directory cannot be read: " + error.message());
  if (kind != Kind::file) return cwd.string();
  const fs::path folder = (cwd / fs::path(file)).lexically_normal().parent_path();
  return folder.empty() ? "/" : folder.string();
}

const YamlNode::Entry* YamlNode::find(const std::string& name) const {
  const auto at = std::find_if(entries.begin(), entries.end(), [&](const Entry& e) { return e.name == name; });
  return at == entries.end() ? nullptr : &*at;
}

YamlNode::Entry* YamlNode::find(const std::string& name) { return const_cast<Entry*>(std::as_const(*this).find(name)); }

std::string YamlNode::describe() const {
  switch (kind) {
    case Kind::null:
      return "nothing";
    case Kind::scalar:
      return quoted ? "the text " + shown(text) : shown(text);
    case Kind::list:
      return "a list";
    case Kind::map:
      return "a map";
  }
  return "nothing";
}

YamlNode parse_yaml(const std::string& text, const Origin& origin, const YamlLimits& limits) {
  YamlNode root = parse(text, origin, limits);
  if (root.kind == YamlNode::Kind::null)
    refuse(origin, "there is nothing in it; expected a map of keys, such as 'model: gpt'");
  if (root.kind != YamlNode::Kind::map) {
    refuse(root.origin, "the whole is " + root.describe() + "; expected a map of keys, such as 'model: gpt'");
  }
  return root;
}

YamlNode parse_yaml_value(const std::string& text, const Origin& origin, const YamlLimits& limits) {
  if (text.empty() || std::string_view("[{\"'").find(text.front()) == std::string_view::npos) {
    if (text.size() > limits.bytes) refuse(origin, fmt::format("{} bytes; a value may have {}", text.size(), limits.bytes));
    check_bytes(text, origin);
    YamlNode node;
    node.kind = YamlNode::Kind::scalar;
    node.text = text;
    node.origin = origin;
    return node;
  }
  return parse(text, origin, limits);
}

YamlNode read_yaml_file(const std::string& path, const YamlLimits& limits) {
  Origin origin{Origin::Kind::file, path, 0};
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (path.find('\0') != std::string::npos) refuse(origin, "a NUL character in the name of the file");
  if (status.type() == fs::file_type::not_found) refuse(origin, "there is no such file");
  if (status.type() == fs::file_type::directory) refuse(origin, "this is a folder; expected a recipe file (.yaml)");
  if (!fs::is_regular_file(status)) {
    refuse(origin, error ? "cannot be opened: " + error.message() : "not a regular file; expected a recipe file (.yaml)");
  }
  // Read to the limit and one byte on instead of trusting the size: files under /proc say 0.
  std::ifstream stream(path, std::ios::binary);
  if (!stream) refuse(origin, "cannot be opened; may you read it?");
  std::string text(limits.bytes + 1, '\0');
  stream.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (stream.bad()) refuse(origin, "cannot be read");
  text.resize(static_cast<std::size_t>(stream.gcount()));
  if (text.size() > limits.bytes) {
    refuse(origin, fmt::format("larger than {} bytes; is this a recipe?", limits.bytes));
  }
  return parse_yaml(text, origin, limits);
}

std::string shown(const std::string& text) {
  constexpr std::size_t most = 60;
  std::string out = "'";
  for (std::size_t i = 0; i < text.size();) {
    if (out.size() > most) return out + "...'";
    const auto c = static_cast<unsigned char>(text[i]);
    const std::size_t length = utf8_length(text, i);
    if (c == '\n')
      out += "\\n";
    else if (c == '\t')
      out += "\\t";
    else if (c < 0x20 || c == 0x7F || length == 0)
      out += fmt::format("\\x{:02x}", c);
    else
      out.append(text, i, length);
    i += std::max<std::size_t>(length, 1);
  }
  return out + "'";
}

}  // namespace capstan
