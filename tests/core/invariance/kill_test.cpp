// One rank of several is killed (SIGKILL) at every stage of a save: the others end with its name, no committed step is lost,
// the newest checkpoint is whole (all of the old values or all of the new), and the next job saves in the same folder.
#include "core/invariance/support.h"

#include "checkpoint/loader.h"
#include "checkpoint/saver.h"
#include "core/launch/forked.h"
#include "launch/shared_memory_world.h"
#include "train/state_tensors.h"

#include <capstan/optimizer.h>

#include <gmock/gmock.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <numeric>
#include <stdexcept>

namespace capstan::invariance {
namespace {

namespace fs = std::filesystem;
using capstan::testing::Forked;
using ::testing::HasSubstr;

constexpr const char* model = "model={plugin: gpt, layers: 2, heads: 4, kv_heads: 2, width: 16, context: 32, vocabulary: 257, ffn: 24}";


/// All values of a session's engine, optimizer state included, become `value`.
void fill(Engine& engine, double value) {
  for (const NamedTensor& t : engine.tensors(true)) t.value.fill(value);
}

checkpoint::Snapshot snapshot(const Engine& engine, std::int64_t step, train::HostMemory& memory) {
  checkpoint::Snapshot s;
  s.tensors = train::saved_tensors(engine.tensors(true, true), memory);
  s.state_json = "{}";
  s.step = step;
  return s;
}

/// One rank of the job: saves step 1 (all ones) and 2 (twos), then step 2 again (threes), keeping one, and is killed in that
/// at `stage` when it is `victim`. `stage` empty: lives. Returns 0 when the last save succeeded.
int save_steps(const fs::path& folder, const Layout& layout, const std::string& meeting, int rank, int victim, const std::string& stage) {
  const std::shared_ptr<World> world = launch::make_shared_memory_world(meeting, rank, layout.world(), 10);
  try {
    std::vector<std::string> words{model};
    for (const std::string& w : layout.overrides()) words.push_back(w);
    const auto session = train::open_session(recipe(), words, CAPSTAN_PROGRAM, train::Placement::gradients, world);
    Engine& engine = *session->engine;
    engine.attach(session->host->make_as<Optimizer>(session->options().plugin("optimizer")));
    bool armed = false;
    checkpoint::SaverOptions options;
    options.keep = 0;
    std::vector<int> all(static_cast<std::size_t>(world->size()));
    std::iota(all.begin(), all.end(), 0);
    options.writers = world->make("checkpoint", all);
    options.fault_hook = [&](std::string_view reached) {
      if (armed && rank == victim && reached == stage) ::kill(::getpid(), SIGKILL);
    };
    const auto format = session->host->make_as<CheckpointFormat>(session->options().group("checkpoint").plugin("format"));
    const auto save = [&](checkpoint::Saver& saver, int step, double value) {
      fill(engine, value);
      train::HostMemory memory;
      saver.save(snapshot(engine, step, memory));
      saver.wait();
      if (const auto error = saver.take_error()) throw Error(*error);
    };
    {
      checkpoint::Saver saver(folder, format, options);
      save(saver, 1, 1);
      save(saver, 2, 2);
    }
    options.keep = 1;
    checkpoint::Saver saver(folder, format, options);
    armed = true;
    save(saver, 2, 3);
    return 0;
  } catch (const std::exception& e) {
    if (world->fail_job(e.what())) std::fprintf(stderr, "said: %s\n", e.what());
    world->end_failed(5);
  }
  return 99;
}

/// The step and the one value of the newest good checkpoint, on a mesh of its own: "2: 3".
int load(const fs::path& folder) {
  const auto session = train::open_session(recipe(), {model}, CAPSTAN_PROGRAM, train::Placement::gradients);
  Engine& engine = *session->engine;
  engine.attach(session->host->make_as<Optimizer>(session->options().plugin("optimizer")));
  const std::vector<NamedTensor> tensors = engine.tensors(true);
  const auto loaded = checkpoint::load_newest(folder, train::wanted_tensors(tensors), train::format_maker(*session->host), checkpoint::OnDamage::stop, [](const std::string&) {});
  if (!loaded) return std::printf("nothing\n"), 1;
  const float value = tensors[0].value.data<float>()[0];
  for (const NamedTensor& t : tensors)
    for (std::int64_t i = 0; i < t.value.numel(); ++i)
      if (t.value.data<float>()[i] != value) return std::printf("mixed: %s\n", t.name.c_str()), 1;
  std::printf("%lld: %g\n", static_cast<long long>(loaded->step), static_cast<double>(value));
  return 0;
}

class KillOneRank : public ::testing::TestWithParam<std::tuple<Layout, bool>> {};

TEST_P(KillOneRank, AtEveryStageOfASave) {
  const auto& [layout, first] = GetParam();
  const int victim = first ? 0 : layout.world() - 1;
  const fs::path root = fs::path(recipe()).parent_path() / ("kill_" + layout.name() + (first ? "_first" : "_last"));
  int job = 0, kills = 0;
  const auto meeting = [&] { return "kill " + std::to_string(::getpid()) + " " + std::to_string(++job); };
  const auto run = [&](const std::string& stage, std::string& said) {
    std::vector<std::unique_ptr<Forked>> ranks;
    const std::string name = meeting();
    for (int r = 0; r < layout.world(); ++r)
      ranks.push_back(std::make_unique<Forked>([&, r, name] { return save_steps(root, layout, name, r, victim, stage); }));
    std::vector<int> codes;
    for (auto& rank : ranks) codes.push_back(rank->wait()), said += rank->out();
    return codes;
  };
  for (const std::string_view stage : checkpoint::save_stages()) {
    SCOPED_TRACE(std::string(stage));
    fs::remove_all(root);
    std::string said;
    const std::vector<int> codes = run(std::string(stage), said);
    if (codes[static_cast<std::size_t>(victim)] != 128 + SIGKILL) {  // a stage that only the first writer reaches
      EXPECT_FALSE(first) << "rank 0 reaches every stage: " << said;
      EXPECT_EQ(codes, std::vector<int>(codes.size(), 0)) << said;
        continue;
    }
    ++kills;
    for (int r = 0; r < layout.world(); ++r)
      if (r != victim && codes[static_cast<std::size_t>(r)] != 0) {
        EXPECT_THAT(said, HasSubstr("rank " + std::to_string(victim))) << "the message names who died";
      }
    Forked after([&] { return load(root); });
    after.wait();
    EXPECT_TRUE(after.out() == "2: 2\n" || after.out() == "2: 3\n") << after.out() << said;
    if (layout.world() > 2) continue;
    std::string again;  // the killed job's locks and leftovers do not stand in the way
    EXPECT_EQ(run("", again), std::vector<int>(codes.size(), 0)) << again;
  }
  std::printf("%s, rank %d: %d kills\n", layout.name().c_str(), victim, kills);
  std::fflush(stdout);
  EXPECT_GE(kills, first ? static_cast<int>(checkpoint::save_stages().size()) : 3) << "a rank that writes nothing reaches three";
  fs::remove_all(root);
}

INSTANTIATE_TEST_SUITE_P(Meshes, KillOneRank,
                         ::testing::Combine(::testing::Values(Layout{1, 1, 2, 1, 1}, Layout{1, 2, 2, 1, 1, "zero1"}, Layout{2, 1, 1, 1, 2}), ::testing::Bool()),
                         [](const auto& info) { return std::get<0>(info.param).name() + (std::get<1>(info.param) ? "_first" : "_last"); });

}  // namespace
}  // namespace capstan::invariance
