// Tensor: construction, views and copies. Differentiable ops are in core/src/ops.
#include "tensor/too_large.h"

#include <capstan/autograd.h>
#include <capstan/tensor.h>
#include <kernels/backend.h>

#include <utility>
#include <vector>

namespace capstan {

TooLarge::~TooLarge() = default;

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

kernels::Num num(DType dtype) { return static_cast<kernels::Num>(dtype); }

kernels::Strided strided(const Dims& shape, const Dims& to, const Dims& from) {
  kernels::Strided s;
  s.rank = shape.size();
  for (int i = 0; i < s.rank; ++i) s.shape[i] = shape[i], s.to[i] = to[i], s.from[i] = from[i];
  return s;
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
  constexpr std::int64_t most = std::int64_t{1} << 55;  // bytes: sums of some hundred of these do not overflow
  std::int64_t room = most / size_of(dtype);
  bool none = false;
  for (std::int64_t n : shape) {
    if (n < 0) fail(Fault::programming, "tensor", "negative extent in shape " + to_string(shape));
    none = none || n == 0;
    room = n > 0 ? room / n : room;
  }
  if (room == 0 && !none)
    throw TooLarge(Fault::input, "a tensor of shape " + to_string(shape) + " has more than " + std::to_string(most) + " bytes");
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
  if (!t.is_meta()) device.backend().clear(t.raw(), t.bytes());
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
  device().backend().fill(strided(shape_, strides_, strides_), num(dtype_), raw(), value);
}

void Tensor::copy_from(const Tensor& source) const {
  if (!(source.shape_ == shape_))
    fail(Fault::programming, "copy", "shapes differ: expected " + to_string(shape_) + ", got " + to_string(source.shape_));
  if (is_meta() || source.is_meta() || numel() == 0) return;
  if (&device() == &source.device()) {
    device().backend().copy(strided(shape_, strides_, source.strides_), num(dtype_), raw(), num(source.dtype_), source.raw());
    return;
  }
  // Between devices: through contiguous memory of this type.
  const Tensor from = source.to(dtype_).contiguous();
  if (is_contiguous() && source.device().kind() == DeviceKind::cpu) {
    copy_from_host(from.raw(), bytes());
  } else if (is_contiguous() && device().kind() == DeviceKind::cpu) {
    from.copy_to_host(raw(), bytes());
  } else {
    std::vector<char> host(static_cast<std::size_t>(bytes()));
    from.copy_to_host(host.data(), bytes());
    const Tensor here = is_contiguous() ? *this : empty(shape_, dtype_, device());
    here.copy_from_host(host.data(), bytes());
    if (!is_contiguous()) copy_from(here);
  }
}

void Tensor::copy_from_host(const void* source, std::int64_t count) const {
  if (!is_contiguous() || count != bytes())
    fail(Fault::programming, "copy_from_host", "expected " + std::to_string(bytes()) + " contiguous bytes for shape " + to_string(shape_) +
                                                   ", got " + std::to_string(count));
  if (!is_meta() && count > 0) device().backend().upload(raw(), source, count);
}

void Tensor::copy_to_host(void* target, std::int64_t count) const {
  if (!is_contiguous() || count != bytes() || is_meta())
    fail(Fault::programming, "copy_to_host", "expected " + std::to_string(bytes()) + " contiguous bytes with data, asked for " + std::to_string(count));
  if (count > 0) device().backend().download(target, raw(), count);
}

double Tensor::item() const {
  if (numel() != 1 || is_meta()) fail(Fault::programming, "item", "expected one element with data, got shape " + to_string(shape_));
  double value = 0;
  if (device().kind() == DeviceKind::cpu) {
    kernels::Strided one;
    device().backend().copy(one, kernels::Num::f64, &value, num(dtype_), raw());
    return value;
  }
  view(Dims{1}).to(DType::f64).copy_to_host(&value, sizeof value);
  return value;
}

}  // namespace capstan
