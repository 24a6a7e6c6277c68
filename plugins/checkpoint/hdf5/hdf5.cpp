// The checkpoint format "hdf5": serial HDF5 lays out a shard and writes its metadata; the payload goes by pwrite
// to each dataset's offset in the file, so that it is copied once and HDF5's caches never see it.
#include "files.h"
#include "handles.h"
#include "types.h"

#include <capstan/checkpoint.h>
#include <capstan/plugin.h>

#include <fcntl.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace capstan::hdf5 {
namespace {

constexpr hsize_t alignment = 4096;  // of payloads of at least this size: a page, a disk block

using Shape = std::vector<std::int64_t>;

std::vector<hsize_t> extents(const Shape& shape) { return {shape.begin(), shape.end()}; }

/// Where a box lies inside a shard: under the tensor's name, with "@begin" when it is only a part, because one
/// shard may hold several boxes of a tensor.
std::string dataset_name(const SavedTensor& t) {
  if (t.box.extent == t.global_shape) return t.name;
  auto name = t.name + "@";
  for (std::size_t i = 0; i < t.box.begin.size(); ++i) name += (i ? "," : "") + std::to_string(t.box.begin[i]);
  return name;
}

std::string at(const std::string& path, const SavedTensor& t) { return path + ", tensor " + t.name; }

Handle access_properties() {
  Handle p(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, "hdf5", "make access properties");
  // The 1.10 file format whatever the library's own version, so that every supported system reads every file.
  check(H5Pset_libver_bounds(p.get(), H5F_LIBVER_V110, H5F_LIBVER_V110), "hdf5", "set the file format's version");
  check(H5Pset_alignment(p.get(), alignment, alignment), "hdf5", "set the alignment");
  // Locks fail on read-only folders and on some network file systems; the commit protocol needs none.
  check(H5Pset_file_locking(p.get(), false, true), "hdf5", "turn file locking off");
  check(H5Pset_fclose_degree(p.get(), H5F_CLOSE_STRONG), "hdf5", "set how files close");
  return p;
}

// More than HDF5 takes for so many datasets, measured at under 2 KiB each.
std::int64_t largest_metadata(std::span<const SavedTensor> tensors) {
  std::int64_t bytes = 1 << 20;
  for (const auto& t : tensors)
    bytes += 4 * static_cast<std::int64_t>(alignment) + 4 * static_cast<std::int64_t>(t.name.size());
  return bytes;
}

/// Lets `build` fill a new HDF5 file, and puts what came of it into the open file `target`.
template <class Build>
void write_hdf5(const std::string& path, const Descriptor& target, std::int64_t at_most, const Build& build) {
  const MemoryFile memory(path, at_most);
  const auto access = access_properties();
  // The stdio driver, because the default one insists on resolving links, and the path of a memory file is one.
  check(H5Pset_fapl_stdio(access.get()), path, "choose the stdio driver");
  Handle file(H5Fcreate(memory.path().c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), H5Fclose, path,
              "create this file");
  build(file.get());
  check(H5Fflush(file.get(), H5F_SCOPE_LOCAL), path, "write the metadata");
  check(file.close(), path, "close this file");
  memory.copy_to(target, path);
}

Handle link_properties() {  // names are UTF-8, their '/' make groups
  Handle p(H5Pcreate(H5P_LINK_CREATE), H5Pclose, "hdf5", "make link properties");
  check(H5Pset_create_intermediate_group(p.get(), 1), "hdf5", "allow groups");
  check(H5Pset_char_encoding(p.get(), H5T_CSET_UTF8), "hdf5", "set the encoding");
  return p;
}

Handle space_of(const Shape& shape, const std::string& where) {
  if (shape.empty()) return {H5Screate(H5S_SCALAR), H5Sclose, where, "describe its shape"};
  const auto dims = extents(shape);
  return {H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr), H5Sclose, where, "describe its shape"};
}

void write_attribute(hid_t object, const char* name, const std::string& text, const std::string& where) {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose, where, "describe an attribute");
  check(H5Tset_size(type.get(), text.size() + 1), where, "describe an attribute");
  check(H5Tset_cset(type.get(), H5T_CSET_UTF8), where, "describe an attribute");
  Handle space(H5Screate(H5S_SCALAR), H5Sclose, where, "describe an attribute");
  Handle attribute(H5Acreate2(object, name, type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT), H5Aclose, where,
                   "create an attribute");
  check(H5Awrite(attribute.get(), type.get(), text.c_str()), where, "write an attribute");
}

