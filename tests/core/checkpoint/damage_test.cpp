// Damaged checkpoints are found, named by file and tensor, passed over loudly, and never loaded in part; another
// model's checkpoint is refused in both directions.
#include "support.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <functional>

namespace capstan::checkpoint::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// Steps 1 and 2 of one model with different bits.
class Damage : public ::testing::Test {
 protected:
  void SetUp() override {
    Saver saver(root, hdf5(), options(false));
    save(saver, one, 1);
    save(saver, two, 2);
  }

  StoredTensor stored(const std::string& name) const { return read_manifest(newest).tensors.at(name); }

  // Does something to step 2 and expects: verify() names it, the load falls back to step 1 and says so, and with the
  // other policy it stops with the same words.
  void expect_fallback(const std::function<void()>& harm, const std::vector<std::string>& words) {
    harm();
    const auto problems = verify(newest);
    ASSERT_FALSE(problems.empty());
    std::string all;
    bool fatal = false;
    for (const auto& p : problems) all += p.text + "\n", fatal |= p.fatal;
    EXPECT_TRUE(fatal);
    for (const auto& word : words) EXPECT_THAT(all, HasSubstr(word));

    std::vector<std::string> heard;
    const auto loaded = load_newest(root, one, &heard);
    EXPECT_EQ(loaded.step, 1);
    EXPECT_TRUE(loaded.model == one);
    ASSERT_GE(heard.size(), 2u);
    for (const auto& word : words) EXPECT_THAT(heard[heard.size() - 2], HasSubstr(word));
    EXPECT_THAT(heard.back(), HasSubstr("step 1 is good"));

    auto target = one.blank();
    const auto text = error_of([&] { checkpoint::load_newest(root, target.wanted(), make_format, OnDamage::stop, {}); });
    for (const auto& word : words) EXPECT_THAT(text, HasSubstr(word));
    EXPECT_TRUE(target == one.blank()) << "nothing may be written before all is verified";
  }

  const Folder root;
  const Path newest = root.path() / "step_000002";
  const Path shard = newest / "shard_00000.h5";
  const Model one = Model::mixed(1), two = Model::mixed(2);
};

TEST_F(Damage, NoneIsFoundInAGoodCheckpoint) {
  EXPECT_THAT(verify(newest), SizeIs(0));
  EXPECT_TRUE(load_newest(root, one).model == two);
}

TEST_F(Damage, FlippedBitInAPayloadNamesItsTensor) {
  const auto box = stored("layers.0.attention.qkv.weight").boxes.at(0);
  expect_fallback([&] { flip_bit(shard, box.offset + box.bytes - 1); },
                  {"tensor layers.0.attention.qkv.weight", "shard_00000.h5", "is damaged"});
  EXPECT_EQ(verify(newest).at(0).tensor, "layers.0.attention.qkv.weight");
}

TEST_F(Damage, FlippedBitInMetadata) {
  expect_fallback([&] { flip_bit(shard, 40); }, {"shard_00000.h5 is damaged outside its tensors' bytes"});
}

TEST_F(Damage, TruncatedShardNamesWhatIsLost) {
  const auto last = stored("layers.0.attention.qkv.weight").boxes.at(0);
  expect_fallback([&] { std::filesystem::resize_file(shard, static_cast<std::uintmax_t>(last.offset + 7)); },
                  {"shard_00000.h5 is cut short", "lost: ", "got " + std::to_string(last.offset + 7)});
}

TEST_F(Damage, EmptyShard) {
  expect_fallback([&] { overwrite(shard, ""); }, {"shard_00000.h5 is cut short", "got 0"});
}
TEST_F(Damage, LongerShard) {
  expect_fallback([&] { overwrite(shard, contents(shard) + "x"); }, {"shard_00000.h5 is too long"});
}
TEST_F(Damage, MissingShard) {
  expect_fallback([&] { std::filesystem::remove(shard); }, {"shard_00000.h5 is missing", "it holds"});
}
TEST_F(Damage, MissingState) {
  expect_fallback([&] { std::filesystem::remove(newest / "state.json"); }, {"state.json is missing"});
}
TEST_F(Damage, ChangedState) {
  expect_fallback([&] { flip_bit(newest / "state.json", 12); }, {"state.json is damaged"});
}
TEST_F(Damage, MissingManifest) {
  expect_fallback([&] { std::filesystem::remove(newest / "MANIFEST.json"); }, {"MANIFEST.json"});
}
TEST_F(Damage, EmptyManifest) {
  expect_fallback([&] { overwrite(newest / "MANIFEST.json", ""); }, {"MANIFEST.json", "not a manifest"});
}

