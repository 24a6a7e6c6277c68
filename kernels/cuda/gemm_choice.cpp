// The file of timed choices: read whole, written whole, by one process at a time.
#include <kernels/cuda/gemm_choice.h>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace capstan::kernels::cuda {

namespace {

constexpr const char* title = "capstan products 1";

std::uint64_t checksum(const std::string& text) {  // FNV-1a
  std::uint64_t h = 0xcbf29ce484222325u;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return h;
}

std::string hex(std::uint64_t x) {
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(x));
  return text;
}

std::string line_of(const std::string& key, const GemmChoices::Choice& choice) {
  std::string algorithm;
  for (const std::uint64_t word : choice.algorithm.data) algorithm.append(algorithm.empty() ? "" : " ").append(hex(word));
  char microseconds[32];
  std::snprintf(microseconds, sizeof microseconds, "%.1f", 1e6 * choice.seconds);
  const std::string rest = key + '\t' + std::to_string(choice.workspace) + '\t' + algorithm + '\t' + microseconds;
  return hex(checksum(rest)) + '\t' + rest;
}

std::vector<std::string> split(const std::string& line, char by) {
  std::vector<std::string> fields(1);
  for (const char c : line) {
    if (c == by) fields.emplace_back();
    else fields.back() += c;
  }
  return fields;
}

[[noreturn]] void refuse(const std::string& file, std::size_t line, const std::string& what) {
  throw std::runtime_error("[products] " + file + ":" + std::to_string(line) + ": " + what +
                           ". Bring the file back from a copy, or delete it: products are then timed anew, and a run that goes on may differ from "
                           "an unbroken one in its last bits");
}

[[noreturn]] void cannot(const std::string& file, const char* what) {
  throw std::runtime_error("[products] " + file + ": " + what + ": " + std::strerror(errno) +
                           ". The choice must be kept for later runs: let run.gemm_file name a file that can be written, or set run.gemm_choice: heuristic");
}

/// Held by one process at a time, on every host that sees the file.
class Lock {
 public:
  explicit Lock(const std::string& file) : path_(file + ".lock") {
    std::error_code error;
    if (const auto parent = std::filesystem::path(file).parent_path(); !parent.empty()) std::filesystem::create_directories(parent, error);
    descriptor_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (descriptor_ < 0) cannot(path_, "cannot be opened");
    while (::flock(descriptor_, LOCK_EX) != 0)
      if (errno != EINTR) {
        ::close(descriptor_);
        cannot(path_, "cannot be locked");
      }
  }
  ~Lock() { ::close(descriptor_); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::string path_;
  int descriptor_ = -1;
};

}  // namespace

std::string GemmChoices::open(const std::string& gpu, std::size_t version, const std::string& file) {
  gpu_ = gpu, version_ = std::to_string(version), file_ = file, on_ = true;
  for (char& c : gpu_)
    if (c == '\t' || c == '\n') c = ' ';
  choices_.clear();
  read();
  std::size_t ours = 0;
  for (const auto& [key, choice] : choices_) ours += key.rfind(line_key(""), 0) == 0;
  if (file_.empty()) return "timed in this run, kept nowhere";
  std::string text = "timed once, kept in " + file_ + ": " + std::to_string(ours) + " known";
  if (ours < choices_.size()) text += ", " + std::to_string(choices_.size() - ours) + " of another GPU or cuBLASLt not used";
  return text;
}

void GemmChoices::read() {
  if (file_.empty()) return;
  std::ifstream in(file_, std::ios::binary);
  if (!in) {
    std::error_code error;
    if (std::filesystem::exists(file_, error) || error) cannot(file_, "cannot be read");
    return;
  }
  std::stringstream all;
  all << in.rdbuf();
  std::string line;
  std::size_t number = 0;
  while (std::getline(all, line)) {
    if (++number == 1) {
      if (line != title) refuse(file_, 1, "not a file of products' choices: expected \"" + std::string(title) + "\", got \"" + line.substr(0, 40) + "\"");
      continue;
    }
    const std::size_t tab = line.find('\t');
    const std::string rest = tab == std::string::npos ? "" : line.substr(tab + 1);
    const std::vector<std::string> fields = split(line, '\t');
    if (all.eof() || fields.size() != 7 || fields[0] != hex(checksum(rest))) refuse(file_, number, "damaged: the line is cut off or was changed");
    Choice choice;
    const std::vector<std::string> words = split(fields[5], ' ');
    constexpr std::size_t count = sizeof choice.algorithm.data / sizeof choice.algorithm.data[0];
    if (words.size() != count) refuse(file_, number, "an algorithm of " + std::to_string(words.size()) + " words, expected " + std::to_string(count));
    for (std::size_t i = 0; i < count; ++i) choice.algorithm.data[i] = std::strtoull(words[i].c_str(), nullptr, 16);
    choice.workspace = std::strtoull(fields[4].c_str(), nullptr, 10), choice.seconds = 1e-6 * std::strtod(fields[6].c_str(), nullptr);
    choices_[fields[1] + '\t' + fields[2] + '\t' + fields[3]] = choice;
  }
  if (number == 0) refuse(file_, 1, "damaged: the file is empty");
}

/// Through a file beside it: a reader sees the old whole or the new whole.
void GemmChoices::write() const {
  const std::string beside = file_ + ".new";
  std::string text = std::string(title) + "\n";
  for (const auto& [key, choice] : choices_) text += line_of(key, choice) + "\n";
  const int out = ::open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (out < 0) cannot(beside, "cannot be written");
  for (std::size_t at = 0; at < text.size();) {
    const ssize_t n = ::write(out, text.data() + at, text.size() - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      ::close(out);
      cannot(beside, "cannot be written");
    }
    at += static_cast<std::size_t>(n);
  }
  const bool synced = ::fsync(out) == 0;
  if (::close(out) != 0 || !synced) cannot(beside, "cannot be written");
  if (std::rename(beside.c_str(), file_.c_str()) != 0) cannot(file_, "cannot be replaced");
  const std::string folder = std::filesystem::path(file_).parent_path().string();
  const int directory = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory >= 0) ::fsync(directory), ::close(directory);
}

GemmChoices::Choice GemmChoices::choose(const std::string& kind, const std::function<Choice()>& time, bool& kept) {
  const std::string key = line_key(kind);
  const auto known = choices_.find(key);
  kept = known != choices_.end();
  if (kept) return known->second;
  const Choice mine = time();
  if (file_.empty()) return choices_[key] = mine;
  const Lock lock(file_);
  read();  // another process may have been first: its choice is everybody's
  const auto [place, fresh] = choices_.emplace(key, mine);
  kept = !fresh;
  if (fresh) write();
  return place->second;
}

int fastest(std::span<const double> seconds) {
  constexpr double noise = 0.01;
  int best = -1;
  for (std::size_t i = 0; i < seconds.size(); ++i) {
    if (seconds[i] < 0) continue;
    if (best < 0 || seconds[i] < (1 - noise) * seconds[static_cast<std::size_t>(best)]) best = static_cast<int>(i);
  }
  return best;
}

}  // namespace capstan::kernels::cuda
