// defines: Dims, Storage, Tensor.
#pragma once
#include <capstan/device.h>
#include <capstan/dtype.h>
#include <capstan/error.h>
#include <capstan/export.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

namespace capstan {

class Node;

/// A short list of extents or strides (at most 6), held in place.
class Dims {
 public:
  static constexpr int capacity = 6;
  Dims() = default;
  Dims(std::initializer_list<std::int64_t> v) { for (auto x : v) push(x); }
  explicit Dims(std::span<const std::int64_t> v) { for (auto x : v) push(x); }
  int size() const { return size_; }
  std::int64_t operator[](int i) const { return v_[static_cast<std::size_t>(i)]; }
  std::int64_t& operator[](int i) { return v_[static_cast<std::size_t>(i)]; }
  void push(std::int64_t x) {
    if (size_ == capacity) fail(Fault::programming, "Dims", "more than 6 dimensions");
    v_[static_cast<std::size_t>(size_++)] = x;
  }
  std::int64_t product() const { std::int64_t p = 1; for (int i = 0; i < size_; ++i) p *= (*this)[i]; return p; }
  bool operator==(const Dims& o) const {
    if (size_ != o.size_) return false;
    for (int i = 0; i < size_; ++i) if ((*this)[i] != o[i]) return false;
    return true;
  }
  const std::int64_t* begin() const { return v_.data(); }
  const std::int64_t* end() const { return v_.data() + size_; }

 private:
  std::array<std::int64_t, capacity> v_{};
  int size_ = 0;
};

/// "[4, 256, 768]"
CAPSTAN_API std::string to_string(const Dims& dims);

/// Memory on a device. Rebindable: the engine may free `data` and give it back later (resharding),
/// and every view of it follows. Null data on the meta device.
struct CAPSTAN_API Storage {
  std::shared_ptr<Device> device;
  void* data = nullptr;
  std::int64_t bytes = 0;
  bool owned = true;  ///< false: `data` belongs to `keeper`
  std::shared_ptr<void> keeper;
  Storage() = default;
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  ~Storage();
};

/// A value: cheap to copy, shares its storage. Eager. What is differentiable hangs on `node`.
class CAPSTAN_API Tensor {
 public:
  Tensor() = default;
  static Tensor empty(const Dims& shape, DType dtype, Device& device);
  static Tensor zeros(const Dims& shape, DType dtype, Device& device);
  static Tensor full(const Dims& shape, double value, DType dtype, Device& device);
  /// Copies host values; their count must equal the shape's product.
  template <class T>
  static Tensor of(std::span<const T> values, const Dims& shape, Device& device) {
    Tensor t = empty(shape, dtype_of<T>, device);
    t.copy_from_host(values.data(), static_cast<std::int64_t>(values.size_bytes()));
    return t;
  }
  /// A view of memory that `keeper` keeps alive.
  static Tensor wrap(void* data, const Dims& shape, DType dtype, Device& device, std::shared_ptr<void> keeper);

  bool defined() const { return storage_ != nullptr; }
  explicit operator bool() const { return defined(); }
  const Dims& shape() const { return shape_; }
  const Dims& strides() const { return strides_; }  ///< in elements
  int rank() const { return shape_.size(); }
  /// Extent of dimension i; negative i counts from the end.
  std::int64_t size(int i) const;
  std::int64_t numel() const { return defined() ? shape_.product() : 0; }
  std::int64_t bytes() const { return numel() * size_of(dtype_); }
  DType dtype() const { return dtype_; }
  Device& device() const;
  bool is_meta() const { return device().kind() == DeviceKind::meta; }
  bool is_contiguous() const;

  /// First element; dtype is checked. Null on the meta device.
  template <class T> T* data() const {
    if (dtype_ != dtype_of<T>) wrong_dtype(dtype_of<T>);
    return static_cast<T*>(raw());
  }
  void* raw() const;
  const std::shared_ptr<Storage>& storage() const { return storage_; }

  // Views: same storage, no autograd (the differentiable forms are in ops.h).
  Tensor view(const Dims& shape) const;                                     ///< contiguous only; -1 once
  Tensor narrow(int dim, std::int64_t begin, std::int64_t length) const;
  Tensor transposed(int a, int b) const;
  Tensor detach() const;                                                    ///< without its node
  Tensor contiguous() const;                                                ///< itself, or a copy
  Tensor to(DType dtype) const;                                             ///< cast copy (itself when equal)
  Tensor clone() const;

  void fill(double value) const;
  void copy_from(const Tensor& source) const;  ///< same shape; casts
  void copy_from_host(const void* source, std::int64_t bytes) const;
  void copy_to_host(void* target, std::int64_t bytes) const;
  /// The only element as a double.
  double item() const;

  // Autograd (see autograd.h).
  const std::shared_ptr<Node>& node() const { return node_; }
  int output_index() const { return output_index_; }
  bool requires_grad() const { return node_ != nullptr; }
  void set_node(std::shared_ptr<Node> node, int output_index) { node_ = std::move(node), output_index_ = output_index; }

 private:
  [[noreturn]] void wrong_dtype(DType asked) const;
  std::shared_ptr<Storage> storage_;
  Dims shape_, strides_;
  std::int64_t offset_ = 0;  // elements
  DType dtype_ = DType::f32;
  int output_index_ = 0;
  std::shared_ptr<Node> node_;
};

}  // namespace capstan
