// The order of a commit. Every step names the stage it has reached, so that tests can end the process there.
#include "checkpoint/commit.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <set>

namespace capstan::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr std::array<std::string_view, 20> stages = {
    "snapshot begun",     "snapshot taken",   "folder created", "shard being written", "shard written",
    "shard checked",      "state written",    "index written",  "manifest written",    "folder flushed",
    "old step set aside", "renamed",          "rename flushed", "latest written",      "latest renamed",
    "latest flushed",     "old step removed", "trash renamed",  "trash removed",       "done"};

constexpr std::string_view temporary_mark = ".tmp-";
constexpr std::string_view trash_prefix = ".trash-";

/// Whether a folder holds this name: a link counts for itself, wherever it leads; no when that cannot be told.
bool entry_exists(const Path& path) {
  std::error_code error;
  return fs::exists(fs::symlink_status(path, error));
}

std::vector<Path> entries(const Path& folder) {
  std::error_code error;
  fs::directory_iterator iterator(folder, error);
  std::vector<Path> paths;
  for (; !error && iterator != fs::directory_iterator(); iterator.increment(error)) paths.push_back(iterator->path());
  if (error) fail_reading(folder, "be listed", error.value());
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::string shard_name(int index, std::string_view extension) {
  auto digits = std::to_string(index);
  if (digits.size() < 5) digits.insert(0, 5 - digits.size(), '0');
  return "shard_" + digits + std::string(extension);
}

}  // namespace

std::span<const std::string_view> save_stages() { return stages; }

std::string step_name(std::int64_t step) {
  auto digits = std::to_string(step);
  if (digits.size() < 6) digits.insert(0, 6 - digits.size(), '0');
  return "step_" + digits;
}

std::optional<std::int64_t> step_of(std::string_view name) {
  if (!name.starts_with("step_")) return std::nullopt;
  std::int64_t step = -1;
  const auto* end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + 5, end, step);
  if (error != std::errc() || stop != end || step < 0 || step_name(step) != name) return std::nullopt;
  return step;
}

std::optional<std::int64_t> step_kept_in(std::string_view name) {
  if (name.ends_with(superseded_suffix)) name.remove_suffix(superseded_suffix.size());
  return step_of(name);
}

void clean(const Path& root) {
  if (!entry_exists(root)) return;
  bool restored = false;
  for (const auto& path : entries(root)) {
    const auto name = path.filename().string();
    if (name.ends_with(superseded_suffix)) {
      const auto original = name.substr(0, name.size() - superseded_suffix.size());
      if (!step_of(original)) continue;
      if (entry_exists(root / original)) {
        remove_tree(path);
      } else {
        rename_to(path, root / original);
        restored = true;
      }
    } else if (const auto mark = name.find(temporary_mark); (mark != std::string::npos && step_of(name.substr(0, mark))) ||
                                                            name.starts_with(trash_prefix) ||
                                                            name == std::string(latest_name) + ".tmp") {
      remove_tree(path);
    }
  }
  if (restored) sync_folder(root);
}

void retain_newest(const Path& root, std::int64_t newest, int keep, const std::string& attempt, const FaultHook& hook) {
  if (keep <= 0) return;
  std::vector<std::int64_t> steps;
  for (const auto& path : entries(root)) {
    const auto step = step_of(path.filename().string());
    if (step && *step <= newest) steps.push_back(*step);
  }
  std::sort(steps.rbegin(), steps.rend());
  auto latest = read_file(root / latest_name);
  while (!latest.empty() && latest.back() == '\n') latest.pop_back();
  for (std::size_t i = static_cast<std::size_t>(keep); i < steps.size(); ++i) {
    const auto name = step_name(steps[i]);
    if (name == latest) continue;
    // Renamed first: a kill while deleting must not leave half a checkpoint under a checkpoint's name.
    const auto trash = root / (std::string(trash_prefix) + name + "-" + attempt);
    rename_to(root / name, trash);
    if (hook) hook("trash renamed");
    remove_tree(trash);
    if (hook) hook("trash removed");
  }
}

Attempt::Attempt(Path root, std::int64_t step, std::string attempt, FaultHook hook)
    : root_(std::move(root)), step_(step), attempt_(std::move(attempt)), hook_(std::move(hook)) {
  if (step < 0) fail(Fault::programming, "checkpoint", "negative step " + std::to_string(step));
  final_ = root_ / step_name(step);
  aside_ = final_.string() + std::string(superseded_suffix);
  temporary_ = root_ / (step_name(step) + std::string(temporary_mark) + attempt_);
}

