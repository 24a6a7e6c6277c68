// A save that is killed (SIGKILL) at any stage leaves a good checkpoint, the old or the new, and the next start
// cleans up.
#include "support.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <csignal>

#include <set>

namespace capstan::checkpoint::testing {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;

enum class Before {
  nothing,        // the first save of a run
  an_older_step,  // step 1 is there and is removed by retention
  the_same_step,  // step 2 is there and is replaced
};

Model model_of(int version) { return Model::mixed(static_cast<unsigned>(version)); }

SaverOptions saving(bool asynchronous, FaultHook hook = {}) {
  auto o = options(asynchronous, 1);
  o.fault_hook = std::move(hook);
  return o;
}

void prepare(const Path& root, Before before) {
  if (before == Before::nothing) return;
  Saver saver(root, hdf5(), saving(false));
  save(saver, model_of(1), before == Before::the_same_step ? 2 : 1);
}

std::vector<std::string> stages_of(Before before, bool asynchronous) {
  const Folder root;
  prepare(root, before);
  std::vector<std::string> seen;
  Saver saver(root, hdf5(), saving(asynchronous, [&](std::string_view stage) {
                if (seen.empty() || seen.back() != stage) seen.emplace_back(stage);
              }));
  save(saver, model_of(2), 2);
  return seen;
}

// Runs the save in a child that kills itself at `stage`. No assertion here: the child must not return to gtest.
void save_until(const Path& root, bool asynchronous, const std::string& stage) {
  const auto child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    {
      Saver saver(root, hdf5(), saving(asynchronous, [&](std::string_view s) {
                    if (s == stage) ::kill(::getpid(), SIGKILL);
                  }));
      saver.save(model_of(2).snapshot(2));
    }
    ::_exit(0);  // the stage was never reached
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "the save ended before stage " << stage;
}

// Which of the two models the newest good checkpoint holds, bit for bit: 1, 2, or 0 when there is none.
int newest(const Path& root) {
  const auto loaded = load_newest(root, model_of(1));
  if (loaded.step == -1) return 0;
  return loaded.model == model_of(1) ? 1 : loaded.model == model_of(2) ? 2 : -1;
}

class Kill : public ::testing::TestWithParam<std::tuple<Before, bool>> {};

TEST_P(Kill, AtEveryStageLeavesAGoodCheckpoint) {
  const auto [before, asynchronous] = GetParam();
  const auto stages = stages_of(before, asynchronous);
  const auto place = [&](const char* name) { return std::find(stages.begin(), stages.end(), name) - stages.begin(); };
  const auto renamed = place("renamed"), latest = place("latest renamed");
  ASSERT_LT(latest, static_cast<std::ptrdiff_t>(stages.size()));
  const int old = before == Before::nothing ? 0 : 1;
  for (std::size_t i = 0; i < stages.size(); ++i) {
    SCOPED_TRACE(stages[i]);
    const Folder root;
    prepare(root, before);
    save_until(root, asynchronous, stages[i]);
    if (HasFatalFailure()) return;

    const int found = newest(root);
    const auto at = static_cast<std::ptrdiff_t>(i);
    if (at < renamed) {
      EXPECT_EQ(found, old) << "the new step is not there yet";
    } else if (at >= latest || before != Before::an_older_step) {
      EXPECT_EQ(found, 2) << "the new step is there";
    } else {
      EXPECT_EQ(found, 1) << "LATEST still names the old step";
    }

    clean(root);  // what the next start does: nothing is left over, and the same checkpoint loads
    EXPECT_EQ(newest(root), found);
    for (const auto& name : names_in(root)) {
      EXPECT_TRUE(name == ".lock" || name == "LATEST" || step_of(name)) << name << " was not cleaned away";
    }
    Saver saver(root, hdf5(), saving(asynchronous));  // the killed process's lock is gone, and saving works
    save(saver, model_of(2), 2);
    EXPECT_EQ(newest(root), 2);
    EXPECT_THAT(names_in(root), ElementsAre(".lock", "LATEST", "step_000002"));
  }
}

std::string name_of_case(const ::testing::TestParamInfo<std::tuple<Before, bool>>& info) {
  const char* names[] = {"FirstSave", "FollowingSave", "SameStepAgain"};
  const auto [before, asynchronous] = info.param;
  return names[static_cast<int>(before)] + std::string(asynchronous ? "Asynchronous" : "Synchronous");
}

INSTANTIATE_TEST_SUITE_P(Saver, Kill,
                         ::testing::Combine(::testing::Values(Before::nothing, Before::an_older_step, Before::the_same_step),
                                            ::testing::Bool()),
                         name_of_case);

TEST(Saver, EveryNamedStageIsReachedAndEveryReachedStageIsNamed) {
  std::set<std::string> seen;
  for (const auto before : {Before::nothing, Before::an_older_step, Before::the_same_step}) {
    const auto stages = stages_of(before, true);
    seen.insert(stages.begin(), stages.end());
    std::size_t at = 0;  // in the published order
    for (const auto name : save_stages())
      if (at < stages.size() && stages[at] == name) ++at;
    EXPECT_EQ(at, stages.size());
  }
  const auto names = save_stages();
  EXPECT_EQ(seen, std::set<std::string>(names.begin(), names.end()));
}

// The start after a kill may itself be killed: cleaning again ends in the same place.
TEST(Saver, CleaningRestoresASupersededStepWithoutSuccessor) {
  const Folder root;
  prepare(root, Before::the_same_step);
  std::filesystem::rename(root.path() / "step_000002", root.path() / "step_000002.superseded");
  std::filesystem::create_directory(root.path() / "step_000002.tmp-77");
  std::filesystem::create_directory(root.path() / ".trash-step_000001-77");
  std::filesystem::create_directory(root.path() / "notes.tmp-mine");  // not ours
  overwrite(root.path() / "LATEST.tmp", "step_0");
  EXPECT_EQ(newest(root), 1) << "also before any cleaning, as `checkpoint info` sees it";
  clean(root);
  EXPECT_THAT(names_in(root), ElementsAre(".lock", "LATEST", "notes.tmp-mine", "step_000002"));
  EXPECT_EQ(newest(root), 1);
}

}  // namespace
}  // namespace capstan::checkpoint::testing
