// A process's descendants, as /proc tells them.
#include "launch/process_tree.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace capstan::launch {
namespace {

/// Children of all threads of a process.
std::vector<pid_t> children_of(pid_t pid) {
  namespace fs = std::filesystem;
  std::vector<pid_t> all;
  std::error_code error;
  for (fs::directory_iterator task("/proc/" + std::to_string(pid) + "/task", error), end; !error && task != end; task.increment(error)) {
    std::ifstream in(task->path() / "children");
    for (pid_t child; in >> child;) all.push_back(child);
  }
  return all;
}

void collect(pid_t pid, std::vector<pid_t>& all) {
  for (const pid_t child : children_of(pid)) {
    all.push_back(child);
    collect(child, all);
  }
}

}  // namespace

void kill_descendants() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  do {
    // A parent that dies first hands its children to this process: looked at again until there are none.
    std::vector<pid_t> all;
    collect(getpid(), all);
    if (all.empty()) return;
    for (const pid_t pid : all) kill(pid, SIGKILL);
    while (waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  } while (std::chrono::steady_clock::now() < deadline);
}

}  // namespace capstan::launch
