#include <capstan/parameter.h>
#include <kernels/cpu/context.h>

#include <algorithm>
#include <array>

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

Leaf* Parameter::leaf() const { return static_cast<Leaf*>(local().node().get()); }

void Parameter::place(Tensor local, bool with_gradient) {
  local_ = with_gradient && spec_.trainable ? make_leaf(local, true) : local.detach();
  ++version_;
}

const Tensor& Parameter::derived(std::string_view form, const std::function<Tensor(const Tensor&)>& make) const {
  auto it = derived_.find(form);
  if (it == derived_.end()) it = derived_.emplace(std::string(form), Derived{0, Tensor()}).first;
  if (!it->second.value.defined() || it->second.version != version_) {
    it->second.value = Tensor();  // the old form goes before the new one comes
    it->second = {version_, make(local().detach())};
  }
  return it->second.value;
}

namespace {

/// Elements [begin, end) of a stream, four to a Philox block.
template <class T>
void fill_random(int threads, T* to, std::uint64_t begin, std::uint64_t end, const Rng& rng, const Init& init) {
  const bool normal = init.kind == Init::Kind::normal;
  const std::uint64_t first_block = begin / 4, last_block = (end + 3) / 4;
#pragma omp parallel for num_threads(threads) schedule(static) if (end - begin > 4096)
  for (std::uint64_t block = first_block; block < last_block; ++block) {
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

}  // namespace

void Parameter::initialize(std::uint64_t seed, const Tensor& values, std::int64_t row_begin) const {
  const Init& init = spec_.init;
  if (values.is_meta()) return;
  if (init.kind == Init::Kind::zeros || init.kind == Init::Kind::ones) {
    values.fill(init.kind == Init::Kind::ones ? 1 : 0);
    return;
  }
  const Dims whole = shape();
  if (!values.is_contiguous() || values.rank() != whole.size() || row_begin < 0 || row_begin + values.size(0) > whole[0])
    fail(Fault::programming, name_, "initialize: rows [" + std::to_string(row_begin) + ", " + std::to_string(row_begin + values.size(0)) + ") of shape " + to_string(whole));
  const std::int64_t row_elements = whole.product() / whole[0], row_end = row_begin + values.size(0);
  std::int64_t part_begin = 0;
  for (const Segment& s : spec_.dims[0]) {
    const std::int64_t part_end = part_begin + s.extent();
    const std::int64_t from = std::max(part_begin, row_begin), to = std::min(part_end, row_end);
    if (from < to) {
      const Rng rng(seed, s.part.empty() ? name_ : name_ + "/" + s.part);
      // Unnamed segments of one dimension are one tensor: their index runs on from its start.
      const std::int64_t base = s.part.empty() ? 0 : part_begin;
      const auto a = static_cast<std::uint64_t>((from - base) * row_elements), b = static_cast<std::uint64_t>((to - base) * row_elements);
      const int threads = values.device().cpu().threads();
      const Tensor rows = values.narrow(0, from - row_begin, to - from);
      switch (values.dtype()) {
        case DType::f64: fill_random(threads, rows.data<double>(), a, b, rng, init); break;
        case DType::f32: fill_random(threads, rows.data<float>(), a, b, rng, init); break;
        case DType::bf16: fill_random(threads, rows.data<bf16>(), a, b, rng, init); break;
        default: fail(Fault::programming, name_, "initialize: element type " + std::string(name_of(values.dtype())));
      }
    }
    part_begin = part_end;
  }
}

}  // namespace capstan
