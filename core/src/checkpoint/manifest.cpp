// MANIFEST.json: writing and strict parsing.
#include "checkpoint/manifest.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <set>

namespace capstan::checkpoint {
namespace {

using nlohmann::json;

constexpr const char* own_hash_key = "xxh3_of_all_above";
constexpr int deepest = 8;  // levels of a manifest, with room; deeper text is hostile and never built

// A view of one JSON object that must be used up: finish() refuses what nobody asked for.
class Fields {
 public:
  Fields(const json& value, std::string where) : value_(value), where_(std::move(where)) {
    if (!value.is_object()) fail(Fault::input, where_, std::string("expected an object, got ") + value.type_name());
  }
  const json& at(const char* key) {
    const auto found = value_.find(key);
    if (found == value_.end()) fail(Fault::input, where_, std::string("the field \"") + key + "\" is missing");
    used_.insert(key);
    return *found;
  }
  std::string text(const char* key) {
    const auto& v = at(key);
    if (!v.is_string()) wrong(key, "a text", v);
    return v.get<std::string>();
  }
  std::int64_t integer(const char* key) { return integer_of(at(key), key); }
  std::uint64_t hash(const char* key) {
    std::uint64_t hash = 0;
    if (!parse_hash(text(key), hash)) wrong(key, "16 hexadecimal digits", at(key));
    return hash;
  }
  Shape shape(const char* key) {
    const auto& v = at(key);
    if (!v.is_array()) wrong(key, "a list of integers", v);
    Shape shape;
    for (const auto& x : v) shape.push_back(integer_of(x, key));
    return shape;
  }
  void finish() const {
    for (const auto& [key, unused] : value_.items()) {
      if (!used_.contains(key)) fail(Fault::input, where_, "unknown field \"" + key + "\"");
    }
  }
  const std::string& where() const { return where_; }

 private:
  std::int64_t integer_of(const json& v, const char* key) const {
    if (!v.is_number_integer() || (v.is_number_unsigned() && v.get<std::uint64_t>() > INT64_MAX))
      wrong(key, "an integer", v);
    return v.get<std::int64_t>();
  }
  [[noreturn]] void wrong(const char* key, const char* expected, const json& got) const {
    fail(Fault::input, where_, std::string("\"") + key + "\": expected " + expected + ", got " + got.dump().substr(0, 80));
  }

  const json& value_;
  std::string where_;
  std::set<std::string> used_;
};

bool plain_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name != manifest_name &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) { return c > 0x20 && c != '/' && c != 0x7f; });
}

// Throws when the manifest contradicts itself. One rule for what is written and what is read.
void check(const Manifest& m, Fault fault, const std::string& where) {
  if (m.step < 0) fail(fault, where, "negative step " + std::to_string(m.step));
  if (!m.files.contains(state_name)) fail(fault, where, std::string("no file ") + state_name + " is listed");
  for (const auto& [name, record] : m.files) {
    if (!plain_file_name(name)) fail(fault, where, "\"" + name + "\" is not the name of a file in a checkpoint's folder");
    if (record.bytes < 0) fail(fault, where, "file " + name + " has a negative size");
  }
  for (const auto& [name, tensor] : m.tensors) {
    const auto at = where + ", tensor " + name;
    if (const auto why = name_fault(name); !why.empty()) fail(fault, at, why);
    const auto total = volume(tensor.global_shape);
    std::int64_t ignored = 0;
    if (!total || __builtin_mul_overflow(*total, size_of(tensor.dtype), &ignored)) {
      fail(fault, at, "impossible global shape " + text_of(tensor.global_shape));
    }
    std::vector<Box> boxes;
    for (const auto& stored : tensor.boxes) {
      if (!inside(stored.box, tensor.global_shape)) {
        fail(fault, at, "box " + text_of(stored.box) + " is not inside the global shape " + text_of(tensor.global_shape));
      }
      const auto file = m.files.find(stored.file);
      if (file == m.files.end()) fail(fault, at, "lies in " + stored.file + ", which is not listed among the files");
      const auto bytes = *volume(stored.box.extent) * size_of(tensor.dtype);
      if (stored.bytes != bytes) {
        fail(fault, at,
             "box " + text_of(stored.box) + ": expected " + std::to_string(bytes) + " bytes, got " +
                 std::to_string(stored.bytes));
      }
      if (stored.offset < -1 || (stored.offset >= 0 && stored.offset > file->second.bytes - bytes)) {
        fail(fault, at, "its bytes do not lie inside " + stored.file);
      }
      boxes.push_back(stored.box);
    }
    if (const auto why = tiling_fault(tensor.global_shape, boxes); !why.empty()) fail(fault, at, why);
  }
}

StoredTensor parse_tensor(const json& value, const std::string& where) {
  Fields fields(value, where);
  StoredTensor tensor;
  tensor.dtype = dtype_from(fields.text("dtype"));
  tensor.global_shape = fields.shape("shape");
  const auto& boxes = fields.at("boxes");
  if (!boxes.is_array()) fail(Fault::input, where, "\"boxes\": expected a list");
  fields.finish();
  for (const auto& item : boxes) {
    Fields box(item, where);
    StoredBox stored;
    stored.box.begin = box.shape("begin");
    stored.box.extent = box.shape("extent");
    stored.file = box.text("file");
    stored.offset = box.integer("offset");
    stored.bytes = box.integer("bytes");
    stored.xxh3 = box.hash("xxh3");
    box.finish();
    tensor.boxes.push_back(std::move(stored));
  }
  return tensor;
}