void write_attribute(hid_t object, const char* name, const Shape& values, const std::string& where) {
  if (values.empty()) return;  // a scalar has no dimensions to speak of
  const hsize_t count = values.size();
  Handle space(H5Screate_simple(1, &count, nullptr), H5Sclose, where, "describe an attribute");
  Handle attribute(H5Acreate2(object, name, H5T_STD_I64LE, space.get(), H5P_DEFAULT, H5P_DEFAULT), H5Aclose, where,
                   "create an attribute");
  check(H5Awrite(attribute.get(), H5T_NATIVE_INT64, values.data()), where, "write an attribute");
}

Shape read_attribute(hid_t object, const char* name, std::size_t count, const std::string& where) {
  Shape values(count);
  if (count == 0) return values;
  Handle attribute(H5Aopen(object, name, H5P_DEFAULT), H5Aclose, where, "open an attribute");
  Handle space(H5Aget_space(attribute.get()), H5Sclose, where, "read an attribute's shape");
  if (H5Sget_simple_extent_npoints(space.get()) != static_cast<hssize_t>(count)) {
    fail(Fault::input, where, std::string("its attribute ") + name + " has not " + std::to_string(count) + " values");
  }
  check(H5Aread(attribute.get(), H5T_NATIVE_INT64, values.data()), where, "read an attribute");
  return values;
}

/// Creates all datasets, their space allocated but unfilled, and fills in where it lies.
void create_datasets(hid_t file, const std::string& path, std::span<SavedTensor> tensors) {
  const auto link = link_properties();
  Handle contiguous(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, path, "make dataset properties");
  check(H5Pset_layout(contiguous.get(), H5D_CONTIGUOUS), path, "choose the contiguous layout");
  check(H5Pset_alloc_time(contiguous.get(), H5D_ALLOC_TIME_EARLY), path, "allocate early");
  check(H5Pset_fill_time(contiguous.get(), H5D_FILL_TIME_NEVER), path, "leave space unfilled");
  for (auto& t : tensors) {
    const auto where = at(path, t);
    const auto type = file_type(t.dtype);
    const auto space = space_of(t.box.extent, where);
    Handle dataset(
        H5Dcreate2(file, dataset_name(t).c_str(), type.get(), space.get(), link.get(), contiguous.get(), H5P_DEFAULT),
        H5Dclose, where, "create its dataset");
    write_attribute(dataset.get(), "dtype", std::string(name_of(t.dtype)), where);
    write_attribute(dataset.get(), "global_shape", t.global_shape, where);
    write_attribute(dataset.get(), "box_begin", t.box.begin, where);
    t.file_offset = -1;
    if (t.bytes == 0) continue;
    const auto offset = H5Dget_offset(dataset.get());
    if (offset == HADDR_UNDEF) fail_hdf5(where, "learn where its bytes lie");
    t.file_offset = static_cast<std::int64_t>(offset);
  }
}

class Hdf5Format final : public CheckpointFormat {
 public:
  std::string_view name() const override { return "hdf5"; }
  std::string_view extension() const override { return ".h5"; }

  void write_shard(const std::string& path, std::span<SavedTensor> tensors,
                   const std::function<void(std::int64_t)>& progress) override {
    const Quiet quiet;
    const Descriptor file(path, O_WRONLY | O_CREAT | O_TRUNC);
    auto at_most = largest_metadata(tensors);
    for (const auto& t : tensors) at_most += t.bytes;
    write_hdf5(path, file, at_most, [&](hid_t id) { create_datasets(id, path, tensors); });
    std::int64_t written = 0;
    for (const auto& t : tensors) {
      file.write(t.data, t.bytes, t.file_offset, at(path, t), [&](std::int64_t done) {
        if (progress) progress(written + done);
      });
      written += t.bytes;
    }
    file.sync();
  }

