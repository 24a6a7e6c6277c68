// The hdf5 plugin itself: where payloads lie, what HDF5's own readers see, what it refuses.
#include "support.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>

#include <cmath>
#include <cstring>
#include <numeric>

namespace capstan::checkpoint::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

SavedTensor described(const std::string& name, DType dtype, const Shape& shape, const Box& box, const void* data) {
  SavedTensor t;
  t.name = name, t.dtype = dtype, t.global_shape = shape, t.box = box, t.data = data;
  t.bytes = *volume(box.extent) * size_of(dtype);
  return t;
}

// Reads a whole dataset as another program would, converted to float.
std::vector<float> read_with_hdf5(const Path& file, const char* name) {
  const auto id = H5Fopen(file.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  const auto dataset = H5Dopen2(id, name, H5P_DEFAULT);
  const auto space = H5Dget_space(dataset);
  std::vector<float> values(static_cast<std::size_t>(H5Sget_simple_extent_npoints(space)));
  EXPECT_GE(H5Dread(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()), 0);
  H5Sclose(space), H5Dclose(dataset), H5Fclose(id);
  return values;
}

TEST(Hdf5, PayloadsLieWhereTheManifestSaysAlignedToPages) {
  const Folder root;
  const auto path = (root.path() / "a.h5").string();
  auto model = Model::mixed(3);
  auto tensors = model.snapshot(1).tensors;
  std::int64_t last = 0;
  hdf5()->write_shard(path, tensors, [&](std::int64_t written) {
    EXPECT_GT(written, last);
    last = written;
  });
  const auto bytes = contents(path);
  std::int64_t sum = 0;
  for (const auto& t : tensors) {
    sum += t.bytes;
    if (t.bytes == 0) continue;
    ASSERT_LE(t.file_offset + t.bytes, static_cast<std::int64_t>(bytes.size()));
    EXPECT_EQ(std::memcmp(bytes.data() + t.file_offset, t.data, static_cast<std::size_t>(t.bytes)), 0) << t.name;
    EXPECT_TRUE(t.bytes < 4096 || t.file_offset % 4096 == 0) << t.name << " at " << t.file_offset;
  }
  EXPECT_EQ(last, sum);
}

TEST(Hdf5, ItsOwnReadersSeeTheValuesOfEveryFloatType) {
  const Folder root;
  const std::vector<float> values = {0.0f, -0.0f, 1.0f, -2.5f, 0.15625f, INFINITY, -INFINITY, 96.0f};
  std::vector<std::uint16_t> short_brain, half = {0x0000, 0x8000, 0x3c00, 0xc100, 0x3100, 0x7c00, 0xfc00, 0x5600};
  for (const float v : values) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &v, 4);
    short_brain.push_back(static_cast<std::uint16_t>(bits >> 16));
  }
  const std::vector<double> wide(values.begin(), values.end());
  std::vector<SavedTensor> tensors = {described("x/bf16", DType::bf16, {2, 4}, whole({2, 4}), short_brain.data()),
                                      described("x/f16", DType::f16, {8}, whole({8}), half.data()),
                                      described("x/f32", DType::f32, {8}, whole({8}), values.data()),
                                      described("x/f64", DType::f64, {8}, whole({8}), wide.data())};
  const auto path = root.path() / "a.h5";
  hdf5()->write_shard(path.string(), tensors, {});
  for (const auto* name : {"x/bf16", "x/f16", "x/f32", "x/f64"}) {
    const auto got = read_with_hdf5(path, name);
    ASSERT_EQ(got.size(), values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      EXPECT_EQ(got[i], values[i]) << name;
      EXPECT_EQ(std::signbit(got[i]), std::signbit(values[i])) << name;
    }
  }
}

