// The supervisor: one process above the ranks. It learns how the job went from records among the lines of standard error
// (launch/record.h), because mpirun's exit code says little once it is told not to end a job on a rank's death.
#include "launch/supervise.h"

#include "comm/mpi_world.h"
#include "launch/launch.h"
#include "launch/process_tree.h"
#include "launch/record.h"

#include <capstan/error.h>

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

namespace capstan::launch {
namespace {

using std::chrono::steady_clock;

constexpr double longest_backoff = 60;
constexpr double leaving_seconds = 20;  // mpirun gets to leave once every rank is done

void say(const std::string& name, const std::string& text) {
  fmt::print(stderr, "{}: {}\n", name, text);
  std::fflush(stderr);
}

/// Lines that mpirun and its PMIx write about a rank's end or a signal, which a record says better. Kept: there may be no record.
class MpirunNoise {
 public:
  bool swallows(const std::string& line) {
    if (!belongs(line)) return false;
    if (text_.size() < most) text_ += line + "\n";
    return true;
  }
  const std::string& text() const { return text_; }

 private:
  static constexpr std::size_t most = 1 << 16;
  bool belongs(const std::string& line) {
    if (line.find("PMIX ERROR") != std::string::npos || line.starts_with("mpirun: Forwarding signal")) return true;
    const bool edge = line.size() >= 70 && line.find_first_not_of('-') == std::string::npos;
    if (edge) inside_ = !inside_;
    return edge || inside_;
  }
  bool inside_ = false;
  std::string text_;
};

/// Blocks the signals that a supervisor reads from a file, and puts the mask back.
class Signals {
 public:
  Signals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int s : {SIGINT, SIGTERM, SIGHUP, SIGCHLD}) sigaddset(&set, s);
    sigprocmask(SIG_BLOCK, &set, &before_);
    file_ = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (file_ < 0) fail(Fault::runtime, "launch", fmt::format("signalfd: {}", std::strerror(errno)));
  }
  ~Signals() {
    close(file_);
    sigprocmask(SIG_SETMASK, &before_, nullptr);
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;
  int file() const { return file_; }
  const sigset_t& before() const { return before_; }
  /// The next that came, SIGCHLD aside; 0: none.
  int next() const {
    signalfd_siginfo info;
    while (read(file_, &info, sizeof info) == sizeof info)
      if (info.ssi_signo != SIGCHLD) return static_cast<int>(info.ssi_signo);
    return 0;
  }

 private:
  sigset_t before_;
  int file_;
};

struct Outcome {
  std::optional<Record> record;
  int status = SIGKILL;  ///< waitpid()'s, of the process that was started
  std::string noise;     ///< what mpirun wrote beside
};

/// One attempt.
class Attempt {
 public:
  Attempt(const Job& job, const Signals& signals, int& stops) : job_(job), signals_(signals), stops_(stops) { start(); }
  ~Attempt() {
    end_all();
    if (errors_ >= 0) close(errors_);
  }
  Attempt(const Attempt&) = delete;
  Attempt& operator=(const Attempt&) = delete;

  Outcome run() {
    bool open = true, running = true;
    while (open || running) {
      std::array<pollfd, 2> files{pollfd{signals_.file(), POLLIN, 0}, pollfd{open ? errors_ : -1, POLLIN, 0}};
      poll(files.data(), files.size(), 100);
      for (int s; (s = signals_.next()) != 0;) pass_on(s);
      if (open && files[1].revents != 0) open = read_errors();
      if (running && waitpid(child_, &outcome_.status, WNOHANG) != 0) {  // gone, by itself or by end_all()
        running = false;
        // Whoever of the job is left holds the other end of the file: it has no parent to end it any more.
        if (!deadline_) deadline_ = steady_clock::now() + std::chrono::seconds(1);
      }
      if (deadline_ && steady_clock::now() > *deadline_) {
        end_all();
        if (!running) break;
        deadline_ = steady_clock::now() + std::chrono::seconds(1);
      }
    }
    outcome_.noise = noise_.text();
    return outcome_;
  }

