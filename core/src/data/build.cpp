// Building a dataset: workers encode pieces in any order, the caller's thread writes them in theirs.
#include "data/build.h"

#include <capstan/error.h>
#include <capstan/random.h>
#include <fmt/format.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <filesystem>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <thread>
#include <utility>

#include "data/pieces.h"

namespace capstan::data {
namespace {

/// A piece, encoded. Tokens [0, ends[0]) close the open document, and so on; what follows the last end stays open.
struct Encoded {
  std::vector<std::int32_t> tokens;
  std::vector<std::size_t> ends;
  std::int64_t bytes = 0, empty = 0;
  std::uint64_t digest = 0;
  std::exception_ptr error;
};

class Encoder {
 public:
  Encoder(const BuildOptions& options, const PieceSource& source) : options_(options), source_(source) {}

  Encoded encode(Piece& piece) const {
    Encoded result;
    source_.read_text(piece);
    result.bytes = piece.bytes;
    result.digest = XXH3_64bits(piece.text.data(), piece.text.size());
    if (options_.format == Format::files) {
      options_.tokenizer->encode(piece.text, result.tokens);
      if (piece.ends_document) end_document(result, piece.starts_document ? 0 : -1);
    } else {
      encode_lines(piece, result);
    }
    return result;
  }

 private:
  /// `begin` is where the document's tokens begin, -1 when they began in an earlier piece.
  void end_document(Encoded& result, std::int64_t begin) const {
    if (begin == static_cast<std::int64_t>(result.tokens.size())) {
      ++result.empty;
      return;
    }
    if (options_.tokenizer->end_of_document() >= 0) result.tokens.push_back(options_.tokenizer->end_of_document());
    result.ends.push_back(result.tokens.size());
  }

  void encode_lines(const Piece& piece, Encoded& result) const {
    const Rng rng(options_.seed, "data.sample", piece.file);
    std::string_view rest = piece.text;
    for (std::int64_t number = piece.first_line; !rest.empty(); ++number) {
      std::string_view line = rest.substr(0, rest.find('\n'));
      rest.remove_prefix(std::min(rest.size(), line.size() + 1));
      if (line.ends_with('\r')) line.remove_suffix(1);
      if (line.find_first_not_of(" \t\r\f\v") == std::string_view::npos) continue;
      if (source_.share() < 1 && rng.uniform(static_cast<std::uint64_t>(number)) >= source_.share()) continue;
      const auto begin = static_cast<std::int64_t>(result.tokens.size());
      if (options_.format == Format::lines) {
        options_.tokenizer->encode(line, result.tokens);
      } else {
        options_.tokenizer->encode(text_of(line, piece.file, number), result.tokens);
      }
      end_document(result, begin);
    }
  }

  std::string text_of(std::string_view line, std::size_t file, std::int64_t number) const {
    const auto where = [&] { return fmt::format("{}:{}", source_.file(file).path, number); };
    nlohmann::json object;
    try {
      object = nlohmann::json::parse(line);
    } catch (const nlohmann::json::exception& e) {
      fail(Fault::input, where(), fmt::format("expected a JSON object a line, got: {}", e.what()));
    }
    if (!object.is_object() || !object.contains("text") || !object["text"].is_string()) {
      fail(Fault::input, where(), "expected an object with a \"text\" that is a string; for plain text use --format lines");
    }
    return object["text"].get<std::string>();
  }

