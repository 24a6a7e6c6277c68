// Saving and loading back: every bit, every element type, from a snapshot that training may overwrite; how many
// checkpoints stay; what happens when there is no room or no right to write.
#include "support.h"

#include "checkpoint/run_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#include <csignal>

#include <array>
#include <atomic>
#include <fstream>
#include <future>
#include <thread>

namespace capstan::checkpoint::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class BothWays : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Saver, BothWays, ::testing::Bool(),
                         [](const auto& p) { return p.param ? "Asynchronous" : "Synchronous"; });

TEST_P(BothWays, EveryBitOfEveryElementTypeComesBack) {
  const Folder root(false);
  const auto model = Model::mixed(1);
  {
    Saver saver(root.path() / "checkpoints", hdf5(), options(GetParam()));
    save(saver, model, 100);
    EXPECT_EQ(saver.last_report().step, 100);
    EXPECT_GT(saver.last_report().bytes, 0);
  }
  const auto loaded = load_newest(root.path() / "checkpoints", model);
  EXPECT_EQ(loaded.step, 100);
  EXPECT_TRUE(loaded.model == model);
  EXPECT_EQ(loaded.state, model.snapshot(100).state_json);
  EXPECT_THAT(names_in(root.path() / "checkpoints"), ElementsAre(".lock", "LATEST", "step_000100"));
  EXPECT_THAT(names_in(root.path() / "checkpoints/step_000100"),
              ElementsAre("MANIFEST.json", "index.h5", "shard_00000.h5", "state.json"));
  EXPECT_THAT(verify(root.path() / "checkpoints/step_000100"), ElementsAre());
}

TEST_P(BothWays, KeepsTheLastK) {
  const Folder root;
  auto model = Model::of("w", DType::f32, {8}, 1);
  Saver saver(root, hdf5(), options(GetParam(), 2));
  for (int step = 10; step <= 50; step += 10) {
    model.randomize(static_cast<unsigned>(step));
    save(saver, model, step);
  }
  EXPECT_THAT(names_in(root), ElementsAre(".lock", "LATEST", "step_000040", "step_000050"));
  EXPECT_EQ(contents(root.path() / "LATEST"), "step_000050\n");
  // A run that was rolled back to 40 saves 45: 50 is of the abandoned part, stays, and does not push 40 out.
  save(saver, model, 45);
  EXPECT_THAT(names_in(root), ElementsAre(".lock", "LATEST", "step_000040", "step_000045", "step_000050"));
  EXPECT_EQ(load_newest(root, model).step, 45);
}

TEST(Saver, TheSnapshotIsWhatTheTensorsWereWhenSaveReturned) {
  const Folder root;
  auto model = Model::of("layers.0.weight", DType::f32, {1024, 1024}, 1);
  model.add("layers.1.weight", DType::bf16, {511, 513}, whole({511, 513}));
  model.randomize(2);
  const auto before = model;
  std::promise<void> mutated;
  auto o = options(true);
  o.copy_threads = 3;
  std::atomic<bool> held = false;
  // Nothing reaches the disk before the tensors have changed: only a true copy can pass.
  o.fault_hook = [&](std::string_view stage) {
    if (stage == "folder created" && !held.exchange(true)) mutated.get_future().wait();
  };
  Saver saver(root, hdf5(), o);
  saver.save(model.snapshot(1));
  EXPECT_TRUE(saver.busy());
  model.randomize(3);
  mutated.set_value();
  saver.wait();
  ASSERT_FALSE(saver.take_error());
  const auto loaded = load_newest(root, model);
  EXPECT_TRUE(loaded.model == before);
  EXPECT_FALSE(loaded.model == model);
}