Manifest parse_version_1(const json& document, const std::string& where) {
  Fields fields(document, where);
  Manifest m;
  fields.at("format_version");
  m.step = fields.integer("step");
  m.format = fields.text("format");
  m.program = fields.text("program");
  const auto& files = fields.at("files");
  const auto& tensors = fields.at("tensors");
  fields.finish();
  if (!files.is_object() || !tensors.is_object()) fail(Fault::input, where, "\"files\" and \"tensors\" must be objects");
  for (const auto& [name, value] : files.items()) {
    Fields file(value, where + ", file " + name);
    m.files[name] = {file.integer("bytes"), file.hash("xxh3")};
    file.finish();
  }
  for (const auto& [name, value] : tensors.items()) m.tensors[name] = parse_tensor(value, where + ", tensor " + name);
  return m;
}

}  // namespace

std::int64_t Manifest::bytes() const {
  std::int64_t sum = 0;
  for (const auto& [name, record] : files) sum += record.bytes;
  return sum;
}

std::string name_fault(const std::string& name) {
  if (name.empty()) return "a tensor's name is empty";
  if (name.size() > 4096) return "a tensor's name is longer than 4096 bytes";
  for (const unsigned char c : name) {
    if (c < 0x20 || c == 0x7f) return "a tensor's name has a control character";
  }
  for (std::size_t begin = 0; begin <= name.size();) {
    const auto end = std::min(name.find('/', begin), name.size());
    const auto part = name.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") return "a tensor's name has an empty part, \".\" or \"..\": " + name;
    begin = end + 1;
  }
  try {
    (void)json(name).dump();
  } catch (const json::exception&) {
    return "a tensor's name is not UTF-8";
  }
  return {};
}

std::string to_json(const Manifest& m) {
  check(m, Fault::programming, "checkpoint manifest");
  json files = json::object(), tensors = json::object();
  for (const auto& [name, record] : m.files) files[name] = {{"bytes", record.bytes}, {"xxh3", hash_text(record.xxh3)}};
  for (const auto& [name, tensor] : m.tensors) {
    json boxes = json::array();
    for (const auto& b : tensor.boxes) {
      boxes.push_back({{"begin", b.box.begin},
                       {"extent", b.box.extent},
                       {"file", b.file},
                       {"offset", b.offset},
                       {"bytes", b.bytes},
                       {"xxh3", hash_text(b.xxh3)}});
    }
    tensors[name] = {{"dtype", std::string(name_of(tensor.dtype))}, {"shape", tensor.global_shape}, {"boxes", boxes}};
  }
  json document = {{"format_version", format_version},
                   {"step", m.step},
                   {"format", m.format},
                   {"program", m.program},
                   {"files", files},
                   {"tensors", tensors}};
  const auto compact = document.dump();
  document[own_hash_key] = hash_text(xxh3(compact.data(), static_cast<std::int64_t>(compact.size())));
  return document.dump(1) + "\n";
}

Manifest parse_manifest(const std::string& text, const std::string& where) {
  json document;
  try {
    document = json::parse(text, [&](int depth, json::parse_event_t, json&) {
      if (depth > deepest) fail(Fault::input, where, "nested too deeply for a manifest");
      return true;
    });
  } catch (const json::exception& e) {
    fail(Fault::input, where, std::string("not a manifest: ") + e.what());
  }
  if (!document.is_object() || !document.contains("format_version") || !document["format_version"].is_number_integer()) {
    fail(Fault::input, where, "not a checkpoint's manifest: no integer \"format_version\"");
  }
  const auto version = document["format_version"].get<std::int64_t>();
  const auto own_hash = document.find(own_hash_key);
  if (own_hash == document.end() || !own_hash->is_string()) {
    fail(Fault::input, where, std::string("the field \"") + own_hash_key + "\" is missing");
  }
  const auto expected = own_hash->get<std::string>();
  document.erase(own_hash_key);
  const auto compact = document.dump();
  const auto got = hash_text(xxh3(compact.data(), static_cast<std::int64_t>(compact.size())));
  if (got != expected)
    fail(Fault::input, where, "the manifest is damaged: checksum " + expected + ", its content has " + got);
  if (version < 1 || version > format_version) {
    throw UnknownVersion(Fault::input, "[" + where + "] checkpoint format version " + std::to_string(version) +
                                           ": this program reads 1 to " + std::to_string(format_version) +
                                           "; use the Capstan that wrote it, or a newer one");
  }
  auto manifest = parse_version_1(document, where);
  check(manifest, Fault::input, where);
  return manifest;
}

Manifest read_manifest(const Path& folder) {
  const auto path = folder / manifest_name;
  return parse_manifest(read_file(path), path.string());
}

}  // namespace capstan::checkpoint
