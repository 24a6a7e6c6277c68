// A checkpoint that cannot be read for a reason that is not its content is no damaged one: it is never passed over,
// replaced or called damaged.
#include "support.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/resource.h>
#include <fcntl.h>
#include <unistd.h>

#include <functional>

namespace capstan::checkpoint::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
namespace fs = std::filesystem;

/// Permissions do not stop root: while this lives, the process is nobody's.
class WithoutRights {
 public:
  WithoutRights() : root_(::geteuid() == 0) {
    EXPECT_EQ(root_ ? ::seteuid(65534) : 0, 0);
  }
  ~WithoutRights() {
    EXPECT_EQ(root_ ? ::seteuid(0) : 0, 0);
  }
  WithoutRights(const WithoutRights&) = delete;
  WithoutRights& operator=(const WithoutRights&) = delete;

 private:
  bool root_;
};

/// While this lives, `free` more files can be opened.
class FewFiles {
 public:
  explicit FewFiles(int free) {
    const int next = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    ::close(next);
    EXPECT_EQ(::getrlimit(RLIMIT_NOFILE, &before_), 0);
    rlimit limit = before_;
    limit.rlim_cur = static_cast<rlim_t>(next + free);
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  }
  ~FewFiles() { ::setrlimit(RLIMIT_NOFILE, &before_); }
  FewFiles(const FewFiles&) = delete;
  FewFiles& operator=(const FewFiles&) = delete;

 private:
  rlimit before_{};
};

// Steps 1 and 2 of one model with different bits.
class Unread : public ::testing::Test {
 protected:
  void SetUp() override {
    Saver saver(root, hdf5(), options(false));
    save(saver, one, 1);
    save(saver, two, 2);
    fs::permissions(root.path(), fs::perms(0755));
  }
  /// A link to itself, which nobody can open, stands in the file's place.
  static void hide(const Path& file) {
    fs::rename(file, file.string() + ".away");
    fs::create_symlink(file.filename(), file);
  }
  static void show(const Path& file) {
    fs::remove(file);
    fs::rename(file.string() + ".away", file);
  }
  /// Loading stops with these words and does not say a word of another checkpoint.
  void expect_stop(Fault fault, const std::vector<std::string>& words) {
    for (const auto policy : {OnDamage::fall_back, OnDamage::stop}) {
      auto target = one.blank();
      std::vector<std::string> heard;
      try {
        checkpoint::load_newest(root, target.wanted(), make_format, policy, [&](const auto& line) { heard.push_back(line); });
        FAIL() << "it was loaded";
      } catch (const Unreadable& e) {
        EXPECT_EQ(e.fault(), fault) << e.what();
        for (const auto& word : words) EXPECT_THAT(e.what(), HasSubstr(word));
        EXPECT_THAT(e.what(), AllOf(Not(HasSubstr("damaged")), Not(HasSubstr("write"))));
      }
      EXPECT_THAT(heard, ElementsAre());
      EXPECT_TRUE(target == one.blank());
    }
  }

  const Folder root;
  const Path newest = root.path() / "step_000002";
  const Model one = Model::mixed(1), two = Model::mixed(2);
};

TEST_F(Unread, AFileIsNeverTakenForDamage) {
  for (const char* name : {"shard_00000.h5", "state.json", "MANIFEST.json"}) {
    SCOPED_TRACE(name);
    hide(newest / name);
    expect_stop(Fault::runtime, {name, "symbolic link", "step 2 may be good", "no other is taken", newest.string()});
    const auto problems = verify(newest);
    ASSERT_FALSE(problems.empty());
    EXPECT_EQ(problems[0].unreadable, Fault::runtime);
    EXPECT_TRUE(problems[0].fatal);
    show(newest / name);
  }
  EXPECT_TRUE(load_newest(root, one).model == two) << "and nothing was changed";
}

