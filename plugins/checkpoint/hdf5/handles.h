// defines: Handle (an HDF5 identifier that closes itself), Quiet (HDF5 keeps its error stack instead of
// printing it) and the throwing checks of HDF5's return values.
#pragma once
#include <hdf5.h>

#include <string>
#include <utility>

namespace capstan::hdf5 {

/// Throws Error(runtime) "[where] cannot <action>: <HDF5's own error stack>".
[[noreturn]] void fail_hdf5(const std::string& where, const std::string& action);

/// Returns `status` unless it is HDF5's sign of failure (negative).
template <class Status>
Status check(Status status, const std::string& where, const char* action) {
  if (status < 0) fail_hdf5(where, action);
  return status;
}

class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Close close, const std::string& where, const char* action)
      : id_(check(id, where, action)), close_(close) {}
  Handle(Handle&& o) noexcept : id_(std::exchange(o.id_, -1)), close_(o.close_) {}
  Handle& operator=(Handle&& o) noexcept {
    std::swap(id_, o.id_), std::swap(close_, o.close_);
    return *this;
  }
  ~Handle() {
    if (id_ >= 0) close_(id_);
  }
  hid_t get() const { return id_; }
  /// Closes now and tells whether that worked: a file's last bytes are written here.
  herr_t close() { return close_(std::exchange(id_, -1)); }

 private:
  hid_t id_ = -1;
  Close close_ = nullptr;
};

class Quiet {
 public:
  Quiet() { H5Eget_auto2(H5E_DEFAULT, &function_, &data_), H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }
  ~Quiet() { H5Eset_auto2(H5E_DEFAULT, function_, data_); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

 private:
  H5E_auto2_t function_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace capstan::hdf5
