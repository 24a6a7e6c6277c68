// A child process with both of its outputs caught.
#include "bench/child.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>

namespace capstan::bench {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::string last_line(const std::string& text) {
  std::size_t end = text.find_last_not_of(" \n\r");
  if (end == std::string::npos) return "";
  const std::size_t begin = text.rfind('\n', end);
  return text.substr(begin == std::string::npos ? 0 : begin + 1, end - (begin == std::string::npos ? 0 : begin + 1) + 1);
}

}  // namespace

std::string ChildResult::last_words() const {
  const std::string line = last_line(errors);
  return !line.empty() ? line : last_line(out);
}

ChildResult run_child(const std::vector<std::string>& words, double seconds) {
  ChildResult result;
  int out[2], errors[2];
  if (pipe2(out, O_CLOEXEC) != 0) {
    result.status = 127, result.errors = std::strerror(errno);
    return result;
  }
  if (pipe2(errors, O_CLOEXEC) != 0) {
    result.status = 127, result.errors = std::strerror(errno);
    close(out[0]), close(out[1]);
    return result;
  }
  std::vector<char*> arguments;
  for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    setpgid(0, 0);  // so that its own children can be ended with it
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(out[1], 1), dup2(errors[1], 2);
    execvp(arguments[0], arguments.data());
    const char* why = std::strerror(errno);
    [[maybe_unused]] const auto written = write(2, why, std::strlen(why));
    _exit(127);
  }
  close(out[1]), close(errors[1]);
  if (child < 0) {
    result.status = 127, result.errors = std::strerror(errno);
    close(out[0]), close(errors[0]);
    return result;
  }
  const double end = now() + seconds;
  pollfd files[2] = {{out[0], POLLIN, 0}, {errors[0], POLLIN, 0}};
  std::string* texts[2] = {&result.out, &result.errors};
  bool late = false;
  for (int open = 2; open > 0;) {
    const double left = end - now();
    if (left <= 0 && !late) late = true, kill(-child, SIGKILL);
    if (poll(files, 2, late ? -1 : static_cast<int>(left * 1000) + 1) < 0 && errno != EINTR) break;
    for (int i = 0; i < 2; ++i) {
      if (files[i].fd < 0 || files[i].revents == 0) continue;
      char buffer[4096];
      const ssize_t n = read(files[i].fd, buffer, sizeof buffer);
      if (n > 0) texts[i]->append(buffer, static_cast<std::size_t>(n));
      if (n == 0 || (n < 0 && errno != EINTR)) files[i].fd = -1, --open;
    }
  }
  close(out[0]), close(errors[0]);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  if (late) result.errors += "\nit took more than " + std::to_string(static_cast<int>(seconds)) + " seconds and was ended\n";
  return result;
}

}  // namespace capstan::bench
