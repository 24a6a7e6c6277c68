#include "base/cuda_device.h"
#include "mesh/placement.h"

#include <capstan/parameter.h>
#include <kernels/cpu/context.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace capstan {

std::string_view name_of(Role role) {
  constexpr std::array<std::string_view, 8> names{"matrix", "embedding", "head", "vector", "bias", "router", "conv", "state"};
  return names[static_cast<std::size_t>(role)];
}

Parameter::Parameter(std::string name, ParameterSpec spec) : name_(std::move(name)), spec_(std::move(spec)) {
  for (const auto& dim : spec_.dims) {
    if (dim.empty()) fail(Fault::programming, name_, "a dimension without segments");
    for (const Segment& s : dim)
      if (s.count < 1 || s.width < 1)
        fail(Fault::input, name_, "segment on axis '" + s.axis + "': expected a count and width of at least 1, got " + std::to_string(s.count) + " x " + std::to_string(s.width));
  }
}

Parameter::~Parameter() = default;

Dims Parameter::shape() const {
  Dims shape;
  for (const auto& dim : spec_.dims) {
    std::int64_t n = 0;
    for (const Segment& s : dim) n += s.extent();
    shape.push(n);
  }
  return shape;
}

const Tensor& Parameter::local() const {
  if (!local_.defined()) fail(Fault::programming, name_, "the parameter was used before an engine placed it");
  return local_;
}

bool Parameter::cut() const { return placement_ != nullptr && placement_->cut(); }

Leaf* Parameter::leaf() const { return static_cast<Leaf*>(local().node().get()); }

void Parameter::place(Tensor local, bool with_gradient) {
  local_ = with_gradient && spec_.trainable ? make_leaf(local, true) : local.detach();
  ++version_;
}

const Tensor& Parameter::derived(std::string_view form, const Dims& shape, DType dtype, const Fill& fill) const {
  auto it = derived_.find(form);
  if (it != derived_.end() && it->second.version == version_) return it->second.value;
  if (it == derived_.end()) it = derived_.emplace(std::string(form), Derived{0, Tensor(), fill}).first;
  Derived& d = it->second;
  if (!d.value.defined() || !(d.value.shape() == shape) || d.value.dtype() != dtype || &d.value.device() != &local().device()) {
    d.value = Tensor();  // the old form goes before the new one comes
    const HoldingAs holding(local().device(), Holding::weights);
    d.value = Tensor::empty(shape, dtype, local().device());
  }
  d.fill = fill;
  d.fill(local().detach(), d.value);
  d.version = version_;
  return d.value;
}

void Parameter::refresh_derived() const {
  for (auto& [form, d] : derived_)
    if (d.version != version_ && d.value.defined()) d.fill(local().detach(), d.value), d.version = version_;
}

std::int64_t Parameter::derived_bytes() const {
  std::int64_t bytes = 0;
  for (const auto& [form, derived] : derived_) bytes += derived.value.bytes();
  return bytes;
}

namespace {

/// `count` elements of the random stream of segment `segment` (of dimension 0) from `at` on, for element `to` on of the output.
struct Span { std::size_t segment; std::int64_t at, to, count; };

/// The spans of elements [begin, end) of the row-major tensor that `runs` of dimension `dim` leave of `spec`.
std::vector<Span> spans_of(const ParameterSpec& spec, const Dims& whole, int dim, const std::vector<Run>& runs, std::int64_t begin, std::int64_t end) {
  // [outer, cut dimension, inner], the cut dimension's local extent being the sum of the runs.
  std::int64_t inner = 1, local = 0, row_elements = 1;
  for (int d = dim + 1; d < whole.size(); ++d) inner *= whole[d];
  for (int d = 1; d < whole.size(); ++d) row_elements *= whole[d];
  for (const Run& run : runs) local += run.length;
  std::vector<Span> spans;
  /// Elements [from, from + count) of the whole parameter, row-major.
  const auto add = [&](std::int64_t from, std::int64_t to, std::int64_t count) {
    std::int64_t part_begin = 0;
    for (std::size_t i = 0; i < spec.dims[0].size() && count > 0; ++i) {
      const std::int64_t part_end = part_begin + spec.dims[0][i].extent() * row_elements;
      if (from < part_end) {
        const std::int64_t n = std::min(count, part_end - from);
        // Unnamed segments of one dimension are one tensor: their index runs on from its start.
        const std::int64_t at = from - (spec.dims[0][i].part.empty() ? 0 : part_begin);
        if (!spans.empty() && spans.back().segment == i && spans.back().at + spans.back().count == at) spans.back().count += n;
        else spans.push_back({i, at, to, n});
        from += n, to += n, count -= n;
      }
      part_begin = part_end;
    }
  };
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t outer = at / (local * inner);
    std::int64_t within = at % (local * inner);  // then within a run
    std::size_t r = 0;
    for (; within >= runs[r].length * inner; ++r) within -= runs[r].length * inner;
    const std::int64_t count = std::min(end - at, runs[r].length * inner - within);
    add((outer * whole[dim] + runs[r].begin) * inner + within, at - begin, count);
    at += count;
  }
  return spans;
}

