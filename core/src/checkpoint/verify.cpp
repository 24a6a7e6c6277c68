// verify(): compares a checkpoint's folder with its manifest, byte for byte by checksum.
#include "checkpoint/manifest.h"

#include <algorithm>

namespace capstan::checkpoint {
namespace {

std::string list(const std::vector<std::string>& names) {
  std::string text;
  for (std::size_t i = 0; i < names.size() && i < 3; ++i) text += (i ? ", " : "") + names[i];
  if (names.size() > 3) text += " and " + std::to_string(names.size() - 3) + " more";
  return text;
}

struct Piece {
  std::string tensor;
  const StoredBox* stored;
};

void verify_file(const Path& folder, const std::string& name, const FileRecord& record, const std::vector<Piece>& pieces,
                 bool fatal, std::vector<Problem>& problems) {
  std::vector<Range> ranges;
  for (const auto& piece : pieces) ranges.push_back({piece.stored->offset, piece.stored->bytes});
  std::vector<std::string> all;
  for (const auto& piece : pieces) all.push_back(piece.tensor);

  const auto path = folder / name;
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  const auto unreadable = [&](const Unreadable& e) {
    problems.push_back({name, all.empty() ? "" : all.front(), e.what(), fatal, e.fault()});
  };
  if (error && status.type() != std::filesystem::file_type::not_found) {
    try {
      fail_reading(path, "be looked at", error.value());
    } catch (const Unreadable& e) {
      unreadable(e);
    }
    return;
  }
  if (status.type() != std::filesystem::file_type::regular) {
    const auto what =
        status.type() == std::filesystem::file_type::not_found ? name + " is missing" : name + " is not a file";
    problems.push_back({name, all.empty() ? "" : all.front(), all.empty() ? what : what + "; it holds " + list(all), fatal});
    return;
  }
  FileDigest digest;
  try {
    digest = digest_file(path, ranges);
  } catch (const Unreadable& e) {
    unreadable(e);
    return;
  } catch (const Error& e) {
    problems.push_back({name, all.empty() ? "" : all.front(), e.what(), fatal});
    return;
  }
  if (digest.bytes != record.bytes) {
    std::vector<std::string> cut;
    for (std::size_t i = 0; i < pieces.size(); ++i)
      if (!ranges[i].complete) cut.push_back(pieces[i].tensor);
    auto text = name + (digest.bytes < record.bytes ? " is cut short" : " is too long") + ": expected " +
                std::to_string(record.bytes) + " bytes, got " + std::to_string(digest.bytes);
    if (!cut.empty()) text += "; lost: " + list(cut);
    problems.push_back({name, cut.empty() ? "" : cut.front(), text, fatal});
  }
  bool payload_damaged = false;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const auto& stored = *pieces[i].stored;
    if (!ranges[i].complete || ranges[i].xxh3 == stored.xxh3) continue;
    payload_damaged = true;
    problems.push_back({name, pieces[i].tensor,
                        "tensor " + pieces[i].tensor + " " + text_of(stored.box) + " in " + name + " is damaged: bytes " +
                            std::to_string(stored.offset) + " to " + std::to_string(stored.offset + stored.bytes) +
                            " have checksum " + hash_text(ranges[i].xxh3) + ", expected " + hash_text(stored.xxh3),
                        fatal});
  }
  if (digest.bytes == record.bytes && digest.xxh3 != record.xxh3 && !payload_damaged) {
    const auto what = pieces.empty() ? " is damaged" : " is damaged outside its tensors' bytes (the format's own metadata)";
    problems.push_back(
        {name, "", name + what + ": checksum " + hash_text(digest.xxh3) + ", expected " + hash_text(record.xxh3), fatal});
  }
}

}  // namespace

std::vector<Problem> verify(const Path& folder, const Manifest& manifest) {
  std::map<std::string, std::vector<Piece>> pieces, opaque;
  for (const auto& [name, tensor] : manifest.tensors) {
    for (const auto& stored : tensor.boxes) (stored.offset >= 0 ? pieces : opaque)[stored.file].push_back({name, &stored});
  }
  std::vector<Problem> problems;
  for (const auto& [name, record] : manifest.files) {
    auto& here = pieces[name];
    std::sort(here.begin(), here.end(), [](const auto& a, const auto& b) { return a.stored->offset < b.stored->offset; });
    // Loading reads the run state and whatever holds a tensor; an index only serves other tools.
    const bool fatal = name == state_name || !here.empty() || !opaque[name].empty();
    verify_file(folder, name, record, here, fatal, problems);
  }
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const auto name = entry->path().filename().string();
    if (name == manifest_name || manifest.files.contains(name)) continue;
    problems.push_back({name, "", name + " does not belong to this checkpoint (its manifest does not list it)", false});
  }
  return problems;
}

std::vector<Problem> verify(const Path& folder) {
  try {
    return verify(folder, read_manifest(folder));
  } catch (const Unreadable& e) {
    return {{manifest_name, "", e.what(), true, e.fault()}};
  } catch (const Error& e) {
    return {{manifest_name, "", e.what(), true}};
  }
}

}  // namespace capstan::checkpoint
