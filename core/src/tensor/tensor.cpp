// Tensor: construction, views and copies. Differentiable ops are in core/src/ops.
#include <capstan/autograd.h>
#include <capstan/tensor.h>
#include <kernels/cpu/context.h>

#include <cmath>
#include <cstring>
#include <utility>

namespace capstan {

namespace {

Dims contiguous_strides(const Dims& shape) {
  Dims strides = shape;
  std::int64_t step = 1;
  for (int i = shape.size() - 1; i >= 0; --i) {
    strides[i] = step;
    step *= shape[i];
  }
  return strides;
}

/// Calls f with a null T* of the dtype's C++ type.
template <class F>
void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::bf16: return f(static_cast<bf16*>(nullptr));
    case DType::i32: return f(static_cast<std::int32_t*>(nullptr));
    case DType::i64: return f(static_cast<std::int64_t*>(nullptr));
    case DType::u8:
    case DType::boolean: return f(static_cast<std::uint8_t*>(nullptr));
    default: fail(Fault::programming, "tensor", "element type " + std::string(name_of(dtype)) + " has no CPU arithmetic");
  }
}

template <class To, class From>
To convert(From x) {
  if constexpr (std::is_same_v<To, bf16>) return bf16(static_cast<float>(x));
  else if constexpr (std::is_same_v<From, bf16>) return static_cast<To>(static_cast<float>(x));
  else return static_cast<To>(x);
}

/// Walks two strided tensors of one shape row by row (the last dimension is the inner loop), on the device's threads.
template <class To, class From>
void copy_strided(Device& device, To* to, const Dims& to_strides, const From* from, const Dims& from_strides, const Dims& shape) {
  if (shape.product() == 0) return;
  const int r = shape.size();
  const std::int64_t n = r == 0 ? 1 : shape[r - 1], ts = r == 0 ? 1 : to_strides[r - 1], fs = r == 0 ? 1 : from_strides[r - 1];
  const std::int64_t rows = shape.product() / n;
#pragma omp parallel for num_threads(device.cpu().threads()) if (rows * n > 65536)
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int64_t left = row;
    To* t = to;
    const From* f = from;
    for (int d = r - 2; d >= 0; --d) {
      const std::int64_t i = left % shape[d];
      left /= shape[d];
      t += i * to_strides[d], f += i * from_strides[d];
    }
    if (ts == 1 && fs == 1) {
      if constexpr (std::is_same_v<To, From>) std::memcpy(t, f, static_cast<std::size_t>(n) * sizeof(To));
      else for (std::int64_t i = 0; i < n; ++i) t[i] = convert<To>(f[i]);
    } else {
      for (std::int64_t i = 0; i < n; ++i) t[i * ts] = convert<To>(f[i * fs]);
    }
  }
}

}  // namespace

std::string to_string(const Dims& dims) {
  std::string s = "[";
  for (int i = 0; i < dims.size(); ++i) s += (i ? ", " : "") + std::to_string(dims[i]);
  return s + "]";
}

Storage::~Storage() {
  if (device && owned) device->release(data, bytes);
}

Tensor Tensor::empty(const Dims& shape, DType dtype, Device& device) {
  for (std::int64_t n : shape)
    if (n < 0) fail(Fault::programming, "tensor", "negative extent in shape " + to_string(shape));
  Tensor t;
  t.storage_ = std::make_shared<Storage>();
  t.storage_->device = device.shared_from_this();
  t.storage_->owned = false;  // nothing to release if allocate() throws
  const std::int64_t bytes = shape.product() * size_of(dtype);
  t.storage_->data = device.allocate(bytes);
  t.storage_->bytes = bytes;
  t.storage_->owned = true;
  t.shape_ = shape;
  t.strides_ = contiguous_strides(shape);
  t.dtype_ = dtype;
  return t;
}

Tensor Tensor::zeros(const Dims& shape, DType dtype, Device& device) {
  Tensor t = empty(shape, dtype, device);
  if (t.raw() != nullptr) std::memset(t.raw(), 0, static_cast<std::size_t>(t.bytes()));
  return t;
}

Tensor Tensor::full(const Dims& shape, double value, DType dtype, Device& device) {
  Tensor t = empty(shape, dtype, device);
  t.fill(value);
  return t;
}

Tensor Tensor::wrap(void* data, const Dims& shape, DType dtype, Device& device, std::shared_ptr<void> keeper) {
  Tensor t;
  t.storage_ = std::make_shared<Storage>();
  t.storage_->device = device.shared_from_this();
  t.storage_->data = data;
  t.storage_->bytes = shape.product() * size_of(dtype);
  t.storage_->owned = false;
  t.storage_->keeper = std::move(keeper);
  t.shape_ = shape;
  t.strides_ = contiguous_strides(shape);
  t.dtype_ = dtype;
  return t;
}

std::int64_t Tensor::size(int i) const {
  const int at = i < 0 ? i + rank() : i;
  if (at < 0 || at >= rank())
    fail(Fault::programming, "tensor", "dimension " + std::to_string(i) + " asked of shape " + to_string(shape_));
  return shape_[at];
}

Device& Tensor::device() const {
  if (!storage_) fail(Fault::programming, "tensor", "an undefined tensor was used");
  return *storage_->device;
}

bool Tensor::is_contiguous() const {
  std::int64_t step = 1;
  for (int i = rank() - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != step) return false;
    step *= shape_[i];
  }
  return true;
}

