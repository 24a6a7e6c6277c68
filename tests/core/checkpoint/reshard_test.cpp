// What several writers saved in one sharding loads in any other, bit for bit.
#include "support.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>

namespace capstan::checkpoint::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

// Cuts a box at random until there are about `pieces`; always a tiling.
std::vector<Box> cut(std::mt19937& random, const Shape& shape, std::size_t pieces) {
  std::vector<Box> boxes = {whole(shape)};
  for (int tries = 0; boxes.size() < pieces && tries < 50 && !shape.empty(); ++tries) {
    auto& box = boxes[random() % boxes.size()];
    const auto d = random() % shape.size();
    if (box.extent[d] < 2) continue;
    const auto left = 1 + static_cast<std::int64_t>(random() % static_cast<unsigned>(box.extent[d] - 1));
    auto other = box;
    other.begin[d] += left, other.extent[d] -= left;
    box.extent[d] = left;
    boxes.push_back(other);
  }
  return boxes;
}

Held part_of(const Held& full, const Box& box) {
  Held part{full.name, full.dtype, full.global_shape, box, {}};
  part.bytes.resize(static_cast<std::size_t>(*volume(box.extent) * size_of(full.dtype)));
  copy_common(full.box, full.bytes.data(), box, part.bytes.data(), size_of(full.dtype));
  return part;
}

// Saves `model` as `writers` writers would, each box in the shard of a random one.
void save_in_pieces(const Path& root, Model& model, int writers, std::mt19937& random) {
  std::vector<std::vector<Held>> held(static_cast<std::size_t>(writers));
  for (const auto& t : model.tensors()) {
    for (const auto& box : cut(random, t.global_shape, 1 + random() % 6))
      held[random() % held.size()].push_back(part_of(t, box));
  }
  const auto format = hdf5();
  Attempt attempt(root, 5, "several");
  attempt.create();
  std::map<std::string, FileRecord> shards;
  std::vector<SavedTensor> all;
  for (int writer = 0; writer < writers; ++writer) {
    std::vector<SavedTensor> tensors;
    for (const auto& t : held[static_cast<std::size_t>(writer)]) {
      SavedTensor saved;
      saved.name = t.name, saved.dtype = t.dtype, saved.global_shape = t.global_shape, saved.box = t.box;
      saved.data = t.bytes.data(), saved.bytes = static_cast<std::int64_t>(t.bytes.size());
      tensors.push_back(saved);
    }
    shards.insert(attempt.write_shard(*format, writer, tensors));
    all.insert(all.end(), tensors.begin(), tensors.end());
  }
  attempt.commit(*format, all, shards, "{}");
}

TEST(Reshard, AnySplitLoadsIntoAnyOther) {
  std::mt19937 random(11);
  for (int trial = 0; trial < 12; ++trial) {
    const Folder root;
    auto model = Model::mixed(static_cast<unsigned>(trial));
    model.add("experts", DType::bf16, {4, 6, 5, 3}, whole({4, 6, 5, 3}));
    model.randomize(static_cast<unsigned>(trial + 100));
    save_in_pieces(root, model, 1 + trial % 4, random);
    ASSERT_THAT(verify(root.path() / "step_000005"), SizeIs(0));

    Model pieces;  // another split, all boxes held here; and some boxes asked for twice, as replicas would
    for (const auto& t : model.tensors()) {
      for (const auto& box : cut(random, t.global_shape, 1 + random() % 6)) pieces.add(t.name, t.dtype, t.global_shape, box);
      if (random() % 3 == 0) pieces.add(t.name, t.dtype, t.global_shape, whole(t.global_shape));
    }
    // Every second box is taken from the loader's memory.
    std::vector<Wanted> wanted = pieces.wanted();
    std::vector<int> times(wanted.size());
    for (std::size_t i = 0; i < wanted.size(); i += 2)
      wanted[i].take = [to = std::exchange(wanted[i].target, nullptr), bytes = pieces.tensors()[i].bytes.size(), &n = times[i]](void* from) {
        if (bytes > 0) std::memcpy(to, from, bytes), std::memset(from, 0x55, bytes);
        ++n;
      };
    load(root.path() / "step_000005", wanted, make_format);
    for (std::size_t i = 0; i < wanted.size(); ++i) EXPECT_EQ(times[i], i % 2 == 0 ? 1 : 0) << wanted[i].name;
    for (const auto& piece : pieces.tensors()) {
      const auto full =
          std::find_if(model.tensors().begin(), model.tensors().end(), [&](const auto& t) { return t.name == piece.name; });
      ASSERT_EQ(piece.bytes, part_of(*full, piece.box).bytes) << piece.name << " " << text_of(piece.box);
    }
  }
}

TEST(Reshard, AHoleBetweenWritersIsRefusedAtCommit) {
  const Folder root;
  auto model = Model::of("w", DType::f32, {4, 4}, 1);
  auto tensors = model.snapshot(1).tensors;
  tensors[0].box = {{0, 0}, {3, 4}}, tensors[0].bytes = 48;  // the writer of the last row forgot it
  const auto format = hdf5();
  Attempt attempt(root, 1, "a");
  attempt.create();
  const auto shard = attempt.write_shard(*format, 0, tensors);
  EXPECT_THAT(error_of([&] { attempt.commit(*format, tensors, {shard}, "{}"); }), HasSubstr("4 of 16 elements uncovered"));
  attempt.abandon();
  EXPECT_THAT(names_in(root), SizeIs(0));
}

}  // namespace
}  // namespace capstan::checkpoint::testing