TEST_F(Damage, ShardIsAFolder) {
  expect_fallback([&] { std::filesystem::remove(shard), std::filesystem::create_directory(shard); },
                  {"shard_00000.h5 is not a file"});
}

TEST_F(Damage, HalfAManifest) {
  const auto text = contents(newest / "MANIFEST.json");
  expect_fallback([&] { overwrite(newest / "MANIFEST.json", text.substr(0, text.size() / 2)); },
                  {"MANIFEST.json", "not a manifest"});
}

// Anywhere in the manifest a flipped bit is either found, or was in white space and changes nothing.
TEST_F(Damage, AnyFlippedBitInTheManifest) {
  const auto path = newest / "MANIFEST.json";
  const auto good = contents(path);
  const auto meaning = to_json(read_manifest(newest));
  int found = 0;
  for (std::size_t i = 0; i < good.size(); i += 7) {
    auto bad = good;
    bad[i] = static_cast<char>(bad[i] ^ (1 << (i % 8)));
    overwrite(path, bad);
    try {
      EXPECT_EQ(to_json(read_manifest(newest)), meaning) << "byte " << i << " changed the meaning unseen";
    } catch (const Error&) {
      ++found;
    }
  }
  EXPECT_GT(found, static_cast<int>(good.size()) / 7 / 2);
}

TEST_F(Damage, AnIndexIsNotNeededAndAStrayFileDoesNoHarmButBothAreTold) {
  flip_bit(newest / "index.h5", 100);
  overwrite(newest / "shard_00001.h5", "stray");
  const auto problems = verify(newest);
  ASSERT_THAT(problems, SizeIs(2));
  for (const auto& p : problems) EXPECT_FALSE(p.fatal) << p.text;
  std::vector<std::string> heard;
  EXPECT_TRUE(load_newest(root, one, &heard).model == two);
  EXPECT_THAT(heard, ElementsAre(HasSubstr("index.h5 is damaged"), HasSubstr("shard_00001.h5 does not belong")));
}

TEST_F(Damage, TheManifestOfAnotherCheckpointDoesNotFit) {
  // Same names and sizes, other checksums: a good manifest over the wrong bytes.
  expect_fallback([&] { overwrite(newest / "MANIFEST.json", contents(root.path() / "step_000001/MANIFEST.json")); },
                  {"tensor embedding.weight", "is damaged"});
}

TEST_F(Damage, NothingGoodIsAnErrorThatListsAll) {
  flip_bit(shard, 40);
  std::filesystem::remove(root.path() / "step_000001/shard_00000.h5");
  auto target = one.blank();
  const auto text = error_of([&] { checkpoint::load_newest(root, target.wanted(), make_format, OnDamage::fall_back, {}); });
  EXPECT_THAT(text,
              AllOf(HasSubstr("none of the 2 checkpoints is good"), HasSubstr("step_000001"), HasSubstr("step_000002")));
}

TEST_F(Damage, NoCheckpointAtAllIsNoError) {
  const Folder empty;
  EXPECT_EQ(load_newest(empty.path() / "absent", one).step, -1);
  EXPECT_EQ(load_newest(empty, one).step, -1);
}

