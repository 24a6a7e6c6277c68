// defines: what the checkpoint tests share: a folder that goes away, a made-up model's tensors, the format.
#pragma once
#include "checkpoint/loader.h"
#include "checkpoint/saver.h"

#include <capstan/checkpoint.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace capstan::checkpoint::testing {

/// A new folder, removed with all in it at the end.
class Folder {
 public:
  /// In memory, where fsyncs are cheap, if there is such a place; for what a kill leaves it makes no difference.
  explicit Folder(bool in_memory = true);
  ~Folder();
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  const Path& path() const { return path_; }
  operator const Path&() const { return path_; }

 private:
  Path path_;
};

/// The hdf5 plugin, through the program's own plugin host.
std::shared_ptr<CheckpointFormat> hdf5();
std::shared_ptr<CheckpointFormat> make_format(const std::string& name);

struct Held {
  std::string name;
  DType dtype;
  Shape global_shape;
  Box box;
  std::vector<unsigned char> bytes;
};

/// Tensors with arbitrary bits (NaN payloads and negative zeros included), the same for the same seed.
class Model {
 public:
  /// Scalars, vectors, matrices and an empty tensor in f64, f32, bf16, f16, fp8, i32, i64, u8 and boolean.
  static Model mixed(unsigned seed);
  static Model of(const std::string& name, DType dtype, const Shape& shape, unsigned seed);

  void add(const std::string& name, DType dtype, const Shape& shape, const Box& box);
  void randomize(unsigned seed);
  /// The same tensors with every byte zero: to load into.
  Model blank() const;
  Snapshot snapshot(std::int64_t step) const;
  std::vector<Wanted> wanted();
  std::vector<Held>& tensors() { return tensors_; }
  bool operator==(const Model& other) const;

 private:
  std::vector<Held> tensors_;
};

SaverOptions options(bool asynchronous, int keep = 0);

/// Saves and waits; fails the test when that fails.
void save(Saver& saver, const Model& model, std::int64_t step);

/// The model loaded from the newest good checkpoint; step -1 when there is none. `heard` gets the reports.
struct Outcome {
  std::int64_t step = -1;
  Model model;
  std::string state;
};
Outcome load_newest(const Path& root, const Model& like, std::vector<std::string>* heard = nullptr);

/// Names in a folder, sorted.
std::vector<std::string> names_in(const Path& folder);
std::string contents(const Path& file);
void overwrite(const Path& file, const std::string& bytes);
void flip_bit(const Path& file, std::int64_t byte);

/// The message of the Error that `act` throws; fails the test when it throws none.
template <class Act>
std::string error_of(const Act& act);
void no_error_thrown();

template <class Act>
std::string error_of(const Act& act) {
  try {
    act();
  } catch (const Error& e) {
    return e.what();
  }
  no_error_thrown();
  return {};
}

}  // namespace capstan::checkpoint::testing
