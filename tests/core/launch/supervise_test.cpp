// The supervisor over jobs that are shell scripts: records, restarts, signals, what is left of a job at its end.
#include "launch/supervise.h"
#include "forked.h"
#include "launch/record.h"

#include <gmock/gmock.h>

#include <filesystem>
#include <fstream>

namespace capstan::launch {
namespace {

namespace fs = std::filesystem;
using capstan::testing::Forked;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Records, RoundTrip) {
  const Record r{Record::Event::failed, 3, 2, "two\nlines, \"quotes\" and \x01 a byte \xff"};
  const std::string line = r.line();
  EXPECT_EQ(line.find('\n'), line.size() - 1);  // one line, whatever the message holds
  const auto back = Record::parse(line.substr(0, line.size() - 1));
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(back->event, Record::Event::failed);
  EXPECT_EQ(back->rank, 3);
  EXPECT_EQ(back->code, 2);
  EXPECT_THAT(back->message, AllOf(HasSubstr("two\nlines, \"quotes\" and \x01 a byte")));
  EXPECT_EQ(Record::parse((Record{Record::Event::stopped, 0, 1, ""}).line())->event, Record::Event::stopped);
}

TEST(Records, OtherLinesAreNone) {
  for (const char* line : {"", "hello", "\x1e", "\x1e{", "\x1e[1]", "\x1e{\"event\": 1}", "\x1e{\"event\": \"asleep\"}",
                           "{\"event\": \"done\"}"})
    EXPECT_FALSE(Record::parse(line).has_value()) << line;
  EXPECT_EQ(Record::parse("\x1e{\"event\": \"failed\", \"rank\": \"x\"}")->rank, 0);
}

class Supervisor : public ::testing::Test {
 protected:
  Supervisor() {
    std::string pattern = (fs::temp_directory_path() / "capstan_supervise_XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
  }
  ~Supervisor() override {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }

  /// A job whose ranks run this script. In it: `done`, `stopped`, `failed CODE MESSAGE` write records, `tries` counts
  /// attempts (by rank 0), $R is the rank.
  Job job(const std::string& script, int ranks = 1, int restarts = 0) const {
    Job j;
    j.executable = "/bin/bash";
    const std::string start = "cd '" + folder_ +
                              "'; R=${OMPI_COMM_WORLD_RANK:-0}\n"
                              "record() { printf '\\036{\"event\":\"%s\",\"rank\":%d,\"code\":%d,\"message\":\"%s\"}\\n' "
                              "\"$1\" $R \"$2\" \"$3\" >&2; }\n"
                              "done_() { record done 0 ''; exit 0; }; stopped() { record stopped 1 ''; exit 1; }; failed() "
                              "{ record failed $1 \"$2\"; exit $1; }\n"
                              "tries() { echo x >> tries; wc -l < tries; }\n";
    j.words = {"-c", start + script};
    j.ranks = ranks, j.max_restarts = restarts, j.backoff_seconds = 0.05, j.patience_seconds = 1;
    return j;
  }
  static std::unique_ptr<Forked> run(const Job& j) {
    return std::make_unique<Forked>([=] { return supervise(j); });
  }
  int tries() const {
    std::ifstream in(folder_ + "/tries");
    int n = 0;
    for (std::string line; std::getline(in, line);) ++n;
    return n;
  }
  /// Processes whose command line names this test's folder.
  int left() const {
    int n = 0;
    for (const auto& entry : fs::directory_iterator("/proc")) {
      std::ifstream in(entry.path() / "cmdline");
      const std::string words{std::istreambuf_iterator<char>(in), {}};
      n += words.find(folder_) != std::string::npos;
    }
    return n;
  }

  std::string folder_;
};

TEST_F(Supervisor, CodesFollowTheRecord) {
  auto good = run(job("echo result; echo a warning >&2; done_"));
  EXPECT_EQ(good->wait(), 0);
  EXPECT_EQ(good->out(), "result\na warning\n");  // the record is not for the eye
  auto bad = run(job("failed 2 'no such recipe'", 1, 3));
  EXPECT_EQ(bad->wait(), 2);
  EXPECT_EQ(bad->out(), "capstan: no such recipe\n");  // bad input does not get better by trying
  auto stopped = run(job("stopped", 1, 3));
  EXPECT_EQ(stopped->wait(), 1);
  EXPECT_EQ(stopped->out(), "");
}

TEST_F(Supervisor, RestartsUntilItIsDone) {
  auto job_run = run(job("n=$(tries); [ $n -lt 3 ] && failed 1 \"rank 2 at step $n\"; done_", 1, 5));
  EXPECT_EQ(job_run->wait(), 0);
  EXPECT_EQ(tries(), 3);
  EXPECT_THAT(
      job_run->out(),
      AllOf(HasSubstr("rank 2 at step 1; starting again from the newest good checkpoint in 0.05 s (restart 1 of 5)"),
            HasSubstr("rank 2 at step 2; starting again from the newest good checkpoint in 0.1 s (restart 2 of 5)")));
}

TEST_F(Supervisor, GivesUpAfterTheLastRestart) {
  auto job_run = run(job("tries > /dev/null; failed 1 'again'", 1, 2));
  EXPECT_EQ(job_run->wait(), 1);
  EXPECT_EQ(tries(), 3);
  EXPECT_THAT(job_run->out(), HasSubstr("again; that was after the last of 2 restarts"));
}

TEST_F(Supervisor, AJobWithoutALastWordIsAFault) {
  auto killed = run(job("kill -9 $$"));
  EXPECT_EQ(killed->wait(), 1);
  EXPECT_THAT(killed->out(), AllOf(HasSubstr("without a word"), HasSubstr("signal 9")));
  auto silent = run(job("[ $(tries) = 1 ] && exit 0; done_", 1, 1));
  EXPECT_EQ(silent->wait(), 0);
  EXPECT_EQ(tries(), 2);
}

TEST_F(Supervisor, ASignalIsPassedOnOnce) {
  auto job_run = run(job("trap 'echo asked; stopped' INT; echo up; while :; do sleep 0.05; done"));
  ASSERT_TRUE(job_run->read_until("up"));
  kill(job_run->pid(), SIGINT);
  EXPECT_EQ(job_run->wait(), 1);
  EXPECT_THAT(job_run->out(), HasSubstr("asked"));
}

TEST_F(Supervisor, ASecondSignalKills) {
  auto job_run = run(job("trap 'echo asked' INT TERM; echo up; while :; do sleep 0.05; done", 1, 3));
  ASSERT_TRUE(job_run->read_until("up"));
  kill(job_run->pid(), SIGINT);
  ASSERT_TRUE(job_run->read_until("asked"));
  kill(job_run->pid(), SIGINT);
  EXPECT_EQ(job_run->wait(), 1);
  EXPECT_THAT(job_run->out(), HasSubstr("a second signal: the job is killed"));
  EXPECT_EQ(left(), 0);
}

TEST_F(Supervisor, ASignalBetweenAttemptsEndsIt) {
  Job j = job("failed 1 'broken'", 1, 5);
  j.backoff_seconds = 30;
  auto job_run = run(j);
  ASSERT_TRUE(job_run->read_until("starting again"));
  kill(job_run->pid(), SIGTERM);
  EXPECT_EQ(job_run->wait(), 1);
  EXPECT_THAT(job_run->out(), HasSubstr("between two attempts"));
}

TEST_F(Supervisor, RanksUnderMpirunSpeakThroughOneStream) {
  auto job_run = run(job("echo rank $R of $OMPI_COMM_WORLD_SIZE >&2; [ $R = 0 ] && record done 0 ''; exit 0", 3));
  EXPECT_EQ(job_run->wait(), 0) << job_run->out();
  for (int r = 0; r < 3; ++r) EXPECT_THAT(job_run->out(), HasSubstr("rank " + std::to_string(r) + " of 3\n"));
}

TEST_F(Supervisor, MpirunsOwnWordsAreKeptForJobsWithoutOne) {
  // A rank that dies is told by the others; mpirun's account of it is left out.
  auto told =
      run(job("[ $R = 1 ] && kill -9 $$; trap '' TERM; sleep 0.3; [ $R = 0 ] && failed 1 'rank 1 is gone'; sleep 1", 2));
  EXPECT_EQ(told->wait(), 1);
  EXPECT_THAT(told->out(),
              AllOf(HasSubstr("capstan: rank 1 is gone\n"), Not(HasSubstr("mpirun noticed")), Not(HasSubstr("-----"))));
  EXPECT_EQ(left(), 0);
  Job j = job("", 2);
  j.executable = folder_ + "/nothing_here";
  auto lost = run(j);
  EXPECT_EQ(lost->wait(), 1);
  EXPECT_THAT(lost->out(), AllOf(HasSubstr("without a word"), HasSubstr("nothing_here")));
}

TEST_F(Supervisor, SignalsReachRanksUnderMpirun) {
  // mpirun forwards these two and would take SIGINT and SIGTERM for itself. Nobody leaves before both were told: mpirun ends the others then.
  const auto told = [&](const std::string& word) {
    const std::string file = folder_ + "/" + word + ".";
    return "'echo $R was " + word + "; : > " + file + "$R; until [ -e " + file + "0 ] && [ -e " + file + "1 ]; do sleep 0.05; done; [ $R = 0 ] && record stopped 1 \"\"; exit 1'";
  };
  const std::string script = "trap " + told("asked") + " USR1; trap " + told("told") + " USR2\necho up $R; while :; do sleep 0.05; done";
  for (const auto& [signal, word] : {std::pair{SIGINT, " was asked"}, std::pair{SIGTERM, " was told"}}) {
    auto job_run = run(job(script, 2));
    ASSERT_TRUE(job_run->read_until("up 0"));
    ASSERT_TRUE(job_run->read_until("up 1"));
    kill(job_run->pid(), signal);
    EXPECT_EQ(job_run->wait(), 1);
    EXPECT_THAT(job_run->out(), AllOf(HasSubstr(std::string("0") + word), HasSubstr(std::string("1") + word)));
  }
}

TEST_F(Supervisor, StoppedRanksAreEndedAfterTheMessage) {
  auto job_run = run(job("[ $R = 1 ] && kill -STOP $$; sleep 0.3; failed 1 'rank 1 is stopped'", 2));
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(job_run->wait(), 1);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), 10);
  EXPECT_THAT(job_run->out(), HasSubstr("capstan: rank 1 is stopped"));
  EXPECT_EQ(left(), 0);
}

TEST_F(Supervisor, NoRankOutlivesAKilledSupervisor) {
  auto job_run = run(job("echo up; sleep 30", 2));
  ASSERT_TRUE(job_run->read_until("up"));
  kill(job_run->pid(), SIGKILL);
  job_run->wait();
  for (int i = 0; i < 100 && left() > 0; ++i) usleep(50000);
  EXPECT_EQ(left(), 0);
}

}  // namespace
}  // namespace capstan::launch
