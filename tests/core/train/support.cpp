// See support.h.
#include "support.h"

#include "checkpoint/commit.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace capstan::train::testing {

Project::Project() {
  std::string pattern = (fs::temp_directory_path() / "capstan_train_XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
  path_ = fs::canonical(pattern);
  for (int i = 0; i < 40; ++i) write_file(path_ / "text" / (std::to_string(100 + i) + ".txt"), some_text(static_cast<std::uint64_t>(i)));
  write_file(path_ / "recipe.yaml",
             "model: {plugin: gpt, layers: 2, heads: 2, width: 32, context: 32, dropout: 0.1}\n"
             "tokenizer: byte\n"
             "data:\n"
             "  sets: [{path: data/text, text: [\"text/*.txt\"]}]\n"
             "  sequence_length: 32\n"
             "  batch_size: 4\n"
             "  micro_batch: 2\n"
             "  validation: 0.1\n"
             "optimizer: {plugin: adamw, lr: 3e-3}\n"
             "schedule: {warmup: 5, decay: cosine}\n"
             "train: {steps: 20, clip: 0.5, validate_every: 5, validate_batches: 2}\n"
             "checkpoint: {every_steps: 10}\n"
             "run: {threads: 1, dir: run}\n");
}

Project::~Project() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

void write_file(const fs::path& file, const std::string& text) {
  fs::create_directories(file.parent_path());
  std::ofstream(file, std::ios::binary) << text;
}

std::string read_file(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string some_text(std::uint64_t number) {
  constexpr std::array<const char*, 12> words{"the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "log", "while"};
  std::string text;
  std::uint64_t x = number * 2862933555777941757ull + 3037000493ull;
  while (text.size() < 1000 + 37 * number) {
    x = x * 6364136223846793005ull + 1442695040888963407ull;
    text += words[(x >> 33) % words.size()];
    text += (x >> 60) == 0 ? ".\n" : " ";
  }
  return text;
}

bool built_data(const Project& project) {
  for (const auto& entry : fs::recursive_directory_iterator(project / "."))
    if (entry.path().extension() == ".idx") return true;
  return false;
}

Child::Child(const std::vector<std::string>& words, const std::function<void()>& before) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) throw std::runtime_error("socketpair");
  const int smallest = 1;  // the kernel rounds it up to a few small writes
  ::setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &smallest, sizeof smallest);
  ::fcntl(ends[0], F_SETFD, FD_CLOEXEC);
  std::string name = (fs::temp_directory_path() / "capstan_errors_XXXXXX").string();
  const int errors = ::mkstemp(name.data());
  errors_ = name;
  std::vector<std::string> all{CAPSTAN_PROGRAM};
  all.insert(all.end(), words.begin(), words.end());
  std::vector<char*> argv;
  for (std::string& word : all) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_ = ::fork();
  if (pid_ == 0) {
    ::dup2(ends[1], STDOUT_FILENO);
    ::dup2(errors, STDERR_FILENO);
    ::close(ends[1]);
    ::close(errors);
    if (before) before();
    ::execv(argv[0], argv.data());
    ::_exit(126);
  }
  ::close(ends[1]);
  ::close(errors);
  output_ = ends[0];
}

Child::~Child() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  if (output_ >= 0) ::close(output_);
  std::error_code ignored;
  fs::remove(errors_, ignored);
}

bool Child::read_some() {
  std::array<char, 4096> buffer;
  const ssize_t n = ::read(output_, buffer.data(), buffer.size());
  if (n > 0) out_.append(buffer.data(), static_cast<std::size_t>(n));
  return n > 0;
}

bool Child::read_until(const std::string& text) {
  while (out_.find(text) == std::string::npos)
    if (!read_some()) return false;
  return true;
}

std::string Child::err() const { return read_file(errors_); }

void Child::signal(int number) { ::kill(pid_, number); }

Exit Child::wait() {
  while (read_some()) {
  }
  int status = 0;
  ::waitpid(pid_, &status, 0);
  pid_ = -1;
  Exit exit;
  if (WIFEXITED(status)) exit.code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) exit.signal = WTERMSIG(status);
  exit.out = out_, exit.err = err();
  return exit;
}

Exit train(const std::string& recipe, std::vector<std::string> words) {
  words.insert(words.begin(), {"train", recipe});
  return Child(words).wait();
}

std::vector<std::string> metrics(const fs::path& run) {
  std::vector<std::string> all;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) {
    auto j = nlohmann::ordered_json::parse(line);
    for (const char* clock : {"seconds", "tokens_per_second", "flops", "peak_share"}) j.erase(clock);
    all.push_back(j.dump());
  }
  return all;
}

std::vector<nlohmann::json> metrics_with(const fs::path& run, const std::string& field) {
  std::vector<nlohmann::json> all;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) {
    auto j = nlohmann::json::parse(line);
    if (j.contains(field)) all.push_back(std::move(j));
  }
  return all;
}

void expect_documented_metrics(const fs::path& run) {
  const std::string text = read_file(fs::path(CAPSTAN_SOURCE_DIR) / "docs/runs.md");
  const std::string docs = text.substr(text.find("## metrics.jsonl"), text.find("## Going on") - text.find("## metrics.jsonl"));
  const std::function<void(const nlohmann::json&)> check = [&](const nlohmann::json& j) {
    for (const auto& [key, value] : j.items()) {
      if (j.is_object()) { EXPECT_NE(docs.find("`" + key + "`"), std::string::npos) << key << " of " << j << " is not in docs/runs.md"; }
      if (key == "event") { EXPECT_NE(docs.find("| `" + value.get<std::string>() + "` |"), std::string::npos) << j; }
      if (value.is_structured()) check(value);
    }
  };
  for (const auto& line : metrics_with(run, "step")) check(line);
}

std::map<std::string, std::vector<std::uint64_t>> weights(const fs::path& run, std::int64_t step) {
  std::map<std::string, std::vector<std::uint64_t>> all;
  if (!has_checkpoint(run, step)) {
    ADD_FAILURE() << run << " has no checkpoint of step " << step;
    return all;
  }
  for (const auto& [name, tensor] : checkpoint::read_manifest(run / "checkpoints" / checkpoint::step_name(step)).tensors)
    for (const auto& box : tensor.boxes) all[name].push_back(box.xxh3);
  return all;
}

bool has_checkpoint(const fs::path& run, std::int64_t step) {
  return fs::exists(run / "checkpoints" / checkpoint::step_name(step) / checkpoint::manifest_name);
}

std::int64_t latest(const fs::path& run) {
  std::istringstream text(read_file(run / "checkpoints" / checkpoint::latest_name));
  std::string name;
  text >> name;
  return checkpoint::step_of(name).value_or(-1);
}

void limit_files(pid_t pid, rlim_t bytes) {
  rlimit limit{};
  ASSERT_EQ(::prlimit(pid, RLIMIT_FSIZE, nullptr, &limit), 0);
  limit.rlim_cur = std::min(bytes, limit.rlim_max);
  ASSERT_EQ(::prlimit(pid, RLIMIT_FSIZE, &limit, nullptr), 0);
}

bool wait_for(const std::function<bool()>& done) {
  for (int i = 0; i < 2000; ++i) {
    if (done()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return done();
}

}  // namespace capstan::train::testing