TEST(Saver, ManyTensorsOfOddSizesAreStagedWhole) {
  const Folder root(false);
  Model model;
  for (int i = 0; i < 60; ++i) {
    const Shape shape{1 + i * 7919 % 700'001};
    model.add("t" + std::to_string(i), i % 2 ? DType::u8 : DType::f32, shape, whole(shape));
  }
  model.randomize(5);
  auto o = options(true);
  o.copy_threads = 4;  // several parts, whose borders fall inside tensors
  Saver saver(root, hdf5(), o);
  saver.reserve(std::array<std::int64_t, 1>{1 << 20});
  save(saver, model, 1);
  EXPECT_TRUE(load_newest(root, model).model == model);
}

TEST(Saver, TheNextSaveWaitsForThePreviousOne) {
  const Folder root;
  std::atomic<int> begun = 0, done = 0;
  auto o = options(true);
  o.fault_hook = [&](std::string_view stage) {
    if (stage == "shard written") std::this_thread::sleep_for(std::chrono::milliseconds(30));
    if (stage == "done") ++done;
    if (stage == "snapshot begun") {
      EXPECT_EQ(done, begun++);
    }
  };
  auto model = Model::of("w", DType::f32, {100}, 1);
  Saver saver(root, hdf5(), o);
  for (int step = 1; step <= 4; ++step) {
    model.randomize(static_cast<unsigned>(step));
    saver.save(model.snapshot(step));
  }
  saver.wait();
  EXPECT_EQ(begun, 4);
  EXPECT_TRUE(load_newest(root, model).model == model);
  EXPECT_GE(saver.last_report().waited_seconds, 0.01);
}

TEST(Saver, ASecondSaverInTheSameFolderIsRefused) {
  const Folder root;
  {
    Saver first(root, hdf5(), options(true));
    EXPECT_THAT(error_of([&] { Saver second(root, hdf5(), options(true)); }), HasSubstr("another process is saving"));
  }
  Saver third(root, hdf5(), options(true));
}

TEST(Saver, RefusesMalformedSnapshots) {
  const Folder root;
  Saver saver(root, hdf5(), options(true));
  const auto with = [&](auto change) {
    const auto model = Model::of("w", DType::f32, {4, 4}, 1);
    auto snapshot = model.snapshot(1);
    change(snapshot.tensors);
    return error_of([&] { saver.save(snapshot); });
  };
  EXPECT_THAT(with([](auto& t) { t.push_back(t[0]); }), HasSubstr("overlap"));
  EXPECT_THAT(with([](auto& t) { t[0].bytes = 63; }), HasSubstr("expected 64 bytes of data, got 63"));
  EXPECT_THAT(with([](auto& t) { t[0].data = nullptr; }), HasSubstr("got none"));
  EXPECT_THAT(with([](auto& t) { t[0].box.extent = {4, 3}, t[0].bytes = 48; }), HasSubstr("4 of 16 elements uncovered"));
  EXPECT_THAT(with([](auto& t) { t[0].box.begin = {0, 1}; }), HasSubstr("not inside"));
  EXPECT_THAT(with([](auto& t) { t[0].name = "a/../b"; }), HasSubstr("\"..\""));
  EXPECT_THAT(with([](auto& t) { t[0].name = "a\nb"; }), HasSubstr("control character"));
  EXPECT_THAT(with([](auto& t) { t[0].name = "\xff\xfe"; }), HasSubstr("UTF-8"));
  EXPECT_THAT(names_in(root), ElementsAre(".lock"));
}

// After a failed save: the error says what is needed, nothing is left behind, and the old checkpoint loads.
void expect_unharmed(Saver& saver, const Path& root, const Model& old, const std::string& why) {
  const auto error = saver.take_error();
  ASSERT_TRUE(error) << "the save should have failed";
  EXPECT_THAT(error->what(), HasSubstr("not saved"));
  EXPECT_THAT(error->what(), HasSubstr(why));
  EXPECT_THAT(error->what(), HasSubstr("bytes"));
  EXPECT_THAT(error->what(), HasSubstr("available"));
  EXPECT_FALSE(saver.take_error()) << "an error is told once";
  EXPECT_THAT(names_in(root), ElementsAre(".lock", "LATEST", "step_000001"));
  const auto loaded = load_newest(root, old);
  EXPECT_EQ(loaded.step, 1);
  EXPECT_TRUE(loaded.model == old);
}

class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    handler_ = std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &old_);
    const rlimit limited{bytes, old_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limited);
  }
  ~FileSizeLimit() { ::setrlimit(RLIMIT_FSIZE, &old_), std::signal(SIGXFSZ, handler_); }

 private:
  rlimit old_{};
  void (*handler_)(int);
};

TEST_P(BothWays, AFileThatMayNotGrowFailsTheSaveOnly) {
  for (const rlim_t limit : {0, 700, 20'000, 300'000, 1'000'000}) {
    SCOPED_TRACE("limit " + std::to_string(limit));
    const Folder root;
    const auto old = Model::of("layers.7.weight", DType::f32, {1000, 300}, 1);
    const auto fresh = Model::of("layers.7.weight", DType::f32, {1000, 300}, 2);
    Saver saver(root, hdf5(), options(GetParam()));
    save(saver, old, 1);
    {
      const FileSizeLimit full(limit);
      saver.save(fresh.snapshot(2));
      saver.wait();
    }
    expect_unharmed(saver, root, old, "shard_00000.h5");
    save(saver, fresh, 3);  // and the same saver works again
    EXPECT_TRUE(load_newest(root, old).model == fresh);
  }
}

