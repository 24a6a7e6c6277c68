// Shared parts of the checkpoint tests.
#include "support.h"

#include "checkpoint/run_state.h"
#include "plugin/host.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

namespace capstan::checkpoint::testing {

namespace fs = std::filesystem;

Folder::Folder(bool in_memory) {
  const bool memory = in_memory && fs::is_directory("/dev/shm") && ::access("/dev/shm", W_OK) == 0;
  std::string pattern = ((memory ? fs::path("/dev/shm") : fs::temp_directory_path()) / "capstan_checkpoint_XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("cannot make " + pattern);
  path_ = pattern;
}

Folder::~Folder() {
  std::error_code error;
  fs::remove_all(path_, error);
}

std::shared_ptr<CheckpointFormat> make_format(const std::string& name) {
  static PluginHost host(CAPSTAN_PROGRAM);
  return host.make_as<CheckpointFormat>(host.choice("checkpoint", name, {}));
}

std::shared_ptr<CheckpointFormat> hdf5() { return make_format("hdf5"); }

Model Model::of(const std::string& name, DType dtype, const Shape& shape, unsigned seed) {
  Model m;
  m.add(name, dtype, shape, whole(shape));
  m.randomize(seed);
  return m;
}

Model Model::mixed(unsigned seed) {
  Model m;
  const auto add = [&m](const std::string& name, DType dtype, const Shape& shape) {
    m.add(name, dtype, shape, whole(shape));
  };
  add("embedding.weight", DType::f32, {33, 17});
  add("layers.0.attention.qkv.weight", DType::bf16, {48, 31});
  add("layers.0.norm.weight", DType::f64, {31});
  add("optimizer/m/layers.0.norm.weight", DType::f32, {31});
  add("optimizer/v/layers.0.norm.weight", DType::f32, {31});
  add("optimizer/steps", DType::i64, {});
  add("counts", DType::i32, {2, 3, 4});
  add("half", DType::f16, {5});
  add("fp8/a", DType::f8e4m3, {70});
  add("fp8/b", DType::f8e5m2, {7, 10});
  add("bytes", DType::u8, {3});
  add("mask", DType::boolean, {9});
  add("empty", DType::f32, {0, 4});
  m.randomize(seed);
  return m;
}

void Model::add(const std::string& name, DType dtype, const Shape& shape, const Box& box) {
  const auto bytes = *volume(box.extent) * size_of(dtype);
  tensors_.push_back({name, dtype, shape, box, std::vector<unsigned char>(static_cast<std::size_t>(bytes))});
}

void Model::randomize(unsigned seed) {
  std::mt19937 random(seed);
  for (auto& t : tensors_) {
    for (auto& byte : t.bytes) byte = static_cast<unsigned char>(t.dtype == DType::boolean ? random() & 1 : random());
  }
}

Model Model::blank() const {
  Model m = *this;
  for (auto& t : m.tensors_) std::fill(t.bytes.begin(), t.bytes.end(), static_cast<unsigned char>(0));
  return m;
}

Snapshot Model::snapshot(std::int64_t step) const {
  Snapshot s;
  s.step = step;
  RunState state;
  state.step = step, state.tokens = step * 4096, state.seed = 0xfedcba9876543210u, state.data_cursor = R"({"sample":12})";
  state.recipe = "model: {plugin: gpt}\n";
  s.state_json = state.to_json();
  for (const auto& t : tensors_) {
    SavedTensor saved;
    saved.name = t.name, saved.dtype = t.dtype, saved.global_shape = t.global_shape, saved.box = t.box;
    saved.data = t.bytes.data(), saved.bytes = static_cast<std::int64_t>(t.bytes.size());
    s.tensors.push_back(saved);
  }
  return s;
}

std::vector<Wanted> Model::wanted() {
  std::vector<Wanted> all;
  for (auto& t : tensors_) all.push_back({t.name, t.dtype, t.global_shape, t.box, t.bytes.data()});
  return all;
}

bool Model::operator==(const Model& other) const {
  return std::equal(tensors_.begin(), tensors_.end(), other.tensors_.begin(), other.tensors_.end(),
                    [](const Held& a, const Held& b) { return a.name == b.name && a.bytes == b.bytes; });
}

SaverOptions options(bool asynchronous, int keep) {
  SaverOptions o;
  o.asynchronous = asynchronous, o.keep = keep;
  return o;
}

void save(Saver& saver, const Model& model, std::int64_t step) {
  saver.save(model.snapshot(step));
  saver.wait();
  const auto error = saver.take_error();
  ASSERT_FALSE(error) << error->what();
}

Outcome load_newest(const Path& root, const Model& like, std::vector<std::string>* heard) {
  Outcome outcome{-1, like.blank(), ""};
  const auto loaded =
      checkpoint::load_newest(root, outcome.model.wanted(), make_format, OnDamage::fall_back, [&](const std::string& text) {
        if (heard) heard->push_back(text);
      });
  if (loaded) outcome.step = loaded->step, outcome.state = loaded->state_json;
  return outcome;
}

std::vector<std::string> names_in(const Path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

std::string contents(const Path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void overwrite(const Path& file, const std::string& bytes) {
  std::ofstream out(file, std::ios::binary | std::ios::trunc);
  out << bytes;
}

void flip_bit(const Path& file, std::int64_t byte) {
  auto bytes = contents(file);
  auto& target = bytes.at(static_cast<std::size_t>(byte));
  target = static_cast<char>(target ^ 0x10);
  overwrite(file, bytes);
}

void no_error_thrown() { ADD_FAILURE() << "expected an Error"; }

}  // namespace capstan::checkpoint::testing
