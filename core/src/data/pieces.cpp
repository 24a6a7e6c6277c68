// Cutting inputs into pieces: small enough to bound memory, cut where the tokenizer and the format allow.
#include "data/pieces.h"

#include <capstan/error.h>
#include <capstan/random.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <utility>

namespace capstan::data {
namespace {

constexpr std::int64_t piece_bytes = std::int64_t{1} << 20;

/// Reads `bytes` at `begin` into `text`. A file that shrank since it was listed is an error.
void read_range(const std::string& path, std::int64_t begin, std::int64_t bytes, std::string& text) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail(Fault::input, path, fmt::format("cannot read the file: {}", std::strerror(errno)));
  text.resize(static_cast<std::size_t>(bytes));
  std::int64_t done = 0;
  int code = 0;
  while (done < bytes) {
    const ssize_t n = ::pread(file, text.data() + done, static_cast<std::size_t>(bytes - done), begin + done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      code = n < 0 ? errno : 0;
      break;
    }
    done += n;
  }
  ::close(file);
  if (code != 0) fail(Fault::input, path, fmt::format("cannot read the file: {}", std::strerror(code)));
  if (done < bytes) {
    fail(Fault::input, path,
         fmt::format(
             "the file became shorter while it was read: expected {} bytes, got {}; build again when nothing writes to "
             "it",
             begin + bytes, begin + done));
  }
}

/// The largest cut at or before `cut` that does not split a UTF-8 character.
std::int64_t character_boundary(const std::string& path, std::int64_t cut) {
  const std::int64_t first = std::max<std::int64_t>(0, cut - 3);
  std::string text;
  read_range(path, first, cut + 1 - first, text);
  std::int64_t at = cut;
  while (at > first && (static_cast<unsigned char>(text[static_cast<std::size_t>(at - first)]) & 0xC0) == 0x80) --at;
  return at;
}

std::string canonical(const std::string& path) {
  std::error_code error;
  const auto result = std::filesystem::weakly_canonical(path, error);
  return error ? path : result.string();
}

}  // namespace

PieceSource::PieceSource(const BuildOptions& options) : options_(options), files_(find_inputs(options.inputs)) {
  // A dataset in its own input folder must not eat its earlier self.
  std::vector<std::string> own;
  for (const char* suffix : {".bin", ".idx", ".json"}) {
    own.push_back(canonical(options.prefix + suffix));
    own.push_back(canonical(options.prefix + suffix + ".partial"));
  }
  std::erase_if(files_, [&](const InputFile& f) {
    const bool alike =
        f.path.ends_with(".bin") || f.path.ends_with(".idx") || f.path.ends_with(".json") || f.path.ends_with(".partial");
    return alike && std::find(own.begin(), own.end(), canonical(f.path)) != own.end();
  });
  if (options.max_bytes > 0) choose_files();
  for (const auto& f : files_) total_bytes_ += f.bytes;
}

void PieceSource::choose_files() {
  std::int64_t all = 0;
  for (const auto& f : files_) all += f.bytes;
  if (all <= options_.max_bytes) return;
  if (options_.format != Format::files) {
    share_ = static_cast<double>(options_.max_bytes) / static_cast<double>(all);
    return;
  }
  std::vector<std::size_t> order(files_.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const Rng rng(options_.seed, "data.sample");
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.below(i - 1, i)]);
  std::vector<char> chosen(files_.size(), 0);
  std::int64_t left = options_.max_bytes;
  for (const std::size_t i : order) {
    if (left == 0) break;
    InputFile& f = files_[i];
    chosen[i] = 1;
    if (f.bytes > left) {
      f.bytes = character_boundary(f.path, left);
      break;
    }
    left -= f.bytes;
  }
  std::vector<InputFile> kept;
  for (std::size_t i = 0; i < files_.size(); ++i) {
    if (chosen[i]) kept.push_back(std::move(files_[i]));
  }
  files_ = std::move(kept);
}

std::optional<Piece> PieceSource::next() { return options_.format == Format::files ? next_of_files() : next_of_lines(); }

std::optional<Piece> PieceSource::next_of_files() {
  if (file_ == files_.size()) return std::nullopt;
  const InputFile& f = files_[file_];
  const bool splits = options_.tokenizer->splits_anywhere();
  if (!splits && f.bytes > options_.longest_document) {
    fail(Fault::input, f.path,
         fmt::format(
             "{} bytes are too many for one document: tokenizer '{}' needs it in memory at once, at most {} bytes; split "
             "the file, or use --format lines or jsonl",
             f.bytes, options_.tokenizer->name(), options_.longest_document));
  }
  Piece piece;
  piece.file = file_, piece.begin = at_;
  piece.bytes = splits ? std::min(piece_bytes, f.bytes - at_) : f.bytes;
  piece.starts_document = at_ == 0;
  at_ += piece.bytes;
  piece.ends_document = at_ == f.bytes;
  if (piece.ends_document) ++file_, at_ = 0;
  return piece;
}

std::optional<Piece> PieceSource::next_of_lines() {
  while (file_ < files_.size()) {
    const InputFile& f = files_[file_];
    if (!stream_.is_open()) {
      stream_.clear();
      stream_.open(f.path, std::ios::binary);
      if (!stream_) fail(Fault::input, f.path, fmt::format("cannot read the file: {}", std::strerror(errno)));
      at_ = 0, line_ = 1, carry_.clear();
    }
    Piece piece;
    piece.file = file_, piece.begin = at_, piece.first_line = line_;
    piece.text = std::exchange(carry_, {});
    std::size_t searched = piece.text.size();
    for (;;) {
      const std::size_t before = piece.text.size();
      piece.text.resize(before + static_cast<std::size_t>(piece_bytes));
      stream_.read(piece.text.data() + before, piece_bytes);
      const auto got = static_cast<std::size_t>(stream_.gcount());
      piece.text.resize(before + got);
      if (stream_.bad()) fail(Fault::input, f.path, "cannot read the file: the disk or the network reports a fault");
      if (stream_.eof()) {
        stream_.close();
        break;
      }
      const std::size_t newline = piece.text.rfind('\n');
      if (newline != std::string::npos && newline >= searched) {
        carry_ = piece.text.substr(newline + 1);
        piece.text.resize(newline + 1);
        break;
      }
      searched = piece.text.size();
      if (static_cast<std::int64_t>(searched) > options_.longest_document) {
        fail(Fault::input, fmt::format("{}:{}", f.path, line_),
             fmt::format("the line is longer than {} bytes; is the file text, one document a line?",
                         options_.longest_document));
      }
    }
    piece.bytes = static_cast<std::int64_t>(piece.text.size());
    at_ += piece.bytes;
    line_ += std::count(piece.text.begin(), piece.text.end(), '\n');
    if (!stream_.is_open()) ++file_;
    if (piece.bytes > 0) return piece;
  }
  return std::nullopt;
}

void PieceSource::read_text(Piece& piece) const {
  if (options_.format == Format::files) read_range(files_[piece.file].path, piece.begin, piece.bytes, piece.text);
}

}  // namespace capstan::data