/// Elements [begin, end) of a stream, four to a Philox block.
template <class T>
void fill_random(T* to, std::uint64_t begin, std::uint64_t end, const Rng& rng, const Init& init) {
  const bool normal = init.kind == Init::Kind::normal;
  for (std::uint64_t block = begin / 4; block < (end + 3) / 4; ++block) {
    const kernels::Philox4 bits = kernels::philox4x32_10(rng.key(), rng.step(), block);
    for (std::uint64_t lane = 0; lane < 4; ++lane) {
      const std::uint64_t i = block * 4 + lane;
      if (i < begin || i >= end) continue;
      const double u = (static_cast<double>(bits.v[lane]) + 0.5) * 0x1p-32;
      const double value = init.scale * (normal ? kernels::normal_quantile(u) : 2 * u - 1);
      if constexpr (std::is_same_v<T, bf16>) to[i - begin] = bf16(static_cast<float>(value));
      else to[i - begin] = static_cast<T>(value);
    }
  }
}

/// Long spans go to the threads in pieces, short ones many at a time.
void fill_spans(const std::vector<Span>& spans, const std::vector<Rng>& streams, const Init& init, const Tensor& values) {
  constexpr std::int64_t piece = 4096;
  std::vector<Span> pieces;
  for (const Span& s : spans)
    for (std::int64_t at = 0; at < s.count; at += piece) pieces.push_back({s.segment, s.at + at, s.to + at, std::min(piece, s.count - at)});
  const auto fill = [&]<class T>(T* to) {
#pragma omp parallel for num_threads(values.device().cpu().threads()) schedule(static) if (values.numel() > piece)
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const Span& s = pieces[i];
      fill_random(to + s.to, static_cast<std::uint64_t>(s.at), static_cast<std::uint64_t>(s.at + s.count), streams[s.segment], init);
    }
  };
  // Other devices get the host's bits.
  const auto fill_values = [&]<class T>(T*) {
    if (values.device().kind() == DeviceKind::cpu) return fill(values.data<T>());
    std::vector<T> host(static_cast<std::size_t>(values.numel()));
    fill(host.data());
    values.copy_from_host(host.data(), values.bytes());
  };
  switch (values.dtype()) {
    case DType::f64: fill_values(static_cast<double*>(nullptr)); break;
    case DType::f32: fill_values(static_cast<float*>(nullptr)); break;
    default: fill_values(static_cast<bf16*>(nullptr)); break;
  }
}

}  // namespace

void Parameter::initialize_flat(std::uint64_t seed, const Tensor& values, std::int64_t begin) const {
  const TensorPlacement* placed = placement_.get();
  const Dims whole = shape();
  const std::int64_t held = placed != nullptr ? placed->local.product() : whole.product(), end = begin + values.numel();
  if (!values.is_contiguous() || begin < 0 || end > held)
    fail(Fault::programming, name_, "initialize: expected contiguous elements of [0, " + std::to_string(held) + "), got [" + std::to_string(begin) + ", " + std::to_string(end) + ")");
  if (values.dtype() != DType::f64 && values.dtype() != DType::f32 && values.dtype() != DType::bf16)
    fail(Fault::programming, name_, "initialize: element type: expected f64, f32 or bf16, got " + std::string(name_of(values.dtype())));
  if (values.is_meta() || values.numel() == 0) return;
  const Init& init = spec_.init;
  if (init.kind == Init::Kind::zeros || init.kind == Init::Kind::ones) {
    values.fill(init.kind == Init::Kind::ones ? 1 : 0);
    return;
  }
  std::vector<Rng> streams;
  for (const Segment& s : spec_.dims[0]) streams.emplace_back(seed, s.part.empty() ? name_ : name_ + "/" + s.part);
  const bool whole_rows = placed == nullptr || !placed->cut();
  fill_spans(spans_of(spec_, whole, whole_rows ? 0 : placed->dim, whole_rows ? std::vector<Run>{{0, whole[0], 1}} : placed->runs, begin, end), streams,
             init, values);
}

void Parameter::initialize(std::uint64_t seed, const Tensor& values, std::int64_t row_begin) const {
  const Dims whole = shape();
  if (cut() || !values.is_contiguous() || values.rank() != whole.size() || row_begin < 0 || row_begin + values.size(0) > whole[0])
    fail(Fault::programming, name_, "initialize: rows [" + std::to_string(row_begin) + ", " + std::to_string(row_begin + values.size(0)) + ") of shape " + to_string(whole));
  initialize_flat(seed, values.view(Dims{values.numel()}), row_begin * (whole.product() / whole[0]));
}

}  // namespace capstan
