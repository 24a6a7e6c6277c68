// What a process learns of its rank from `--ranks` and from what launchers leave in the environment.
#include "launch/launch.h"

#include <capstan/error.h>

#include <gmock/gmock.h>

#include <unistd.h>

#include <map>
#include <optional>
#include <string>

namespace capstan::launch {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Variables = std::map<std::string, std::string>;

Launch detect(const Variables& variables, std::optional<int> ranks = std::nullopt) {
  return Launch::detect(ranks, [&](const std::string& name) -> std::optional<std::string> {
    const auto at = variables.find(name);
    if (at == variables.end()) return std::nullopt;
    return at->second;
  });
}

std::string refusal(const Variables& variables, std::optional<int> ranks = std::nullopt) {
  try {
    const Launch l = detect(variables, ranks);
    ADD_FAILURE() << "accepted: " << l.describe();
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), Fault::input);
    return e.what();
  }
  return "";
}

Variables operator+(Variables a, const Variables& b) {
  for (const auto& [name, value] : b) a[name] = value;
  return a;
}

const Variables open_mpi{{"OMPI_COMM_WORLD_RANK", "5"},
                         {"OMPI_COMM_WORLD_SIZE", "8"},
                         {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                         {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
const Variables slurm{
    {"SLURM_PROCID", "5"}, {"SLURM_NTASKS", "8"}, {"SLURM_LOCALID", "1"}, {"SLURM_JOB_ID", "17"}, {"SLURM_STEP_ID", "0"}};
const Variables torchrun{{"RANK", "1"},
                         {"WORLD_SIZE", "2"},
                         {"LOCAL_RANK", "1"},
                         {"LOCAL_WORLD_SIZE", "2"},
                         {"MASTER_ADDR", "localhost"},
                         {"MASTER_PORT", "29500"}};

TEST(Detect, NothingMeansOneRank) {
  const Launch l = detect({});
  EXPECT_EQ(l.bootstrap, Bootstrap::single);
  EXPECT_EQ(l.size, 1);
  EXPECT_EQ(l.describe(), "1 rank, started by itself");
  EXPECT_EQ(l.make_world(1)->backend(), "single");
}

TEST(Detect, RanksAreStartedHereUnlessThisIsOne) {
  EXPECT_EQ(detect({}, 4).bootstrap, Bootstrap::spawn);
  EXPECT_EQ(detect({}, 4).size, 4);
  EXPECT_EQ(detect({}, 1).bootstrap, Bootstrap::single);
  EXPECT_EQ(detect(open_mpi, 8).bootstrap, Bootstrap::mpi);
  EXPECT_THAT(refusal({}, 0), HasSubstr("--ranks 0"));
  EXPECT_THAT(refusal({}, -3), HasSubstr("--ranks -3"));
}

TEST(Detect, OpenMpi) {
  const Launch l = detect(open_mpi);
  EXPECT_EQ(l.bootstrap, Bootstrap::mpi);
  EXPECT_EQ(l.rank, 5);
  EXPECT_EQ(l.size, 8);
  EXPECT_EQ(l.local_rank, 1);
  EXPECT_EQ(l.local_size, 4);
  EXPECT_THAT(l.describe(), AllOf(HasSubstr("8 ranks, started by mpirun"), HasSubstr("OMPI_COMM_WORLD_RANK=5")));
  EXPECT_EQ(detect({{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "1"}}).bootstrap,
            Bootstrap::single);  // mpirun -np 1
}

TEST(Detect, OtherMpis) {
  const Launch l = detect({{"PMI_RANK", "2"}, {"PMI_SIZE", "3"}});
  EXPECT_EQ(l.bootstrap, Bootstrap::mpi);
  EXPECT_EQ(l.rank, 2);
  EXPECT_EQ(l.by.launcher, "PMI");
}

TEST(Detect, Slurm) {
  const Launch l = detect(slurm);
  EXPECT_EQ(l.bootstrap, Bootstrap::mpi);
  EXPECT_EQ(l.rank, 5);
  EXPECT_EQ(l.size, 8);
  EXPECT_EQ(l.local_rank, 1);
  // A step of fewer tasks than the allocation.
  EXPECT_EQ(detect(slurm + Variables{{"SLURM_STEP_NUM_TASKS", "6"}}).size, 6);
  // An allocation without a task: an interactive shell.
  EXPECT_EQ(detect({{"SLURM_NTASKS", "8"}, {"SLURM_JOB_ID", "17"}}).bootstrap, Bootstrap::single);
}

TEST(Detect, Torchrun) {
  const Launch l = detect(torchrun);
  EXPECT_EQ(l.bootstrap, Bootstrap::shared);
  EXPECT_EQ(l.rank, 1);
  EXPECT_EQ(l.size, 2);
  EXPECT_EQ(l.meeting, "localhost:29500");
  // Started again after a fault, it does not meet its dead self.
  EXPECT_NE(detect(torchrun + Variables{{"TORCHELASTIC_RESTART_COUNT", "1"}}).meeting,
            detect(torchrun + Variables{{"TORCHELASTIC_RESTART_COUNT", "2"}}).meeting);
  // By hand: no LOCAL_WORLD_SIZE.
  Variables by_hand = torchrun;
  by_hand.erase("LOCAL_WORLD_SIZE");
  EXPECT_EQ(detect(by_hand).bootstrap, Bootstrap::shared);
  // mpirun under the same numbers carries the ranks.
  EXPECT_EQ(detect(torchrun + Variables{{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}}).bootstrap,
            Bootstrap::mpi);
}

TEST(Detect, TorchrunOverHostsSaysWhatToDo) {
  EXPECT_THAT(refusal(torchrun + Variables{{"RANK", "3"}, {"WORLD_SIZE", "4"}}),
              AllOf(HasSubstr("spread over hosts"), HasSubstr("srun --mpi=pmix"), HasSubstr("mpirun -np 4")));
  Variables by_hand = torchrun + Variables{{"RANK", "3"}, {"WORLD_SIZE", "4"}};
  by_hand.erase("LOCAL_WORLD_SIZE");
  EXPECT_THAT(refusal(by_hand), HasSubstr("spread over hosts"));
}

TEST(Detect, TorchrunNeedsAMeetingPoint) {
  for (const char* name : {"MASTER_ADDR", "MASTER_PORT"}) {
    Variables v = torchrun;
    v.erase(name);
    EXPECT_THAT(refusal(v), HasSubstr("MASTER_ADDR and MASTER_PORT"));
  }
  EXPECT_THAT(refusal(torchrun + Variables{{"MASTER_PORT", "many"}}), HasSubstr("MASTER_PORT=many: expected a port"));
  EXPECT_THAT(refusal(torchrun + Variables{{"MASTER_PORT", "70000"}}), HasSubstr("expected a port"));
}

TEST(Detect, DisagreementsNameBothValues) {
  EXPECT_THAT(refusal(open_mpi + torchrun), AllOf(HasSubstr("OMPI_COMM_WORLD_RANK=5"), HasSubstr("RANK=1"),
                                                  HasSubstr("mpirun says rank 5"), HasSubstr("torchrun says 1")));
  EXPECT_THAT(refusal(open_mpi, 4), AllOf(HasSubstr("--ranks says number of ranks 4"), HasSubstr("mpirun says 8")));
  EXPECT_THAT(refusal(slurm + torchrun), AllOf(HasSubstr("SLURM_PROCID=5"), HasSubstr("RANK=1")));
  EXPECT_THAT(refusal(torchrun, 3), AllOf(HasSubstr("--ranks 3"), HasSubstr("WORLD_SIZE=2")));
  EXPECT_THAT(refusal(open_mpi + Variables{{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "2"}}),
              HasSubstr("rank on this host 1"));
  EXPECT_THAT(refusal(slurm + Variables{{"PMI_RANK", "5"}, {"PMI_SIZE", "6"}}),
              AllOf(HasSubstr("PMI_SIZE=6"), HasSubstr("SLURM_NTASKS=8")));
  EXPECT_THAT(refusal(open_mpi + slurm + Variables{{"SLURM_PROCID", "4"}}), HasSubstr("SLURM_PROCID=4"));
}

TEST(Detect, MpirunInsideAnAllocation) {
  // The daemon of mpirun is a task of Slurm, its ranks inherit that task's variables: they are about another process.
  const Launch l =
      detect(open_mpi + slurm + Variables{{"SLURM_PROCID", "1"}, {"SLURM_NTASKS", "2"}, {"SLURM_TASK_PID", "1"}});
  EXPECT_EQ(l.rank, 5);
  EXPECT_EQ(l.size, 8);
  EXPECT_THAT(refusal(open_mpi + slurm + Variables{{"SLURM_PROCID", "1"}, {"SLURM_TASK_PID", std::to_string(getpid())}}),
              HasSubstr("SLURM_PROCID=1"));
}

TEST(Detect, AJobScriptIsNoTask) {
  const Variables script{{"SLURM_NTASKS", "8"}, {"SLURM_JOB_ID", "17"}, {"SLURM_PROCID", "0"}, {"SLURM_LOCALID", "0"}};
  EXPECT_THAT(refusal(script),
              AllOf(HasSubstr("SLURM_NTASKS=8"), HasSubstr("job script"), HasSubstr("srun, mpirun or --ranks N")));
  EXPECT_EQ(detect(script, 1).bootstrap, Bootstrap::single);
  EXPECT_EQ(detect(script, 4).bootstrap, Bootstrap::spawn);
  EXPECT_EQ(detect(script + Variables{{"SLURM_NTASKS", "1"}}).bootstrap, Bootstrap::single);
  // What mpirun starts from it is a rank.
  EXPECT_EQ(detect(script + open_mpi).rank, 5);
}

TEST(Detect, HalfATruthIsRefused) {
  EXPECT_THAT(refusal({{"RANK", "1"}}), AllOf(HasSubstr("RANK is set but WORLD_SIZE is not")));
  EXPECT_THAT(refusal({{"WORLD_SIZE", "4"}}), HasSubstr("WORLD_SIZE is set but RANK is not"));
  EXPECT_THAT(refusal({{"OMPI_COMM_WORLD_RANK", "1"}}), HasSubstr("OMPI_COMM_WORLD_SIZE is not"));
  EXPECT_THAT(refusal({{"SLURM_PROCID", "1"}}), HasSubstr("SLURM_NTASKS is not"));
}

TEST(Detect, ImpossibleNumbersAreRefused) {
  EXPECT_THAT(refusal({{"RANK", "4"}, {"WORLD_SIZE", "4"}}), HasSubstr("rank 4 of 4 ranks; expected 0 to 3"));
  EXPECT_THAT(refusal({{"RANK", "-1"}, {"WORLD_SIZE", "4"}}), HasSubstr("RANK=-1: expected a number from 0"));
  EXPECT_THAT(refusal({{"RANK", "0"}, {"WORLD_SIZE", "0"}}), HasSubstr("WORLD_SIZE=0: expected a number from 1"));
  EXPECT_THAT(refusal({{"RANK", "0x1"}, {"WORLD_SIZE", "4"}}), HasSubstr("RANK=0x1"));
  EXPECT_THAT(refusal({{"RANK", ""}, {"WORLD_SIZE", "4"}}), HasSubstr("RANK=: expected"));
  EXPECT_THAT(refusal({{"RANK", "1"}, {"WORLD_SIZE", "99999999999"}}), HasSubstr("WORLD_SIZE=99999999999"));
  EXPECT_THAT(refusal(torchrun + Variables{{"LOCAL_RANK", "2"}}), HasSubstr("rank 2 of 2 on this host"));
  EXPECT_THAT(refusal(torchrun + Variables{{"LOCAL_WORLD_SIZE", "3"}}), HasSubstr("3 ranks on this host, but 2 in all"));
}

TEST(Threads, CoresAreSharedOutEvenly) {
  EXPECT_EQ(threads_of_rank(3, 8), 3);
  EXPECT_EQ(threads_of_rank(0, 1), usable_cores());
  EXPECT_EQ(threads_of_rank(0, 1000), 1);
  EXPECT_EQ(threads_of_rank(0, usable_cores()), 1);
}

}  // namespace
}  // namespace capstan::launch
