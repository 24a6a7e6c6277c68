// `capstan data build|info`: text files to token datasets, and what is in one.
#include "program/commands.h"

#include "data/build.h"
#include "data/indexed_dataset.h"
#include "plugin/host.h"
#include "program/seed.h"
#include "terminal/display.h"

#include <capstan/tokenizer.h>
#include <fmt/format.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace capstan::program {
namespace {

using Clock = std::chrono::steady_clock;

struct Words {
  data::BuildOptions build;
  std::string tokenizer = "byte", format = "files", prefix;
  std::vector<std::string> tokenizer_options, search;
  std::int64_t show = 0;
  bool verify = false;
};

std::string bytes_text(double bytes) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  while (bytes >= 999.5 && unit < 4) bytes /= 1000, ++unit;
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.3g} {}", bytes, units[unit]);
}

/// A bar that redraws itself on a terminal, from the first text on; elsewhere a line now and then.
class ProgressBar {
 public:
  ProgressBar() : terminal_(terminal::is_live(STDERR_FILENO)), start_(Clock::now()), last_(start_) {}
  ~ProgressBar() { clear(); }
  void show(const data::BuildProgress& p) {
    const auto now = Clock::now();
    if (p.bytes == 0) return;
    if ((drawn_ || !terminal_) && now - last_ < (terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(5000))) return;
    last_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const double rate = static_cast<double>(p.bytes) / seconds;
    const double share =
        p.total_bytes > 0 ? std::min(1.0, static_cast<double>(p.bytes) / static_cast<double>(p.total_bytes)) : 1;
    const double left = rate > 0 ? static_cast<double>(p.total_bytes - p.bytes) / rate : 0;
    const std::string text =
        fmt::format("{:3.0f}%  {} of {}  {}/s  {} documents  {} tokens  {:.0f} s left", 100 * share,
                    bytes_text(static_cast<double>(p.bytes)), bytes_text(static_cast<double>(p.total_bytes)),
                    bytes_text(rate), p.documents, p.tokens, left);
    if (terminal_) {
      constexpr int width = 24;
      const int full = static_cast<int>(std::lround(share * width));
      fmt::print(stderr, "\r\033[K[{:=<{}}{: <{}}] {}", "", full, "", width - full, text);
      drawn_ = true;
    } else {
      fmt::print(stderr, "{}\n", text);
    }
    std::fflush(stderr);
  }
  void clear() {
    if (drawn_) fmt::print(stderr, "\r\033[K");
    drawn_ = false;
    std::fflush(stderr);
  }

 private:
  bool terminal_, drawn_ = false;
  Clock::time_point start_, last_;
};

std::shared_ptr<Tokenizer> make_tokenizer(PluginHost& host, const Words& words, const std::string& name) {
  for (const auto& folder : words.search) {
    host.add_search_path(std::filesystem::absolute(folder).lexically_normal().string());
  }
  std::vector<std::pair<std::string, std::string>> options;
  for (const auto& option : words.tokenizer_options) {
    const std::size_t equals = option.find('=');
    if (equals == std::string::npos || equals == 0) {
      fail(Fault::input, "--tokenizer-option", fmt::format("expected NAME=VALUE, got '{}'", option));
    }
    options.emplace_back(option.substr(0, equals), option.substr(equals + 1));
  }
  return host.make_as<Tokenizer>(host.choice("tokenizer", name, options));
}

void build(const Program& program, const Words& words) {
  PluginHost host(program.executable);
  data::BuildOptions options = words.build;
  options.tokenizer = make_tokenizer(host, words, words.tokenizer);
  options.format = words.format == "lines"   ? data::Format::lines
                   : words.format == "jsonl" ? data::Format::jsonl
                                             : data::Format::files;
  const auto start = Clock::now();
  ProgressBar bar;
  options.progress = [&](const data::BuildProgress& progress) { bar.show(progress); };
  const data::BuildResult result = data::build_dataset(options);
  bar.clear();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  fmt::print("{}: {} documents, {} tokens ({}, tokenizer '{}', vocabulary {})\n", options.prefix, result.documents,
             result.tokens, data::name_of(result.type), options.tokenizer->name(), options.tokenizer->vocabulary());
  fmt::print("  read {} of text from {} files in {:.2f} s, {}/s\n", bytes_text(static_cast<double>(result.bytes)),
             result.files, seconds, bytes_text(static_cast<double>(result.bytes) / std::max(seconds, 1e-9)));
  if (result.empty > 0) fmt::print("  left out {} documents without text\n", result.empty);
}

/// Text as it is, but control characters, which could steer a terminal, as \xNN.
std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte < 0x20 && c != '\n' && c != '\t') || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out;
}

void print_histogram(const data::IndexedDataset& dataset) {
  std::map<int, std::int64_t> buckets;  // bit_width of the length -> documents
  std::int64_t shortest = INT64_MAX, longest = 0, most = 0;
  for (std::int64_t d = 0; d < dataset.documents(); ++d) {
    const std::int64_t length = dataset.document_length(d);
    shortest = std::min(shortest, length), longest = std::max(longest, length);
    most = std::max(most, ++buckets[static_cast<int>(std::bit_width(static_cast<std::uint64_t>(length)))]);
  }
  if (buckets.empty()) return;
  fmt::print("  lengths    {} to {} tokens, {:.1f} on average\n", shortest, longest,
             static_cast<double>(dataset.tokens()) / static_cast<double>(dataset.documents()));
  for (int bits = buckets.begin()->first; bits <= buckets.rbegin()->first; ++bits) {
    const std::int64_t low = bits == 0 ? 0 : std::int64_t{1} << (bits - 1), high = (std::int64_t{1} << bits) - 1;
    const std::int64_t count = buckets.contains(bits) ? buckets[bits] : 0;
    const auto bar = static_cast<int>(std::ceil(40.0 * static_cast<double>(count) / static_cast<double>(most)));
    fmt::print("  {:>10} to {:<10} {:>10} {:#<{}}\n", low, high, count, "", bar);
  }
}

