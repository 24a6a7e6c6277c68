// defines: Segment, Role, Init, Parameter: what a model learns, named, with named axes.
#pragma once
#include <capstan/autograd.h>
#include <capstan/random.h>
#include <capstan/tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

struct TensorPlacement;

/// A run of `count` units of `width` elements along one dimension, on the named axis. A fused QKV weight's
/// first dimension is {heads, 32, 128}, {kv_heads, 8, 128}, {kv_heads, 8, 128}.
struct Segment {
  std::string axis;
  std::int64_t count = 0, width = 1;
  std::string part{};  ///< "q", "k", "v", "gate", "up": names a fused piece; "" when the dimension is whole
  /// The units form this many equal groups that a cut keeps together or cuts alike: query heads by the key/value head
  /// that they read. 0: no groups.
  std::int64_t groups = 0;
  std::int64_t extent() const { return count * width; }
};

enum class Role : std::uint8_t { matrix, embedding, head, vector, bias, router, conv, state };
CAPSTAN_API std::string_view name_of(Role role);

/// How a parameter starts. Values are addressed by the unfused element: the random stream is
/// `<parameter>/<part>` and the index is the element's row-major position within that part.
struct Init {
  enum class Kind : std::uint8_t { zeros, ones, normal, uniform } kind = Kind::zeros;
  double scale = 0;  ///< normal: standard deviation; uniform: half-width
};

/// What a Parameter is told when it is declared.
struct ParameterSpec {
  std::vector<std::vector<Segment>> dims;  ///< per dimension; extents are the sums
  Role role = Role::matrix;
  Init init;
  bool trainable = true;
  bool persistent = true;  ///< kept in checkpoints
  bool linear = false;     ///< the weight [out, in] of an nn::Linear, whose products precision.linear chooses
};

/// A parameter has a name, a global shape by segments, and (once the engine has placed it) local values: all of it, or
/// what a tensor rank holds. Before that it has no values and no memory.
class CAPSTAN_API Parameter {
 public:
  Parameter(std::string name, ParameterSpec spec);
  ~Parameter();
  Parameter(const Parameter&) = delete;
  Parameter& operator=(const Parameter&) = delete;

  const std::string& name() const { return name_; }
  const ParameterSpec& spec() const { return spec_; }
  Role role() const { return spec_.role; }
  bool trainable() const { return spec_.trainable; }
  Dims shape() const;           ///< global
  std::int64_t numel() const { return shape().product(); }

  /// The local values, with a gradient leaf when trainable. Error(programming) before placement.
  const Tensor& local() const;
  Leaf* leaf() const;
  /// Which elements local() has; null: all, on every rank.
  const TensorPlacement* placement() const { return placement_.get(); }
  /// True when local() is what one of several tensor ranks holds. Then only core's layers (nn.h) may use it: they know
  /// what to communicate.
  bool cut() const;

  /// Raised by each change of the values.
  std::uint64_t version() const { return version_; }
  /// Fills a form that is made from the values (packed for a GEMM library, cast, transposed).
  using Fill = std::function<void(const Tensor& values, const Tensor& form)>;
  /// That form, filled once for each version of the values; in one place for as long as it has one shape, until forget_derived().
  /// `fill` is kept: what it captures must last.
  const Tensor& derived(std::string_view form, const Dims& shape, DType dtype, const Fill& fill) const;
  /// Fills anew all forms that the values have left behind, where they are.
  void refresh_derived() const;
  /// Bytes that derived forms hold; forget_derived() frees them.
  std::int64_t derived_bytes() const;
  void forget_derived() const { derived_.clear(); }

  // For engines.
  void set_placement(std::shared_ptr<const TensorPlacement> placement) { placement_ = std::move(placement); }
  void place(Tensor local, bool with_gradient = true);
  void changed() { ++version_; }
  /// Writes initial values of rows [row_begin, row_begin + values.size(0)) of dimension 0 into `values`.
  void initialize(std::uint64_t seed, const Tensor& values, std::int64_t row_begin = 0) const;
  /// Writes initial values of elements [begin, begin + values.numel()) of the row-major local tensor into the contiguous
  /// `values`: the bits that the whole parameter has there, whatever the placement.
  void initialize_flat(std::uint64_t seed, const Tensor& values, std::int64_t begin) const;

 private:
  friend class Module;
  std::string name_;
  ParameterSpec spec_;
  Tensor local_;
  std::shared_ptr<const TensorPlacement> placement_;
  std::uint64_t version_ = 0;
  struct Derived {
    std::uint64_t version;
    Tensor value;
    Fill fill;
  };
  mutable std::map<std::string, Derived, std::less<>> derived_;
};

}  // namespace capstan
