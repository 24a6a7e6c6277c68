// defines: Forked: a function in a process of its own, and what it wrote.
#pragma once
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>

namespace capstan::testing {

/// Runs `body` in a forked process, whose exit code is what it returns (99 when it throws). Output is read by wait() and
/// read_until(), both streams together.
class Forked {
 public:
  explicit Forked(const std::function<int()>& body) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
    pid_ = fork();
    if (pid_ == 0) {
      dup2(ends[1], STDOUT_FILENO);
      dup2(ends[1], STDERR_FILENO);
      int code = 99;
      try {
        code = body();
      } catch (const std::exception& e) {
        std::fprintf(stderr, "thrown: %s\n", e.what());
      }
      std::fflush(nullptr);
      _exit(code);
    }
    close(ends[1]);
    output_ = ends[0];
  }
  ~Forked() {
    if (pid_ > 0) kill(pid_, SIGKILL), waitpid(pid_, nullptr, 0);
    close(output_);
  }
  Forked(const Forked&) = delete;
  Forked& operator=(const Forked&) = delete;

  pid_t pid() const { return pid_; }
  const std::string& out() const { return out_; }
  /// False when the output ends, or half a minute passes, before it holds `text`.
  bool read_until(const std::string& text) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (out_.find(text) == std::string::npos)
      if (std::chrono::steady_clock::now() > deadline || !read_some(1000)) return false;
    return true;
  }
  /// The exit code; 128 + the signal that ended it.
  int wait() {
    while (read_some(-1)) {
    }
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

 private:
  bool read_some(int milliseconds) {
    pollfd file{output_, POLLIN, 0};
    if (poll(&file, 1, milliseconds) == 0) return true;
    std::array<char, 4096> buffer;
    const ssize_t n = read(output_, buffer.data(), buffer.size());
    if (n > 0) out_.append(buffer.data(), static_cast<std::size_t>(n));
    return n > 0;
  }
  pid_t pid_ = -1;
  int output_ = -1;
  std::string out_;
};

}  // namespace capstan::testing
