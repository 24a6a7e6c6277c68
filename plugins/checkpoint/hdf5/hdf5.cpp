// The checkpoint format "hdf5": serial HDF5 writes a shard's metadata; the payload goes by pwrite to each
// dataset's offset in the file, so that it is copied once and HDF5's caches never see it.
#include "handles.h"
#include "types.h"

#include <capstan/checkpoint.h>
#include <capstan/plugin.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>

namespace capstan::hdf5 {
namespace {

constexpr hsize_t alignment = 4096;                     // of payloads of at least this size: a page, a disk block
constexpr std::int64_t largest_write = 64 * 1024 * 1024;  // between two calls of `progress`

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

[[noreturn]] void fail_system(const std::string& where, const std::string& action, int error) {
  fail(Fault::runtime, where, "cannot " + action + ": " + std::strerror(error));
}

class Descriptor {
 public:
  Descriptor(const std::string& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC)) {
    if (fd_ < 0) fail_system(path, "be opened", errno);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { ::close(fd_); }
  int get() const { return fd_; }

 private:
  int fd_;
};

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

Handle create_file(const std::string& path) {
  const auto access = access_properties();
  return {H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), H5Fclose, path, "create this file"};
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

/// Creates all datasets with their space allocated, unfilled, and returns nothing but their offsets.
void write_metadata(const std::string& path, std::span<SavedTensor> tensors) {
  auto file = create_file(path);
  const auto link = link_properties();
  Handle contiguous(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, path, "make dataset properties");
  check(H5Pset_layout(contiguous.get(), H5D_CONTIGUOUS), path, "choose the contiguous layout");
  check(H5Pset_alloc_time(contiguous.get(), H5D_ALLOC_TIME_EARLY), path, "allocate early");
  check(H5Pset_fill_time(contiguous.get(), H5D_FILL_TIME_NEVER), path, "leave space unfilled");
  for (auto& t : tensors) {
    const auto where = at(path, t);
    const auto type = file_type(t.dtype);
    const auto space = space_of(t.box.extent, where);
    Handle dataset(H5Dcreate2(file.get(), dataset_name(t).c_str(), type.get(), space.get(), link.get(), contiguous.get(),
                              H5P_DEFAULT), H5Dclose, where, "create its dataset");
    write_attribute(dataset.get(), "dtype", std::string(name_of(t.dtype)), where);
    write_attribute(dataset.get(), "global_shape", t.global_shape, where);
    write_attribute(dataset.get(), "box_begin", t.box.begin, where);
    t.file_offset = -1;
    if (t.bytes == 0) continue;
    const auto offset = H5Dget_offset(dataset.get());
    if (offset == HADDR_UNDEF) fail_hdf5(where, "learn where its bytes lie");
    t.file_offset = static_cast<std::int64_t>(offset);
  }
  check(H5Fflush(file.get(), H5F_SCOPE_LOCAL), path, "write the metadata");
  check(file.close(), path, "close this file");
}

void write_payload(const std::string& path, std::span<const SavedTensor> tensors,
                   const std::function<void(std::int64_t)>& progress) {
  const Descriptor file(path, O_WRONLY);
  std::int64_t written = 0;
  for (const auto& t : tensors) {
    for (std::int64_t done = 0; done < t.bytes;) {
      const auto n = ::pwrite(file.get(), static_cast<const char*>(t.data) + done,
                              static_cast<std::size_t>(std::min(t.bytes - done, largest_write)), t.file_offset + done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        fail_system(at(path, t), "write " + std::to_string(t.bytes - done) + " of its " + std::to_string(t.bytes) + " bytes",
                    n < 0 ? errno : ENOSPC);
      }
      done += n, written += n;
      if (progress) progress(written);
    }
  }
  if (::fsync(file.get()) != 0) fail_system(path, "be flushed to the disk", errno);
}

class Hdf5Format final : public CheckpointFormat {
 public:
  std::string_view name() const override { return "hdf5"; }
  std::string_view extension() const override { return ".h5"; }

  void write_shard(const std::string& path, std::span<SavedTensor> tensors,
                   const std::function<void(std::int64_t)>& progress) override {
    const Quiet quiet;
    write_metadata(path, tensors);
    write_payload(path, tensors, progress);
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
      fail(Fault::input, where, "its bytes lie at " + std::to_string(offset) + " of the file, expected " +
                                    std::to_string(t.file_offset));
    }
    const Descriptor raw(path, O_RDONLY);
    for (std::int64_t done = 0; done < t.bytes;) {
      const auto n = ::pread(raw.get(), static_cast<char*>(target) + done,
                             static_cast<std::size_t>(std::min(t.bytes - done, largest_write)),
                             static_cast<off_t>(offset) + done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail_system(where, "be read", errno);
      if (n == 0) {
        fail(Fault::input, where, "the file ends after " + std::to_string(done) + " of its " + std::to_string(t.bytes) + " bytes");
      }
      done += n;
    }
  }

  void write_index(const std::string& path, std::span<const SavedTensor> tensors) override {
    const Quiet quiet;
    auto file = create_file(path);
    const auto link = link_properties();
    std::map<std::string, std::vector<const SavedTensor*>> boxes;
    for (const auto& t : tensors) boxes[t.name].push_back(&t);
    for (const auto& [name, pieces] : boxes) {
      const auto where = at(path, *pieces.front());
      if (pieces.front()->global_shape.empty()) {  // HDF5 has no virtual scalar
        check(H5Lcreate_external(pieces.front()->file.c_str(), dataset_name(*pieces.front()).c_str(), file.get(),
                                 name.c_str(), link.get(), H5P_DEFAULT), where, "link its dataset");
      } else {
        write_virtual(file.get(), link.get(), name, pieces, where);
      }
    }
    check(H5Fflush(file.get(), H5F_SCOPE_LOCAL), path, "write the index");
    check(file.close(), path, "close this file");
    const Descriptor raw(path, O_RDONLY);
    if (::fsync(raw.get()) != 0) fail_system(path, "be flushed to the disk", errno);
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