 private:
  bool mpirun() const { return job_.ranks > 1; }

  void start() {
    std::vector<std::string> words;
    if (mpirun()) words = mpirun_words(job_.ranks);
    words.push_back(job_.executable);
    words.insert(words.end(), job_.words.begin(), job_.words.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    int ends[2], trouble[2];
    if (pipe2(ends, O_CLOEXEC) != 0 || pipe2(trouble, O_CLOEXEC) != 0)
      fail(Fault::runtime, "launch", fmt::format("pipe: {}", std::strerror(errno)));
    const pid_t parent = getpid();
    const bool terminal = isatty(STDOUT_FILENO) == 1;
    child_ = fork();
    if (child_ < 0) fail(Fault::runtime, "launch", fmt::format("cannot start a process: {}", std::strerror(errno)));
    if (child_ == 0) {
      setpgid(0, 0);  // the terminal's SIGINT is for the supervisor, which passes it on
      prctl(PR_SET_PDEATHSIG, SIGTERM);
      if (getppid() != parent) _exit(1);
      sigprocmask(SIG_SETMASK, &signals_.before(), nullptr);
      const int nothing = open("/dev/null", O_RDONLY);
      dup2(nothing, STDIN_FILENO);  // a process of the background that reads a terminal is stopped
      dup2(ends[1], STDERR_FILENO);
      // mpirun gives ranks a terminal of its own whatever it writes to itself.
      if (mpirun() && !terminal) setenv("TERM", "dumb", 1);
      execvp(argv[0], argv.data());
      const int error = errno;
      if (write(trouble[1], &error, sizeof error) < 0) _exit(126);
      _exit(127);
    }
    close(ends[1]);
    close(trouble[1]);
    errors_ = ends[0];
    fcntl(errors_, F_SETFL, O_NONBLOCK);
    int error = 0;
    const bool failed = read(trouble[0], &error, sizeof error) == sizeof error;
    close(trouble[0]);
    if (!failed) return;
    if (mpirun() && error == ENOENT)
      fail(Fault::input, "launch",
           "there is no mpirun: install Open MPI (Debian: openmpi-bin), or train on one rank without --ranks");
    fail(Fault::runtime, "launch", fmt::format("cannot run {}: {}", argv[0], std::strerror(error)));
  }

  void pass_on(int signal) {
    if (++stops_ > 1) {
      say(job_.name, "a second signal: the job is killed");
      end_all();
      return;
    }
    // mpirun would end the job on these; it forwards the other two to every rank.
    kill(child_, mpirun() ? (signal == SIGINT ? SIGUSR1 : SIGUSR2) : signal == SIGHUP ? SIGTERM : signal);
  }

  /// False at the end of the file.
  bool read_errors() {
    std::array<char, 1 << 14> buffer;
    const ssize_t n = read(errors_, buffer.data(), buffer.size());
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    text_.append(buffer.data(), static_cast<std::size_t>(n));
    for (std::size_t end; (end = text_.find('\n')) != std::string::npos; text_.erase(0, end + 1))
      hear(text_.substr(0, end + 1));
    if (n == 0 && !text_.empty()) hear(text_);
    if (n == 0) text_.clear();
    return n > 0;
  }

  void hear(const std::string& line) {
    const std::string bare = line.ends_with('\n') ? line.substr(0, line.size() - 1) : line;
    if (const auto record = Record::parse(bare)) {
      // The first that failed is the one; what others meet follows from it.
      const bool failed = outcome_.record && outcome_.record->event == Record::Event::failed;
      if (!failed) outcome_.record = record;
      const double patience = record->event == Record::Event::failed ? job_.patience_seconds : leaving_seconds;
      if (!deadline_ && (record->event == Record::Event::failed || mpirun()))
        deadline_ = steady_clock::now() +
                    std::chrono::duration_cast<steady_clock::duration>(std::chrono::duration<double>(patience));
      return;
    }
    if (mpirun() && noise_.swallows(bare)) return;
    std::fwrite(line.data(), 1, line.size(), stderr);
    std::fflush(stderr);
  }

  static void end_all() { kill_descendants(); }

  const Job& job_;
  const Signals& signals_;
  int& stops_;
  pid_t child_ = -1;
  int errors_ = -1;
  std::string text_;
  MpirunNoise noise_;
  Outcome outcome_;
  std::optional<steady_clock::time_point> deadline_;
};

std::string status_words(const Job& job, int status) {
  const std::string who = job.ranks > 1 ? "mpirun" : "its process";
  if (WIFSIGNALED(status))
    return fmt::format("{} was ended by signal {} ({})", who, WTERMSIG(status), strsignal(WTERMSIG(status)));
  return fmt::format("{} ended with exit code {}", who, WEXITSTATUS(status));
}

}  // namespace

std::vector<std::string> mpirun_words(int ranks) {
  std::vector<std::string> words{"mpirun"};
  for (std::string& word : mpi_launch_arguments()) words.push_back(std::move(word));
  const int threads = threads_of_rank(0, ranks);
  // All on this machine: Open MPI 5 would look at its network first, and may write of what it finds there.
  words.insert(words.end(), {"--mca", "btl", "^tcp", "-np", std::to_string(ranks)});
  if (std::getenv("OMP_NUM_THREADS") == nullptr)
    words.insert(words.end(), {"-x", fmt::format("OMP_NUM_THREADS={}", threads)});
  // Threads that wait for work give their core to ranks that have some.
  if (ranks * threads > usable_cores() && std::getenv("OMP_WAIT_POLICY") == nullptr)
    words.insert(words.end(), {"-x", "OMP_WAIT_POLICY=passive"});
  return words;
}

void end_with_parent() {
  const pid_t parent = getppid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) raise(SIGKILL);
}