  void read(const std::string& path, const SavedTensor& t, void* target) override {
    const Quiet quiet;
    const auto where = at(path, t);
    const auto access = access_properties();
    Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose, where, "open the file");
    Handle dataset(H5Dopen2(file.get(), dataset_name(t).c_str(), H5P_DEFAULT), H5Dclose, where, "open its dataset");
    check_description(dataset.get(), t, where);
    if (t.bytes == 0) return;
    const auto offset = H5Dget_offset(dataset.get());
    if (offset == HADDR_UNDEF) fail(Fault::input, where, "its dataset is not contiguous: no checkpoint's shard");
    if (t.file_offset >= 0 && offset != static_cast<haddr_t>(t.file_offset)) {
      fail(Fault::input, where,
           "its bytes lie at " + std::to_string(offset) + " of the file, expected " + std::to_string(t.file_offset));
    }
    Descriptor(path, O_RDONLY).read(target, t.bytes, static_cast<std::int64_t>(offset), where);
  }

  void write_index(const std::string& path, std::span<const SavedTensor> tensors) override {
    const Quiet quiet;
    std::map<std::string, std::vector<const SavedTensor*>> boxes;
    for (const auto& t : tensors) boxes[t.name].push_back(&t);
    const Descriptor target(path, O_WRONLY | O_CREAT | O_TRUNC);
    write_hdf5(path, target, largest_metadata(tensors), [&](hid_t file) {
      const auto link = link_properties();
      for (const auto& [name, pieces] : boxes) {
        const auto& first = *pieces.front();
        const auto where = at(path, first);
        if (first.global_shape.empty()) {  // HDF5 has no virtual scalar
          check(H5Lcreate_external(first.file.c_str(), dataset_name(first).c_str(), file, name.c_str(), link.get(),
                                   H5P_DEFAULT),
                where, "link its dataset");
        } else {
          write_virtual(file, link.get(), name, pieces, where);
        }
      }
    });
    target.sync();
  }

 private:
  static void check_description(hid_t dataset, const SavedTensor& t, const std::string& where) {
    const auto expected_type = file_type(t.dtype);
    Handle type(H5Dget_type(dataset), H5Tclose, where, "read its type");
    if (check(H5Tequal(type.get(), expected_type.get()), where, "compare its type") == 0) {
      fail(Fault::input, where, "its dataset is not of type " + std::string(name_of(t.dtype)));
    }
    Handle space(H5Dget_space(dataset), H5Sclose, where, "read its shape");
    const int rank = check(H5Sget_simple_extent_ndims(space.get()), where, "read its shape");
    std::vector<hsize_t> dims(static_cast<std::size_t>(rank));
    if (rank > 0) check(H5Sget_simple_extent_dims(space.get(), dims.data(), nullptr), where, "read its shape");
    if (dims != extents(t.box.extent)) fail(Fault::input, where, "its dataset has not the extents that the manifest says");
    if (read_attribute(dataset, "global_shape", t.global_shape.size(), where) != t.global_shape ||
        read_attribute(dataset, "box_begin", t.box.begin.size(), where) != t.box.begin) {
      fail(Fault::input, where, "its dataset says another global shape or place than the manifest");
    }
  }

  static void write_virtual(hid_t file, hid_t link, const std::string& name, const std::vector<const SavedTensor*>& pieces,
                            const std::string& where) {
    const auto& first = *pieces.front();
    const auto type = file_type(first.dtype);
    const auto fill = missing_value(first.dtype);
    Handle layout(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, where, "make dataset properties");
    check(H5Pset_fill_value(layout.get(), type.get(), &fill.bits), where, "set its fill value");
    for (const auto* piece : pieces) {
      if (piece->bytes == 0) continue;
      const auto begin = extents(piece->box.begin), count = extents(piece->box.extent);
      const auto target = space_of(first.global_shape, where), source = space_of(piece->box.extent, where);
      check(H5Sselect_hyperslab(target.get(), H5S_SELECT_SET, begin.data(), nullptr, count.data(), nullptr), where,
            "select a box");
      check(H5Pset_virtual(layout.get(), target.get(), piece->file.c_str(), dataset_name(*piece).c_str(), source.get()),
            where, "map a box");
    }
    const auto space = space_of(first.global_shape, where);
    Handle dataset(H5Dcreate2(file, name.c_str(), type.get(), space.get(), link, layout.get(), H5P_DEFAULT), H5Dclose, where,
                   "create its virtual dataset");
    write_attribute(dataset.get(), "dtype", std::string(name_of(first.dtype)), where);
  }
};

}  // namespace
}  // namespace capstan::hdf5

CAPSTAN_PLUGIN("checkpoint", "hdf5", "1.0.0") {
  registrar.add("checkpoint", "hdf5", capstan::Schema(), [](const capstan::Options&, capstan::Registrar&) {
    return capstan::as_interface<capstan::CheckpointFormat>(std::make_shared<capstan::hdf5::Hdf5Format>());
  });
}