void* Tensor::raw() const {
  if (!storage_) fail(Fault::programming, "tensor", "an undefined tensor was used");
  if (storage_->data == nullptr) return nullptr;
  return static_cast<char*>(storage_->data) + offset_ * size_of(dtype_);
}

void Tensor::wrong_dtype(DType asked) const {
  fail(Fault::programming, "tensor", "element type: expected " + std::string(name_of(asked)) + ", got " + std::string(name_of(dtype_)) +
                                         " (shape " + to_string(shape_) + ")");
}

Tensor Tensor::view(const Dims& wanted) const {
  Dims shape = wanted;
  std::int64_t known = 1;
  int open = -1;
  for (int i = 0; i < shape.size(); ++i) {
    if (shape[i] == -1 && open < 0) open = i;
    else known *= shape[i];
  }
  if (open >= 0) shape[open] = known == 0 ? 0 : numel() / known;
  if (!is_contiguous() || shape.product() != numel())
    fail(Fault::programming, "view", "cannot view " + to_string(shape_) + (is_contiguous() ? "" : " (strided)") + " as " + to_string(wanted));
  Tensor t = detach();
  t.shape_ = shape;
  t.strides_ = contiguous_strides(shape);
  return t;
}

Tensor Tensor::narrow(int dim, std::int64_t begin, std::int64_t length) const {
  const int d = dim < 0 ? dim + rank() : dim;
  if (d < 0 || d >= rank() || begin < 0 || length < 0 || begin + length > shape_[d])
    fail(Fault::programming, "narrow", "range [" + std::to_string(begin) + ", " + std::to_string(begin + length) + ") of dimension " +
                                           std::to_string(dim) + " is outside shape " + to_string(shape_));
  Tensor t = detach();
  t.shape_[d] = length;
  t.offset_ += begin * strides_[d];
  return t;
}

Tensor Tensor::transposed(int a, int b) const {
  const int x = a < 0 ? a + rank() : a, y = b < 0 ? b + rank() : b;
  if (x < 0 || y < 0 || x >= rank() || y >= rank())
    fail(Fault::programming, "transpose", "dimensions " + std::to_string(a) + ", " + std::to_string(b) + " of shape " + to_string(shape_));
  Tensor t = detach();
  std::swap(t.shape_[x], t.shape_[y]);
  std::swap(t.strides_[x], t.strides_[y]);
  return t;
}

Tensor Tensor::detach() const {
  Tensor t = *this;
  t.node_.reset();
  t.output_index_ = 0;
  return t;
}

Tensor Tensor::contiguous() const {
  if (is_contiguous()) return *this;
  return clone();
}

Tensor Tensor::clone() const {
  Tensor t = empty(shape_, dtype_, device());
  t.copy_from(*this);
  return t;
}

Tensor Tensor::to(DType dtype) const {
  if (dtype == dtype_) return *this;
  Tensor t = empty(shape_, dtype, device());
  t.copy_from(*this);
  return t;
}

void Tensor::fill(double value) const {
  if (is_meta() || numel() == 0) return;
  visit(dtype_, [&]<class T>(T*) {
    const T v = convert<T>(value);
    Dims zero = strides_;
    for (int i = 0; i < zero.size(); ++i) zero[i] = 0;
    copy_strided(device(), static_cast<T*>(raw()), strides_, &v, zero, shape_);
  });
}

void Tensor::copy_from(const Tensor& source) const {
  if (!(source.shape_ == shape_))
    fail(Fault::programming, "copy", "shapes differ: expected " + to_string(shape_) + ", got " + to_string(source.shape_));
  if (is_meta() || source.is_meta() || numel() == 0) return;
  if (dtype_ == source.dtype_ && is_contiguous() && source.is_contiguous() && bytes() < (1 << 20)) {
    std::memcpy(raw(), source.raw(), static_cast<std::size_t>(bytes()));
    return;
  }
  Dims shape = shape_, to_strides = strides_, from_strides = source.strides_;
  if (is_contiguous() && source.is_contiguous()) {  // rows of a fixed length, so that threads share the work
    const std::int64_t n = numel(), row = n % 4096 == 0 ? 4096 : n % 64 == 0 ? 64 : n;
    shape = Dims{n / row, row}, to_strides = Dims{row, 1}, from_strides = Dims{row, 1};
  }
  visit(dtype_, [&]<class To>(To*) {
    visit(source.dtype_, [&]<class From>(From*) {
      copy_strided(device(), static_cast<To*>(raw()), to_strides, static_cast<const From*>(source.raw()), from_strides, shape);
    });
  });
}

void Tensor::copy_from_host(const void* source, std::int64_t count) const {
  if (!is_contiguous() || count != bytes())
    fail(Fault::programming, "copy_from_host", "expected " + std::to_string(bytes()) + " contiguous bytes for shape " + to_string(shape_) +
                                                   ", got " + std::to_string(count));
  if (!is_meta()) std::memcpy(raw(), source, static_cast<std::size_t>(count));
}

void Tensor::copy_to_host(void* target, std::int64_t count) const {
  if (!is_contiguous() || count != bytes() || is_meta())
    fail(Fault::programming, "copy_to_host", "expected " + std::to_string(bytes()) + " contiguous bytes with data, asked for " + std::to_string(count));
  std::memcpy(target, raw(), static_cast<std::size_t>(count));
}

double Tensor::item() const {
  if (numel() != 1 || is_meta()) fail(Fault::programming, "item", "expected one element with data, got shape " + to_string(shape_));
  double value = 0;
  visit(dtype_, [&]<class T>(T*) { value = convert<double>(*static_cast<const T*>(raw())); });
  return value;
}

}  // namespace capstan
