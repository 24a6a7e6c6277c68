// defines: CudnnLibrary, CudnnGraph and CudnnPlan: cuDNN's graph interface (its backend descriptors) with owners and
// errors. The library is opened when it is first wanted, so that a machine without cuDNN still runs everything else.
#pragma once
#include <cudnn.h>

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::kernels::cuda {

/// The functions of libcudnn.so.9 that graphs need.
class CudnnLibrary {
 public:
  CudnnLibrary();  ///< throws std::runtime_error when the library or one of its functions is missing
  ~CudnnLibrary();
  CudnnLibrary(const CudnnLibrary&) = delete;
  CudnnLibrary& operator=(const CudnnLibrary&) = delete;

  decltype(&cudnnGetVersion) version = nullptr;
  decltype(&cudnnCreate) create = nullptr;
  decltype(&cudnnDestroy) destroy = nullptr;
  decltype(&cudnnSetStream) set_stream = nullptr;
  decltype(&cudnnGetErrorString) error_string = nullptr;
  decltype(&cudnnGetLastErrorString) last_error_string = nullptr;
  decltype(&cudnnBackendCreateDescriptor) create_descriptor = nullptr;
  decltype(&cudnnBackendDestroyDescriptor) destroy_descriptor = nullptr;
  decltype(&cudnnBackendSetAttribute) set_attribute = nullptr;
  decltype(&cudnnBackendGetAttribute) get_attribute = nullptr;
  decltype(&cudnnBackendFinalize) finalize = nullptr;
  decltype(&cudnnBackendExecute) execute = nullptr;

  /// Throws std::runtime_error("[cudnn] <doing>: <cuDNN's text>").
  void check(cudnnStatus_t status, const char* doing) const;

 private:
  void* handle_ = nullptr;
};

/// One backend descriptor.
class CudnnDescriptor {
 public:
  CudnnDescriptor(const CudnnLibrary& library, cudnnBackendDescriptorType_t type, const char* name);
  ~CudnnDescriptor();
  CudnnDescriptor(CudnnDescriptor&& other) noexcept;
  CudnnDescriptor(const CudnnDescriptor&) = delete;
  CudnnDescriptor& operator=(const CudnnDescriptor&) = delete;

  cudnnBackendDescriptor_t raw() const { return raw_; }
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count, const void* values);
  void set(cudnnBackendAttributeName_t name, const CudnnDescriptor& other);
  void set(cudnnBackendAttributeName_t name, std::int64_t value) { set(name, CUDNN_TYPE_INT64, 1, &value); }
  void finalize();

 private:
  const CudnnLibrary* library_;
  cudnnBackendDescriptor_t raw_ = nullptr;
  const char* name_;
};

/// A graph of operations on tensors of four dimensions, built in order. Tensors are numbered by their ids.
class CudnnGraph {
 public:
  using Four = std::array<std::int64_t, 4>;
  /// A tensor of the graph; `id` names it in the pack of pointers.
  struct Tensor {
    std::int64_t id = 0;
    Four size{}, stride{};
    cudnnDataType_t type = CUDNN_DATA_FLOAT;
    const CudnnDescriptor* descriptor = nullptr;
  };

  explicit CudnnGraph(const CudnnLibrary& library) : library_(&library) {}

  /// Memory that the caller names when the plan runs. ragged: offsets [batch + 1] in elements.
  Tensor memory(const Four& size, const Four& stride, cudnnDataType_t type, const Tensor* ragged = nullptr) { return make(size, stride, type, false, false, ragged); }
  /// A value between operations.
  Tensor between(const Four& size, const Four& stride, cudnnDataType_t type = CUDNN_DATA_FLOAT, const Tensor* ragged = nullptr) { return make(size, stride, type, true, false, ragged); }
  Tensor between(const Four& size, cudnnDataType_t type = CUDNN_DATA_FLOAT) { return between(size, packed(size), type); }
  /// A number on the host, read when the plan runs.
  Tensor number(cudnnDataType_t type = CUDNN_DATA_FLOAT) { return make({1, 1, 1, 1}, {1, 1, 1, 1}, type, false, true, nullptr); }

  /// c = a b. m, n, k: true sizes [batch, 1, 1, 1] of padded dimensions, or null. padding: what lies past them in a and b.
  void product(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor* m = nullptr, const Tensor* n = nullptr, const Tensor* k = nullptr,
               std::optional<double> padding = std::nullopt);
  void unary(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor& y);
  void binary(cudnnPointwiseMode_t mode, const Tensor& a, const Tensor& b, const Tensor& y, cudnnDataType_t compute = CUDNN_DATA_FLOAT);
  /// y = t ? x : b.
  void select(const Tensor& x, const Tensor& b, const Tensor& t, const Tensor& y);
  void index(std::int64_t axis, const Tensor& x, const Tensor& y);
  void reduce(cudnnReduceTensorOp_t mode, const Tensor& x, const Tensor& y);
  void reshape(const Tensor& x, const Tensor& y);

  /// The operations in their order, by name.
  const std::vector<std::string>& names() const { return names_; }

  static Four packed(const Four& size) { return {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1}; }

 private:
  friend class CudnnPlan;
  Tensor make(const Four& size, const Four& stride, cudnnDataType_t type, bool is_virtual, bool by_value, const Tensor* ragged);
  CudnnDescriptor& add_operation(cudnnBackendDescriptorType_t type, const char* kind, std::string name);
  void pointwise(cudnnPointwiseMode_t mode, cudnnDataType_t compute, std::int64_t axis, const Tensor* x, const Tensor* b, const Tensor* t, const Tensor& y);

  const CudnnLibrary* library_;
  std::int64_t next_ = 1;
  std::vector<std::unique_ptr<CudnnDescriptor>> kept_;
  std::vector<CudnnDescriptor*> operations_;
  std::vector<std::string> names_;
};

/// No engine takes a graph in the bytes that are allowed, though one does in more.
struct CudnnNoRoom : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A graph made ready to run: the first of the engines that the library's heuristics name, that accepts it and that works in at
/// most `most` bytes.
class CudnnPlan {
 public:
  /// Throws std::runtime_error when no engine takes the graph, with what each said: CudnnNoRoom when one would in more bytes.
  CudnnPlan(const CudnnLibrary& library, cudnnHandle_t handle, CudnnGraph&& graph, std::int64_t most = std::numeric_limits<std::int64_t>::max());
  std::int64_t workspace() const { return workspace_; }
  std::int64_t engine() const { return engine_; }
  struct Pointer { std::int64_t id; const void* data; };
  void run(cudnnHandle_t handle, const std::vector<Pointer>& pointers, void* workspace) const;

  /// Finalizes the graph of operations alone: what can be checked without a GPU.
  static void check(const CudnnLibrary& library, cudnnHandle_t handle, CudnnGraph& graph);

 private:
  const CudnnLibrary* library_;
  CudnnGraph graph_;
  std::unique_ptr<CudnnDescriptor> operations_, plan_;
  std::int64_t workspace_ = 0, engine_ = -1;
};

}  // namespace capstan::kernels::cuda