// Each file of a checkpoint in turn is a link to the device that is always full, so that the kernel itself says so.
TEST_P(BothWays, AFullDiskAtAnyFileFailsTheSaveOnly) {
  for (const std::string file : {"shard_00000.h5", "state.json", "index.h5", "MANIFEST.json"}) {
    SCOPED_TRACE(file);
    const Folder root;
    const auto old = Model::mixed(1), fresh = Model::mixed(2);
    bool full = false;
    auto o = options(GetParam());
    o.fault_hook = [&](std::string_view stage) {
      if (stage != "folder created" || !full) return;
      for (const auto& entry : std::filesystem::directory_iterator(root.path())) {
        if (entry.path().string().find(".tmp-") != std::string::npos) {
          std::filesystem::create_symlink("/dev/full", entry.path() / file);
        }
      }
    };
    Saver saver(root, hdf5(), o);
    save(saver, old, 1);
    full = true;
    saver.save(fresh.snapshot(2));
    saver.wait();
    expect_unharmed(saver, root, old, "No space left on device");
    full = false;
    save(saver, fresh, 3);
    EXPECT_TRUE(load_newest(root, old).model == fresh);
  }
}

TEST(Saver, AFullDiskAtLatestLeavesBothStepsGood) {
  const Folder root;
  const auto old = Model::mixed(1), fresh = Model::mixed(2);
  bool full = false;
  auto o = options(true);
  o.fault_hook = [&](std::string_view stage) {
    if (full && stage == "rename flushed") std::filesystem::create_symlink("/dev/full", root.path() / "LATEST.tmp");
  };
  Saver saver(root, hdf5(), o);
  save(saver, old, 1);
  full = true;
  saver.save(fresh.snapshot(2));
  saver.wait();
  const auto error = saver.take_error();
  ASSERT_TRUE(error);
  EXPECT_THAT(error->what(), HasSubstr("LATEST.tmp"));
  EXPECT_THAT(names_in(root), ElementsAre(".lock", "LATEST", "step_000001", "step_000002"));
  EXPECT_TRUE(load_newest(root, old).model == old);
  EXPECT_THAT(verify(root.path() / "step_000002"), ElementsAre());
}