TEST_F(Damage, ABadLatestIsToldAndTheNewestStepTaken) {
  for (const auto& text :
       std::vector<std::string>{"", "\n", "step_000003\n", "step_2\n", "../../etc/passwd\n", {'\0', '\xff'}}) {
    overwrite(root.path() / "LATEST", text);
    std::vector<std::string> heard;
    const auto loaded = load_newest(root, one, &heard);
    EXPECT_EQ(loaded.step, 2);
    EXPECT_THAT(heard, ElementsAre(AllOf(HasSubstr("LATEST"), HasSubstr("names no checkpoint")))) << "for \"" << text << '"';
  }
  std::filesystem::remove(root.path() / "LATEST");
  EXPECT_EQ(load_newest(root, one).step, 2);
}

TEST_F(Damage, LatestDecidesOverLaterStepsOfAnAbandonedPart) {
  overwrite(root.path() / "LATEST", "step_000001\n");
  EXPECT_EQ(load_newest(root, one).step, 1);
  flip_bit(root.path() / "step_000001/shard_00000.h5", 40);
  EXPECT_EQ(load_newest(root, one).step, 2) << "later steps come last, but before giving up";
}

TEST_F(Damage, AnotherModelsCheckpointIsRefusedWithASummary) {
  auto other = Model::of("embedding.weight", DType::f32, {33, 18}, 1);
  other.add("layers.0.norm.weight", DType::f32, {31}, whole({31}));
  other.add("layers.9.bias", DType::f32, {4}, whole({4}));
  auto same = one.blank();
  for (const auto& t : same.tensors()) {
    if (t.name != "embedding.weight" && t.name != "layers.0.norm.weight" && t.name != "mask" && t.name != "half") {
      other.add(t.name, t.dtype, t.global_shape, t.box);
    }
  }
  const auto text = error_of([&] {
    checkpoint::load_newest(root, other.wanted(), make_format, OnDamage::fall_back,
                            [](const auto&) { FAIL() << "this is no damage"; });
  });
  EXPECT_THAT(text,
              AllOf(HasSubstr("checkpoint of another model"), HasSubstr("1 tensors are missing from it: layers.9.bias"),
                    HasSubstr("2 tensors in it are not wanted: half, mask"),
                    HasSubstr("embedding.weight (checkpoint: f32 [33, 17], wanted: f32 [33, 18])"),
                    HasSubstr("layers.0.norm.weight (checkpoint: f64 [31], wanted: f32 [31])")));
}

TEST_F(Damage, OnlyWhatTheCallerNamesMayStayUnread) {
  auto weights = two.blank();
  std::erase_if(weights.tensors(), [](const auto& t) { return t.name.starts_with("optimizer/"); });
  EXPECT_THAT(error_of([&] { load(newest, weights.wanted(), make_format); }), HasSubstr("3 tensors in it are not wanted"));
  load(newest, weights.wanted(), make_format, {{"optimizer/"}, {}});
  auto expected = two;
  std::erase_if(expected.tensors(), [](const auto& t) { return t.name.starts_with("optimizer/"); });
  EXPECT_TRUE(weights == expected);
}

// Writes a manifest changed as JSON, with its own checksum set right again: hostile or made by another program.
void rewrite(const Path& folder, const std::function<void(nlohmann::json&)>& change) {
  auto document = nlohmann::json::parse(contents(folder / "MANIFEST.json"));
  document.erase("xxh3_of_all_above");
  change(document);
  const auto compact = document.dump();
  document["xxh3_of_all_above"] = hash_text(xxh3(compact.data(), static_cast<std::int64_t>(compact.size())));
  overwrite(folder / "MANIFEST.json", document.dump());
}