void info(const Program& program, const Words& words) {
  const data::IndexedDataset dataset(words.prefix);
  const auto sidecar = data::Sidecar::read(dataset);
  fmt::print("{}\n", dataset.prefix());
  fmt::print("  documents  {}\n  sequences  {}\n  tokens     {}\n  type       {}, {} of tokens\n", dataset.documents(),
             dataset.sequences(), dataset.tokens(), data::name_of(dataset.type()),
             bytes_text(static_cast<double>(dataset.tokens() * data::size_of(dataset.type()))));
  if (sidecar) {
    fmt::print("  tokenizer  {}, vocabulary {}, end of document {}\n", sidecar->tokenizer, sidecar->vocabulary,
               sidecar->end_of_document);
    fmt::print("  built from {} files, {} of text, xxh3 {}\n", sidecar->inputs,
               bytes_text(static_cast<double>(sidecar->input_bytes)), sidecar->input_digest);
    for (const std::string& input : sidecar->named) fmt::print("             {}\n", input);
  } else {
    fmt::print("  tokenizer  unknown: no {}.json beside it\n", dataset.prefix());
  }
  print_histogram(dataset);
  if (words.verify) {
    if (!sidecar) {
      fail(Fault::input, dataset.prefix() + ".json",
           "no such file: --verify needs the digest that `data build` writes there");
    }
    const std::string digest = data::bin_digest(dataset.prefix());
    if (digest != sidecar->bin_digest) {
      fail(Fault::input, dataset.prefix() + ".bin",
           fmt::format("the tokens are not those that were built: expected xxh3 {}, got {}; copy or build the dataset again",
                       sidecar->bin_digest, digest));
    }
    fmt::print("  verified   xxh3 {}\n", digest);
  }
  if (words.show > 0) {
    PluginHost host(program.executable);
    const std::string name = !words.tokenizer.empty() ? words.tokenizer : sidecar ? sidecar->tokenizer : "";
    if (name.empty()) fail(Fault::input, "--show", "the dataset does not say its tokenizer: add --tokenizer NAME");
    const auto tokenizer = make_tokenizer(host, words, name);
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(std::min(words.show, dataset.tokens())));
    dataset.read(0, tokens, tokenizer->vocabulary());
    fmt::print("\n{}\n", printable(tokenizer->decode(tokens)));
  }
}

}  // namespace

void add_data(CLI::App& app, Program& program) {
  CLI::App* data = app.add_subcommand("data", "Build token datasets from text, look into them");
  data->require_subcommand(1);

  const auto built = std::make_shared<Words>();
  CLI::App* build_command =
      data->add_subcommand("build", "Turn text files into PREFIX.bin and PREFIX.idx (Megatron's format)");
  build_command
      ->add_option("input", built->build.inputs, "files, folders (all files below) and quoted patterns: 'src/**/*.h'")
      ->required();
  build_command->add_option("-o,--out", built->build.prefix, "PREFIX of the files to write, as in data/text")->required();
  build_command->add_option("--tokenizer", built->tokenizer, "tokenizer plugin")->capture_default_str();
  build_command->add_option("--tokenizer-option", built->tokenizer_options, "NAME=VALUE for the tokenizer (may be repeated)")
      ->allow_extra_args(false);
  build_command->add_option("--plugin-path", built->search, "look for plugins in this folder too (may be repeated)")
      ->allow_extra_args(false);
  build_command
      ->add_option("--format", built->format,
                   "what a document is: a file (files), a line (lines), \"text\" of a JSON line (jsonl)")
      ->check(CLI::IsMember({"files", "lines", "jsonl"}))
      ->capture_default_str();
  build_command->add_option("--max-bytes", built->build.max_bytes, "take about this much text, chosen at random (10MB, 2GB)")
      ->transform(CLI::AsSizeValue(true));
  build_command->add_option("--seed", built->build.seed, "of that choice")->check(check_seed)->capture_default_str();
  build_command->add_option("--threads", built->build.threads, "0: one for each core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  build_command->add_flag("--force", built->build.force, "replace a dataset that is there");
  build_command->callback([built, &program] { build(program, *built); });

  const auto asked = std::make_shared<Words>();
  asked->tokenizer.clear();
  CLI::App* info_command = data->add_subcommand("info", "Counts, lengths, and the first tokens of a dataset");
  info_command->add_option("prefix", asked->prefix, "the dataset, without .bin or .idx")->required();
  info_command->add_option("--show", asked->show, "decode and print the first N tokens")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 24));
  info_command->add_option("--tokenizer", asked->tokenizer, "decode with this one (default: the one that built it)");
  info_command->add_option("--tokenizer-option", asked->tokenizer_options, "NAME=VALUE for the tokenizer (may be repeated)")
      ->allow_extra_args(false);
  info_command->add_option("--plugin-path", asked->search, "look for plugins in this folder too (may be repeated)")
      ->allow_extra_args(false);
  info_command->add_flag("--verify", asked->verify, "compare the tokens with the digest in PREFIX.json");
  info_command->callback([asked, &program] { info(program, *asked); });
}

}  // namespace capstan::program