int supervise(const Job& job) {
  const Signals signals;
  prctl(PR_SET_CHILD_SUBREAPER, 1);  // ranks whose mpirun died are still ours to end
  int stops = 0;
  for (int restart = 0;; ++restart) {
    const Outcome outcome = Attempt(job, signals, stops).run();
    std::string message;
    int code = 1;
    if (outcome.record) {
      message = outcome.record->message, code = outcome.record->code;
      if (outcome.record->event != Record::Event::failed) return code;
    } else if (stops > 0) {
      message = "stopped by a signal before the job could save; the same command goes on from its newest checkpoint";
    } else {
      if (!outcome.noise.empty()) fmt::print(stderr, "{}", outcome.noise);
      message = "the job ended without a word of how it went: " + status_words(job, outcome.status);
    }
    if (stops > 0 || code == 2 || job.max_restarts == 0) {
      say(job.name, message);
      return code;
    }
    if (restart == job.max_restarts) {
      say(job.name, fmt::format("{}; that was after the last of {} restarts", message, job.max_restarts));
      return code;
    }
    const double wait = std::min(longest_backoff, job.backoff_seconds * std::pow(2, restart));
    say(job.name, fmt::format("{}; starting again from the newest good checkpoint in {:.3g} s (restart {} of {})", message,
                              wait, restart + 1, job.max_restarts));
    const auto until =
        steady_clock::now() + std::chrono::duration_cast<steady_clock::duration>(std::chrono::duration<double>(wait));
    while (steady_clock::now() < until) {
      pollfd file{signals.file(), POLLIN, 0};
      poll(&file, 1,
           static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(until - steady_clock::now()).count()) + 1);
      if (signals.next() == 0) continue;
      say(job.name, "stopped by a signal between two attempts");
      return 1;
    }
  }
}

}  // namespace capstan::launch