TEST_F(Damage, AManifestThatContradictsItselfIsRefused) {
  const auto path = newest / "MANIFEST.json";
  const auto good = contents(path);
  using json = nlohmann::json;
  const auto refused = [&](const std::function<void(json&)>& change) {
    overwrite(path, good);
    rewrite(newest, change);
    return error_of([&] { read_manifest(newest); });
  };
  const auto tensor = [](json& m) -> json& { return m["tensors"]["embedding.weight"]; };
  EXPECT_THAT(refused([](auto& m) { m["extra"] = 1; }), HasSubstr("unknown field \"extra\""));
  EXPECT_THAT(refused([](auto& m) { m.erase("step"); }), HasSubstr("\"step\" is missing"));
  EXPECT_THAT(refused([](auto& m) { m["step"] = -4; }), HasSubstr("negative step"));
  EXPECT_THAT(refused([](auto& m) { m["step"] = 1.5; }), HasSubstr("expected an integer"));
  EXPECT_THAT(refused([](auto& m) { m["step"] = 18446744073709551615u; }), HasSubstr("expected an integer"));
  EXPECT_THAT(refused([](auto& m) { m["files"]["../escape"] = m["files"]["state.json"]; }),
              HasSubstr("is not the name of a file"));
  EXPECT_THAT(refused([](auto& m) { m["files"].erase("state.json"); }), HasSubstr("no file state.json"));
  EXPECT_THAT(refused([](auto& m) { m["files"].erase("shard_00000.h5"); }), HasSubstr("not listed among the files"));
  EXPECT_THAT(refused([&](auto& m) { tensor(m)["dtype"] = "f33"; }), HasSubstr("f33"));
  EXPECT_THAT(refused([&](auto& m) {
                tensor(m)["shape"] = {std::int64_t{1} << 40, std::int64_t{1} << 40};
              }),
              HasSubstr("impossible global shape"));
  EXPECT_THAT(refused([&](auto& m) { tensor(m)["shape"] = {33, 18}; }), HasSubstr("uncovered"));
  EXPECT_THAT(refused([&](auto& m) { tensor(m)["boxes"][0]["offset"] = std::int64_t{1} << 60; }),
              HasSubstr("do not lie inside"));
  EXPECT_THAT(refused([&](auto& m) { tensor(m)["boxes"][0]["offset"] = -2; }), HasSubstr("do not lie inside"));
  EXPECT_THAT(refused([&](auto& m) { tensor(m)["boxes"][0]["bytes"] = 1; }), HasSubstr("got 1"));
  EXPECT_THAT(refused([&](auto& m) { tensor(m)["boxes"][0]["xxh3"] = "12"; }), HasSubstr("16 hexadecimal digits"));
  EXPECT_THAT(refused([&](auto& m) { tensor(m)["boxes"].push_back(tensor(m)["boxes"][0]); }), HasSubstr("overlap"));
  EXPECT_THAT(refused([&](auto& m) { tensor(m)["boxes"] = json::array(); }), HasSubstr("uncovered"));
  EXPECT_THAT(refused([](auto& m) { m["tensors"] = json::array(); }), HasSubstr("must be objects"));
  overwrite(path, "[" + std::string(100'000, '[') + std::string(100'000, ']') + "]");
  EXPECT_THAT(error_of([&] { read_manifest(newest); }), HasSubstr("nested too deeply"));
}

TEST_F(Damage, AnotherFormatVersionIsNoDamage) {
  rewrite(newest, [](auto& m) {
    m["format_version"] = 2;
    m["news"] = true;
  });
  auto target = one.blank();
  const auto text = error_of([&] { checkpoint::load_newest(root, target.wanted(), make_format, OnDamage::fall_back, {}); });
  EXPECT_THAT(text, AllOf(HasSubstr("format version 2"), HasSubstr("this program reads 1 to 1")));
}

// The manifest and the shard agree with their checksums but not with each other: the format looks for itself.
TEST_F(Damage, AShardThatDescribesATensorOtherwiseIsRefused) {
  rewrite(newest, [](auto& m) {
    std::swap(m["tensors"]["optimizer/m/layers.0.norm.weight"]["boxes"],
              m["tensors"]["optimizer/v/layers.0.norm.weight"]["boxes"]);
  });
  EXPECT_THAT(verify(newest), SizeIs(0));
  auto target = one.blank();
  const auto text = error_of([&] { load(newest, target.wanted(), make_format); });
  EXPECT_THAT(text,
              AllOf(HasSubstr("optimizer/m/layers.0.norm.weight"), HasSubstr("shard_00000.h5"), HasSubstr("expected")));
}

}  // namespace
}  // namespace capstan::checkpoint::testing