void Attempt::create() {
  make_folder(temporary_);
  reached("folder created");
}

std::pair<std::string, FileRecord> Attempt::write_shard(CheckpointFormat& format, int index,
                                                        std::span<SavedTensor> tensors) {
  const auto name = shard_name(index, format.extension());
  const auto path = temporary_ / name;
  std::int64_t needed = 0;
  for (const auto& t : tensors) needed += t.bytes;
  // Asked before anything is written: libraries recover badly from a disk that fills under them.
  const auto available = available_bytes(temporary_);
  if (available >= 0 && available < needed) {
    fail(Fault::runtime, path.string(),
         "the disk is full: " + std::to_string(needed) + " bytes needed, " + std::to_string(available) + " available");
  }
  for (auto& t : tensors) t.file = name, t.xxh3 = xxh3(t.data, t.bytes);
  format.write_shard(path.string(), tensors, [this](std::int64_t) { reached("shard being written"); });
  reached("shard written");

  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].file_offset >= 0) order.push_back(i);
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return tensors[a].file_offset < tensors[b].file_offset; });
  std::vector<Range> ranges;
  for (const auto i : order) ranges.push_back({tensors[i].file_offset, tensors[i].bytes});
  const auto digest = digest_file(path, ranges);
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto& t = tensors[order[i]];
    if (!ranges[i].complete || ranges[i].xxh3 != t.xxh3) {
      fail(Fault::runtime, path.string(), "tensor " + t.name + " reads back other bytes than were written; check the disk");
    }
  }
  reached("shard checked");
  return {name, {digest.bytes, digest.xxh3}};
}

std::int64_t Attempt::commit(CheckpointFormat& format, std::span<const SavedTensor> tensors,
                             const std::map<std::string, FileRecord>& shards, const std::string& state_json) {
  Manifest manifest;
  manifest.step = step_;
  manifest.format = std::string(format.name());
  manifest.program = CAPSTAN_VERSION;
  manifest.files = shards;
  for (const auto& t : tensors) {
    auto [found, added] = manifest.tensors.try_emplace(t.name, StoredTensor{t.dtype, t.global_shape, {}});
    if (!added && (found->second.dtype != t.dtype || found->second.global_shape != t.global_shape)) {
      fail(Fault::programming, "checkpoint, tensor " + t.name, "its boxes have different element types or global shapes");
    }
    found->second.boxes.push_back({t.box, t.file, t.file_offset, t.bytes, t.xxh3});
  }
  write_file(temporary_ / state_name, state_json);
  manifest.files[state_name] = {static_cast<std::int64_t>(state_json.size()),
                                xxh3(state_json.data(), static_cast<std::int64_t>(state_json.size()))};
  reached("state written");
  const auto index = "index" + std::string(format.extension());
  format.write_index((temporary_ / index).string(), tensors);
  sync_file(temporary_ / index);
  const auto digest = digest_file(temporary_ / index, {});
  manifest.files[index] = {digest.bytes, digest.xxh3};
  reached("index written");
  const auto text = to_json(manifest);
  write_file(temporary_ / manifest_name, text);
  reached("manifest written");
  sync_folder(temporary_);
  reached("folder flushed");

  const bool replaces = entry_exists(final_);
  if (replaces) {
    remove_tree(aside_);
    rename_to(final_, aside_);
    reached("old step set aside");
  }
  try {
    rename_to(temporary_, final_);
  } catch (const Error&) {
    if (replaces) rename_to(aside_, final_);
    throw;
  }
  reached("renamed");
  sync_folder(root_);
  reached("rename flushed");
  move_latest();
  replaced_ = replaces;
  return manifest.bytes() + static_cast<std::int64_t>(text.size());
}

void Attempt::remove_replaced() {
  if (!replaced_) return;
  remove_tree(aside_);
  reached("old step removed");
}

void Attempt::move_latest() {
  const auto latest = root_ / latest_name, fresh = root_ / (std::string(latest_name) + ".tmp");
  write_file(fresh, step_name(step_) + "\n");
  reached("latest written");
  rename_to(fresh, latest);
  reached("latest renamed");
  sync_folder(root_);
  reached("latest flushed");
}

void Attempt::abandon() noexcept {
  std::error_code error;
  fs::remove_all(temporary_, error);
  fs::remove(root_ / (std::string(latest_name) + ".tmp"), error);
}

}  // namespace capstan::checkpoint