TEST(Hdf5, TheIndexShowsWholeTensorsOverAllShardsEvenWhenTheFolderMoves) {
  const Folder root;
  std::filesystem::create_directory(root.path() / "written");
  std::vector<float> left(6), right(9), scalar = {7.5f};
  std::iota(left.begin(), left.end(), 0.0f), std::iota(right.begin(), right.end(), 100.0f);
  const auto format = hdf5();
  std::vector<SavedTensor> all;
  int index = 0;
  for (const auto& t : {described("m/w", DType::f32, {3, 5}, {{0, 0}, {3, 2}}, left.data()),
                        described("m/w", DType::f32, {3, 5}, {{0, 2}, {3, 3}}, right.data()),
                        described("m/scale", DType::f32, {}, {{}, {}}, scalar.data())}) {
    std::vector<SavedTensor> one = {t};
    one[0].file = "shard_" + std::to_string(index++) + ".h5";
    format->write_shard((root.path() / "written" / one[0].file).string(), one, {});
    all.push_back(one[0]);
  }
  format->write_index((root.path() / "written/index.h5").string(), all);
  std::filesystem::rename(root.path() / "written", root.path() / "moved");
  EXPECT_EQ(read_with_hdf5(root.path() / "moved/index.h5", "m/w"),
            (std::vector<float>{0, 1, 100, 101, 102, 2, 3, 103, 104, 105, 4, 5, 106, 107, 108}));
  EXPECT_EQ(read_with_hdf5(root.path() / "moved/index.h5", "m/scale"), scalar);
  // A missing shard shows as NaN, never as plausible zeros.
  std::filesystem::remove(root.path() / "moved/shard_1.h5");
  const auto holed = read_with_hdf5(root.path() / "moved/index.h5", "m/w");
  EXPECT_EQ(holed[0], 0.0f);
  EXPECT_TRUE(std::isnan(holed[2]));
}

TEST(Hdf5, ReadingRefusesWhatDoesNotAgree) {
  const Folder root;
  const auto path = (root.path() / "a.h5").string();
  std::vector<float> data(12, 1.0f), out(12);
  std::vector<SavedTensor> tensors = {described("w", DType::f32, {3, 4}, whole({3, 4}), data.data())};
  const auto format = hdf5();
  format->write_shard(path, tensors, {});
  const auto refused = [&](auto change) {
    auto t = tensors[0];
    change(t);
    return error_of([&] { format->read(path, t, out.data()); });
  };
  EXPECT_THAT(refused([](auto& t) { t.dtype = DType::i32; }),
              AllOf(HasSubstr("a.h5, tensor w"), HasSubstr("not of type i32")));
  EXPECT_THAT(refused([](auto& t) { t.global_shape = {4, 3}, t.box = whole({4, 3}); }), HasSubstr("extents"));
  EXPECT_THAT(refused([](auto& t) { t.name = "v"; }), AllOf(HasSubstr("tensor v"), HasSubstr("HDF5 says")));
  EXPECT_THAT(refused([](auto& t) { t.file_offset += 8; }), HasSubstr("its bytes lie at"));
  std::filesystem::resize_file(path, static_cast<std::uintmax_t>(tensors[0].file_offset + 20));
  EXPECT_THAT(refused([](auto&) {}), AllOf(HasSubstr("a.h5, tensor w")));
  overwrite(path, "not HDF5 at all");
  EXPECT_THAT(refused([](auto&) {}), AllOf(HasSubstr("a.h5"), HasSubstr("HDF5 says")));
  std::filesystem::remove(path);
  EXPECT_THAT(refused([](auto&) {}), HasSubstr("HDF5 says"));
}

TEST(Hdf5, ATensorUnderAnotherTensorsNameIsAnError) {
  const Folder root;
  const std::vector<float> data(4);
  std::vector<SavedTensor> tensors = {described("a", DType::f32, {4}, whole({4}), data.data()),
                                      described("a/b", DType::f32, {4}, whole({4}), data.data())};
  EXPECT_THAT(error_of([&] { hdf5()->write_shard((root.path() / "x.h5").string(), tensors, {}); }),
              AllOf(HasSubstr("tensor a/b"), HasSubstr("HDF5 says")));
}

TEST(Hdf5, ReadsFromAFolderThatNobodyMayWrite) {
  const Folder root;
  const auto path = (root.path() / "a.h5").string();
  const std::vector<float> data = {1, 2, 3};
  std::vector<float> out(3);
  std::vector<SavedTensor> tensors = {described("w", DType::f32, {3}, whole({3}), data.data())};
  hdf5()->write_shard(path, tensors, {});
  namespace fs = std::filesystem;
  fs::permissions(path, fs::perms::owner_read);
  fs::permissions(root.path(), fs::perms::owner_read | fs::perms::owner_exec);
  hdf5()->read(path, tensors[0], out.data());
  fs::permissions(root.path(), fs::perms::owner_all);
  EXPECT_EQ(out, data);
}

}  // namespace
}  // namespace capstan::checkpoint::testing
