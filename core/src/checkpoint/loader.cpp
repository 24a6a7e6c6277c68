// Loading: strict comparison, verification, and resharding by box intersection.
#include "checkpoint/loader.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

namespace capstan::checkpoint {
namespace {

namespace fs = std::filesystem;

// "3 tensors are missing: a, b, c"
void add_list(std::string& text, const std::vector<std::string>& items, const std::string& what) {
  if (items.empty()) return;
  text += "\n  " + std::to_string(items.size()) + " " + what + ": ";
  constexpr std::size_t shown = 4;
  for (std::size_t i = 0; i < items.size() && i < shown; ++i) text += (i ? ", " : "") + items[i];
  if (items.size() > shown) text += ", and " + std::to_string(items.size() - shown) + " more";
}

using ByName = std::map<std::string, std::vector<const Wanted*>>;

ByName by_name(std::span<const Wanted> wanted) {
  ByName map;
  for (const auto& w : wanted) {
    if (!volume(w.global_shape) || !inside(w.box, w.global_shape) || (w.target == nullptr && !w.take && *volume(w.box.extent) > 0)) {
      fail(Fault::programming, "checkpoint, tensor " + w.name,
           "no target, or box " + text_of(w.box) + " is not inside the global shape " + text_of(w.global_shape));
    }
    map[w.name].push_back(&w);
  }
  return map;
}

void compare(const Path& folder, const Manifest& manifest, const ByName& wanted, const LoadOptions& options) {
  std::vector<std::string> missing, unexpected, different;
  for (const auto& [name, all] : wanted) {
    const auto found = manifest.tensors.find(name);
    if (found == manifest.tensors.end()) {
      missing.push_back(name);
      continue;
    }
    const auto& stored = found->second;
    for (const auto* w : all) {
      if (stored.global_shape == w->global_shape && stored.dtype == w->dtype) continue;
      different.push_back(name + " (checkpoint: " + std::string(name_of(stored.dtype)) + " " + text_of(stored.global_shape) +
                          ", wanted: " + std::string(name_of(w->dtype)) + " " + text_of(w->global_shape) + ")");
      break;
    }
  }
  for (const auto& [name, stored] : manifest.tensors) {
    const bool unread = std::any_of(options.leave_unread.begin(), options.leave_unread.end(),
                                    [&](const auto& prefix) { return name.starts_with(prefix); });
    const bool elsewhere = std::find(options.elsewhere.begin(), options.elsewhere.end(), name) != options.elsewhere.end();
    if (!unread && !elsewhere && !wanted.contains(name)) unexpected.push_back(name);
  }
  if (missing.empty() && unexpected.empty() && different.empty()) return;
  std::string text = "this is a checkpoint of another model or optimizer than the recipe's:";
  add_list(text, missing, "tensors are missing from it");
  add_list(text, unexpected, "tensors in it are not wanted");
  add_list(text, different, "tensors have another shape or element type");
  fail(Fault::input, folder.string(), text + "\n  use the recipe that is stored with the run, or another run.dir");
}

[[noreturn]] void fail_damaged(const Path& folder, const std::string& why) {
  throw Damaged(Fault::input, "[" + folder.string() + "] the checkpoint is damaged: " + why);
}

// verify() found the file's bytes to be right. When they still are, it is not the file that an error of the machine or of
// the format's library speaks of.
[[noreturn]] void fail_box(const Path& folder, const StoredBox& stored, const FileRecord& record, const Error& error) {
  FileDigest digest;
  try {
    digest = digest_file(folder / stored.file, {});
  } catch (const Unreadable&) {
    throw;
  } catch (const Error& e) {  // it has gone since
    fail_damaged(folder, e.what());
  }
  if (error.fault() != Fault::input && digest.bytes == record.bytes && digest.xxh3 == record.xxh3)
    throw Unreadable(error.fault(), std::string(error.what()) + ", though the file's bytes are those that were saved");
  fail_damaged(folder, error.what());
}

void read_box(CheckpointFormat& format, const Path& folder, const std::string& name, const StoredTensor& tensor,
              const StoredBox& stored, const FileRecord& record, const std::vector<const Wanted*>& takers) {
  SavedTensor description;
  description.name = name, description.dtype = tensor.dtype, description.global_shape = tensor.global_shape;
  description.box = stored.box, description.bytes = stored.bytes, description.xxh3 = stored.xxh3;
  description.file = stored.file, description.file_offset = stored.offset;

  const auto* only = takers.size() == 1 ? takers.front() : nullptr;
  const bool direct = only && only->box.begin == stored.box.begin && only->box.extent == stored.box.extent;
  std::unique_ptr<char[]> scratch;
  void* target = direct ? only->target : nullptr;
  if (!direct) scratch.reset(new char[static_cast<std::size_t>(stored.bytes)]), target = scratch.get();  // not zeroed
  try {
    format.read((folder / stored.file).string(), description, target);
  } catch (const Error& e) {
    fail_box(folder, stored, record, e);
  }
  if (const auto hash = xxh3(target, stored.bytes); hash != stored.xxh3) {
    fail_damaged(folder, "tensor " + name + " " + text_of(stored.box) + " was read from " + stored.file + " with checksum " +
                             hash_text(hash) + ", expected " + hash_text(stored.xxh3));
  }
  if (direct) return;
  for (const auto* taker : takers) copy_common(stored.box, target, taker->box, taker->target, size_of(tensor.dtype));
}

Manifest manifest_of(const Path& folder) {
  try {
    return read_manifest(folder);
  } catch (const UnknownVersion&) {
    throw;
  } catch (const Unreadable&) {
    throw;
  } catch (const Error& e) {
    fail_damaged(folder, e.what());
  }
}

std::string read_state(const Path& folder, const Manifest& manifest) {
  const auto& record = manifest.files.at(state_name);
  std::string text;
  try {
    text = read_file(folder / state_name);
  } catch (const Unreadable&) {
    throw;
  } catch (const Error& e) {
    fail_damaged(folder, e.what());
  }
  const auto bytes = static_cast<std::int64_t>(text.size());
  if (bytes != record.bytes || xxh3(text.data(), bytes) != record.xxh3) {
    fail_damaged(folder, std::string(state_name) + " differs from its checksum");
  }
  return text;
}

}  // namespace

std::string read_state(const Path& folder) { return read_state(folder, manifest_of(folder)); }

std::vector<Candidate> candidates(const Path& root, const std::function<void(const std::string&)>& warn) {
  std::map<std::int64_t, Path> found;
  std::error_code error;
  fs::directory_iterator iterator(root, error);
  if (error == std::errc::no_such_file_or_directory) return {};
  for (; !error && iterator != fs::directory_iterator(); iterator.increment(error)) {
    const auto& path = iterator->path();
    const auto name = path.filename().string();
    const auto step = step_kept_in(name);
    if (!step) continue;
    if (name.ends_with(superseded_suffix))
      found.try_emplace(*step, path);
    else
      found[*step] = path;
  }
  if (error) fail_reading(root, "be listed", error.value());
  std::optional<std::int64_t> latest;
  std::string text;
  const auto path = root / latest_name;
  if (fs::status(path, error).type() != fs::file_type::not_found) {
    text = read_file(path);
    if (!text.empty() && text.back() == '\n') text.pop_back();
    latest = step_of(text);
    if (latest && !found.contains(*latest)) latest.reset();
  }
  if (!latest && !found.empty() && warn) {
    warn("[" + path.string() + "] names no checkpoint of this run (it is missing, empty or says another name); " +
         "taking the newest step, " + std::to_string(found.rbegin()->first));
  }
  std::vector<Candidate> order;
  for (auto i = found.rbegin(); i != found.rend(); ++i)
    if (!latest || i->first <= *latest) order.push_back({i->first, i->second});
  for (auto i = found.rbegin(); i != found.rend(); ++i)
    if (latest && i->first > *latest) order.push_back({i->first, i->second});
  return order;
}

Loaded load(const Path& folder, std::span<const Wanted> wanted, const FormatMaker& make_format, const LoadOptions& options) {
  const auto manifest = manifest_of(folder);
  const auto names = by_name(wanted);
  compare(folder, manifest, names, options);

  Loaded loaded{manifest.step, folder, {}, {}};
  std::string fatal;
  int count = 0;
  for (const auto& problem : verify(folder, manifest)) {
    if (problem.fatal && problem.unreadable) throw Unreadable(*problem.unreadable, problem.text);
    if (!problem.fatal)
      loaded.warnings.push_back("[" + folder.string() + "] " + problem.text);
    else if (++count <= 5)
      fatal += (count > 1 ? "; " : "") + problem.text;
  }
  if (count > 5) fatal += "; and " + std::to_string(count - 5) + " problems more";
  if (count > 0) fail_damaged(folder, fatal);
  loaded.state_json = read_state(folder, manifest);

  const auto format = make_format(manifest.format);
  for (const auto& [name, all] : names) {
    const auto& tensor = manifest.tensors.at(name);
    std::vector<Wanted> boxes;
    std::vector<std::unique_ptr<char[]>> room;  // of those that are taken
    for (const auto* w : all) {
      boxes.push_back(*w);
      if (!w->take) continue;
      room.emplace_back(new char[static_cast<std::size_t>(*volume(w->box.extent) * size_of(w->dtype))]);  // not zeroed
      boxes.back().target = room.back().get();
    }
    for (const auto& stored : tensor.boxes) {
      std::vector<const Wanted*> takers;
      for (const auto& w : boxes)
        if (intersect(stored.box, w.box)) takers.push_back(&w);
      if (!takers.empty()) read_box(*format, folder, name, tensor, stored, manifest.files.at(stored.file), takers);
    }
    for (const auto& w : boxes)
      if (w.take) w.take(w.target);
  }
  return loaded;
}

std::optional<Loaded> load_newest(const Path& root, std::span<const Wanted> wanted, const FormatMaker& make_format,
                                  OnDamage on_damage, const std::function<void(const std::string&)>& report,
                                  const LoadOptions& options) {
  const auto order = candidates(root, report);
  std::string damage;
  for (const auto& candidate : order) {
    try {
      auto loaded = load(candidate.folder, wanted, make_format, options);
      for (const auto& warning : loaded.warnings)
        if (report) report(warning);
      if (!damage.empty() && report) {
        report("the checkpoint of step " + std::to_string(loaded.step) +
               " is good and was loaded instead; all after it is lost");
      }
      return loaded;
    } catch (const Unreadable& e) {
      throw Unreadable(e.fault(), std::string(e.what()) + ". The checkpoint of step " + std::to_string(candidate.step) +
                                      " may be good, so no other is taken and nothing is replaced: mend this and start again, or move " +
                                      candidate.folder.string() + " away to go on without it");
    } catch (const Damaged& e) {
      if (on_damage == OnDamage::stop) {
        throw Damaged(Fault::input, std::string(e.what()) + "; the recipe says to stop at a damaged checkpoint");
      }
      if (report) report(e.what());
      damage += std::string("\n  ") + e.what();
    }
  }
  if (damage.empty()) return std::nullopt;
  throw Damaged(Fault::input,
                "[" + root.string() + "] none of the " + std::to_string(order.size()) + " checkpoints is good:" + damage);
}

}  // namespace capstan::checkpoint