TEST_F(Unread, AMissingPermissionIsBadInput) {
  for (const auto& path : {newest / "shard_00000.h5", newest / "MANIFEST.json", newest, root.path() / "LATEST", root.path()}) {
    SCOPED_TRACE(path);
    const auto before = fs::status(path).permissions();
    fs::permissions(path, fs::perms::none);
    {
      const WithoutRights nobody;
      auto target = one.blank();
      const std::function<void(const std::string&)> report = [](const auto& line) { ADD_FAILURE() << line; };
      try {
        checkpoint::load_newest(root, target.wanted(), make_format, OnDamage::fall_back, report);
        ADD_FAILURE() << "it was loaded";
      } catch (const Unreadable& e) {
        EXPECT_EQ(e.fault(), Fault::input);
        EXPECT_THAT(e.what(), AllOf(HasSubstr("Permission denied"), HasSubstr("right to read"), Not(HasSubstr("write"))));
      }
    }
    fs::permissions(path, before);
  }
  EXPECT_TRUE(load_newest(root, one).model == two);
}

// Whichever file is the one too many, core's or the format's.
TEST_F(Unread, TooManyOpenFilesAreNoDamage) {
  make_format("hdf5");
  int stopped = 0;
  for (int free = 0; free < 6; ++free) {
    auto target = one.blank();
    const FewFiles few(free);
    try {
      const auto loaded = checkpoint::load_newest(root, target.wanted(), make_format, OnDamage::fall_back, {});
      EXPECT_EQ(loaded->step, 2) << free;
    } catch (const Unreadable& e) {
      ++stopped;
    }
  }
  EXPECT_GE(stopped, 2);
}

/// Fails to read, and does something to the file before.
class Failing final : public CheckpointFormat {
 public:
  Failing(Fault fault, std::function<void(const Path&)> harm) : fault_(fault), harm_(std::move(harm)) {}
  std::string_view name() const override { return "hdf5"; }
  std::string_view extension() const override { return ".h5"; }
  void write_shard(const std::string&, std::span<SavedTensor>, const std::function<void(std::int64_t)>&) override {}
  void read(const std::string& path, const SavedTensor&, void*) override {
    if (harm_) harm_(path);
    fail(fault_, path, "the library says no");
  }
  void write_index(const std::string&, std::span<const SavedTensor>) override {}

 private:
  Fault fault_;
  std::function<void(const Path&)> harm_;
};

// The bytes are right: then an error of the machine is no damage. What the format finds wrong in them is, and what has changed.
TEST_F(Unread, AFormatThatFailsOnGoodBytesFindsNoDamage) {
  const auto load = [&](Fault fault, const std::function<void(const Path&)>& harm) {
    auto target = one.blank();
    checkpoint::load(newest, target.wanted(), [&](const std::string&) { return std::make_shared<Failing>(fault, harm); });
  };
  EXPECT_THROW(load(Fault::runtime, {}), Unreadable);
  EXPECT_THROW(load(Fault::input, {}), Damaged);
  EXPECT_THROW(load(Fault::runtime, [](const Path& file) { flip_bit(file, 40); }), Damaged);
  flip_bit(newest / "shard_00000.h5", 40);
  EXPECT_THROW(load(Fault::runtime, [](const Path& file) { fs::remove(file); }), Damaged);
}

TEST_F(Unread, WhatIsNotThereIsStillDamage) {
  fs::rename(newest, root.path() / "away");
  overwrite(newest, "a file in the folder's place");
  EXPECT_EQ(load_newest(root, one).step, 1);
  fs::remove(newest);
  fs::create_directory(newest);
  EXPECT_EQ(load_newest(root, one).step, 1);
}

// The new step is good before the old one of its name is cleared away.
TEST_F(Unread, AnOldStepThatStaysIsNoFailedSave) {
  auto o = options(true);
  const auto aside = root.path() / "step_000002.superseded";
  o.fault_hook = [&](std::string_view stage) {
    if (stage != "latest flushed" || !fs::exists(aside)) return;
    fs::permissions(root.path(), fs::perms(0555));
    EXPECT_EQ(::geteuid() == 0 ? ::seteuid(65534) : 0, 0);
  };
  Saver saver(root, hdf5(), o);
  saver.save(one.snapshot(2));
  saver.wait();
  ASSERT_EQ(::getuid() == 0 ? ::seteuid(0) : 0, 0);
  fs::permissions(root.path(), fs::perms(0755));
  const auto error = saver.take_error();
  ASSERT_TRUE(error);
  EXPECT_THAT(error->what(), AllOf(HasSubstr("step 2] saved, but"), HasSubstr("superseded"), Not(HasSubstr("not saved"))));
  EXPECT_EQ(saver.last_report().step, 2);
  EXPECT_TRUE(load_newest(root, one).model == one);
}

}  // namespace
}  // namespace capstan::checkpoint::testing