  const BuildOptions& options_;
  const PieceSource& source_;
};

/// Runs the workers. Pieces are handed out in order, so the piece that the writer waits for is always in work:
/// the window cannot deadlock.
class Pipeline {
 public:
  Pipeline(const BuildOptions& options, PieceSource& source, int threads)
      : source_(source), encoder_(options, source), window_(options.window) {
    for (int i = 0; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pipeline() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    space_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  /// The next piece's result in order, nullopt at the end; throws what its piece threw. Calls `waiting` while it is not there.
  std::optional<Encoded> next(const std::function<void()>& waiting) {
    std::unique_lock lock(mutex_);
    while (!ready_.wait_for(lock, std::chrono::milliseconds(100), [&] { return done_.contains(written_) || (exhausted_ && written_ == handed_out_); })) {
      lock.unlock();
      waiting();
      lock.lock();
    }
    const auto found = done_.find(written_);
    if (found == done_.end()) return std::nullopt;
    Encoded result = std::move(found->second.first);
    in_flight_ -= found->second.second;
    done_.erase(found);
    ++written_;
    lock.unlock();
    space_.notify_all();
    if (result.error) std::rethrow_exception(result.error);
    return result;
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      space_.wait(lock, [&] { return stop_ || exhausted_ || in_flight_ == 0 || in_flight_ < window_; });
      if (stop_ || exhausted_) return;
      std::optional<Piece> piece;
      Encoded result;
      try {
        piece = source_.next();
      } catch (...) {
        result.error = std::current_exception();
      }
      if (!piece && !result.error) {
        exhausted_ = true;
        space_.notify_all();
        ready_.notify_all();
        return;
      }
      const std::size_t number = handed_out_++;
      // A small charge for each piece, so that empty files are bounded too.
      const std::int64_t charge = (piece ? piece->bytes : 0) + 256;
      in_flight_ += charge;
      if (result.error) exhausted_ = true;
      if (piece) {
        lock.unlock();
        try {
          result = encoder_.encode(*piece);
        } catch (...) {
          result.error = std::current_exception();
        }
        piece.reset();
        lock.lock();
      }
      done_.emplace(number, std::pair{std::move(result), charge});
      ready_.notify_all();
    }
  }

  PieceSource& source_;
  Encoder encoder_;
  const std::int64_t window_;
  std::mutex mutex_;
  std::condition_variable space_, ready_;
  std::map<std::size_t, std::pair<Encoded, std::int64_t>> done_;
  std::size_t handed_out_ = 0, written_ = 0;
  std::int64_t in_flight_ = 0;
  bool exhausted_ = false, stop_ = false;
  std::vector<std::thread> workers_;
};

void check_output(const BuildOptions& options) {
  namespace fs = std::filesystem;
  const fs::path prefix(options.prefix);
  if (options.prefix.empty() || !prefix.has_filename()) {
    fail(Fault::input, "output",
         fmt::format("expected a path that ends with a name, as in data/text, got '{}'", options.prefix));
  }
  std::error_code error;
  // An index is renamed last. Where it still waits to be, .bin and .json are what a killed build renamed before; without
  // that sign they may be anybody's.
  const bool killed = !fs::exists(options.prefix + ".idx", error) && fs::exists(options.prefix + ".idx.partial", error);
  for (const char* suffix : {".idx", ".bin", ".json"}) {
    if (!options.force && !killed && fs::exists(options.prefix + suffix, error)) {
      fail(Fault::input, options.prefix + suffix, "the file exists; choose another name, or replace it with --force");
    }
  }
  error.clear();
  if (prefix.has_parent_path()) fs::create_directories(prefix.parent_path(), error);
  if (error) fail(Fault::input, prefix.parent_path().string(), fmt::format("cannot make the folder: {}", error.message()));
}

}  // namespace

BuildResult build_dataset(const BuildOptions& options) {
  if (!options.tokenizer) fail(Fault::programming, "build_dataset", "no tokenizer");
  if (options.max_bytes < 0) fail(Fault::input, "max_bytes", fmt::format("expected 0 or more, got {}", options.max_bytes));
  if (options.threads < 0) fail(Fault::input, "threads", fmt::format("expected 0 or more, got {}", options.threads));
  PieceSource source(options);
  check_output(options);

  BuildResult result;
  result.files = static_cast<std::int64_t>(source.files());
  result.type = token_type_for(options.tokenizer->vocabulary());
  IndexedDatasetWriter writer(options.prefix, result.type);
  std::vector<std::uint64_t> digests;  // of each piece
  const auto report = [&] {
    if (options.progress) options.progress({result.bytes, source.total_bytes(), writer.documents(), writer.tokens()});
  };
  report();
  {
    const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    Pipeline pipeline(options, source, options.threads > 0 ? options.threads : cores);
    while (const auto piece = pipeline.next(report)) {
      std::size_t begin = 0;
      const std::span<const std::int32_t> tokens(piece->tokens);
      for (const std::size_t end : piece->ends) {
        writer.append(tokens.subspan(begin, end - begin));
        writer.end_document();
        begin = end;
      }
      if (begin < tokens.size()) writer.append(tokens.subspan(begin));
      digests.push_back(piece->digest);
      result.bytes += piece->bytes;
      result.empty += piece->empty;
      report();
    }
  }
  result.documents = writer.documents(), result.tokens = writer.tokens();
  if (result.documents == 0) {
    fail(Fault::input, "inputs", fmt::format("{} files hold no text at all: nothing to build", result.files));
  }
  Sidecar sidecar;
  sidecar.tokenizer = std::string(options.tokenizer->name());
  sidecar.vocabulary = options.tokenizer->vocabulary();
  sidecar.end_of_document = options.tokenizer->end_of_document();
  sidecar.documents = result.documents, sidecar.tokens = result.tokens;
  sidecar.inputs = result.files, sidecar.input_bytes = result.bytes;
  sidecar.input_digest = fmt::format("{:016x}", XXH3_64bits(digests.data(), digests.size() * sizeof(std::uint64_t)));
  for (const std::string& input : options.inputs) sidecar.named.push_back(noted_input(input));
  sidecar.folder = folder_of(options.prefix), sidecar.max_bytes = options.max_bytes;
  sidecar.bin_digest = fmt::format("{:016x}", writer.digest());
  writer.finish(sidecar.to_json());
  return result;
}

}  // namespace capstan::data