TEST(Saver, ADiskWithoutEnoughRoomIsFoundBeforeWriting) {
  const Folder root;
  const auto old = Model::of("w", DType::u8, {8}, 1);
  Saver saver(root, hdf5(), options(false));
  save(saver, old, 1);
  // More bytes than the disk has, promised but never touched.
  const auto bytes = static_cast<std::int64_t>(std::filesystem::space(root.path()).available) + (std::int64_t{1} << 40);
  void* memory =
      ::mmap(nullptr, static_cast<std::size_t>(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  SavedTensor t;
  t.name = "w", t.dtype = DType::u8, t.global_shape = {bytes}, t.box = whole({bytes}), t.data = memory, t.bytes = bytes;
  saver.save({{t}, "{}", 2});
  expect_unharmed(saver, root, old, "the disk is full: " + std::to_string(bytes) + " bytes needed");
  ::munmap(memory, static_cast<std::size_t>(bytes));
}

// A format whose disk fills up at a chosen call.
class Failing final : public CheckpointFormat {
 public:
  enum class At { half_a_shard, wrong_bytes, index };
  Failing(std::shared_ptr<CheckpointFormat> real, At at) : real_(std::move(real)), at_(at) {}
  std::string_view name() const override { return real_->name(); }
  std::string_view extension() const override { return real_->extension(); }
  void write_shard(const std::string& path, std::span<SavedTensor> tensors,
                   const std::function<void(std::int64_t)>& progress) override {
    real_->write_shard(path, tensors, progress);
    if (at_ == At::half_a_shard) {
      std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
      fail(Fault::runtime, path, "No space left on device");
    }
    if (at_ == At::wrong_bytes) flip_bit(path, tensors[0].file_offset);
  }
  void read(const std::string& path, const SavedTensor& t, void* target) override { real_->read(path, t, target); }
  void write_index(const std::string& path, std::span<const SavedTensor>) override {
    fail(Fault::runtime, path, "No space left on device");
  }

 private:
  std::shared_ptr<CheckpointFormat> real_;
  At at_;
};

TEST_P(BothWays, AFormatThatFailsLeavesTheOldCheckpointGood) {
  for (const auto at : {Failing::At::half_a_shard, Failing::At::wrong_bytes, Failing::At::index}) {
    const Folder root;
    const auto old = Model::mixed(1);
    {
      Saver saver(root, hdf5(), options(GetParam()));
      save(saver, old, 1);
    }
    Saver saver(root, std::make_shared<Failing>(hdf5(), at), options(GetParam()));
    saver.save(Model::mixed(2).snapshot(2));
    saver.wait();
    expect_unharmed(saver, root, old,
                    at == Failing::At::wrong_bytes ? "tensor embedding.weight reads back other bytes" : "No space left");
  }
}

TEST(Saver, AFolderThatCannotBeMadeIsNamed) {
  const Folder root;
  overwrite(root.path() / "run", "a file");
  const auto text = error_of([&] { Saver saver(root.path() / "run/checkpoints", hdf5(), options(true)); });
  EXPECT_THAT(text, HasSubstr("run/checkpoints"));
  EXPECT_THAT(text, HasSubstr("Not a directory"));
}

TEST(Saver, AFolderWithoutTheRightToWriteIsNamed) {
  const Folder root;
  const auto old = Model::mixed(1);
  Saver saver(root, hdf5(), options(true));
  save(saver, old, 1);
  namespace fs = std::filesystem;
  const auto nobody = static_cast<uid_t>(65534);
  const bool is_root = ::geteuid() == 0;  // whom permissions do not stop
  fs::permissions(root.path(), fs::perms(0555));
  if (is_root) {
    ASSERT_EQ(::seteuid(nobody), 0);
  }
  saver.save(Model::mixed(2).snapshot(2));
  saver.wait();
  if (is_root) {
    ASSERT_EQ(::seteuid(0), 0);
  }
  fs::permissions(root.path(), fs::perms::owner_all);
  const auto error = saver.take_error();
  ASSERT_TRUE(error);
  EXPECT_THAT(error->what(),
              ::testing::AllOf(HasSubstr(root.path().string()), HasSubstr("Permission denied"), HasSubstr("run.dir")));
  EXPECT_EQ(error->fault(), Fault::input);
  EXPECT_TRUE(load_newest(root, old).model == old);
}

TEST(Saver, AnErrorDuringTheCommitKeepsTheOldStep) {
  const Folder root;
  const auto old = Model::mixed(1);
  auto o = options(true);
  bool block = false;
  o.fault_hook = [&](std::string_view stage) {  // the step's name is taken by a file that rename() cannot replace
    if (stage == "old step set aside" && block) overwrite(root.path() / "step_000001", "in the way");
  };
  Saver saver(root, hdf5(), o);
  save(saver, old, 1);
  block = true;
  saver.save(Model::mixed(2).snapshot(1));
  saver.wait();
  const auto error = saver.take_error();
  ASSERT_TRUE(error);
  EXPECT_THAT(error->what(), HasSubstr("cannot be renamed"));
  std::filesystem::remove(root.path() / "step_000001");
  EXPECT_TRUE(load_newest(root, old).model == old);
}

TEST(RunState, RoundTripAndStrictness) {
  RunState state;
  state.step = 7, state.tokens = 1'000'000'007, state.seed = ~std::uint64_t{0},
  state.data_cursor = R"({"epoch":1,"sample":99})";
  state.recipe = "a: \"\\u00e9\"\nb: [1]\n", state.recipe_digest = "0123";
  state.plugins = {{"model", "gpt", "1.0.0"}}, state.more = {{"loss_average", "0x1.8p+1"}};
  EXPECT_EQ(RunState::parse(state.to_json(), "here"), state);
  EXPECT_THAT(error_of([] { RunState::parse("{", "file.json"); }), HasSubstr("[file.json]"));
  EXPECT_THAT(error_of([] { RunState::parse("[1]", "f"); }), HasSubstr("[f]"));
  EXPECT_THAT(error_of([] { RunState::parse(R"({"steps":1})", "f"); }), HasSubstr("\"steps\""));
}

}  // namespace
}  // namespace capstan::checkpoint::testing
