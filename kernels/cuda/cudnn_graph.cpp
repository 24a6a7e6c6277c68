// cuDNN's graphs through its backend descriptors.
#if defined(CAPSTAN_CUDNN)
#include <kernels/cuda/cudnn_graph.h>

#include <dlfcn.h>

#include <utility>

namespace capstan::kernels::cuda {

CudnnLibrary::CudnnLibrary() {
  handle_ = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
  if (handle_ == nullptr) throw std::runtime_error(std::string("[cudnn] the library libcudnn.so.9 cannot be opened: ") + dlerror());
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle_, name));
    if (function == nullptr) throw std::runtime_error(std::string("[cudnn] libcudnn.so.9 has no function ") + name + ": version 9.10.2 or later is needed");
  };
  find(version, "cudnnGetVersion");
  find(create, "cudnnCreate"), find(destroy, "cudnnDestroy"), find(set_stream, "cudnnSetStream");
  find(error_string, "cudnnGetErrorString"), find(last_error_string, "cudnnGetLastErrorString");
  find(create_descriptor, "cudnnBackendCreateDescriptor"), find(destroy_descriptor, "cudnnBackendDestroyDescriptor");
  find(set_attribute, "cudnnBackendSetAttribute"), find(get_attribute, "cudnnBackendGetAttribute");
  find(finalize, "cudnnBackendFinalize"), find(execute, "cudnnBackendExecute");
  // Before 9.6 whoever builds a backward's graph has to clear the queries' sums, and before 9.10 to mask what lies past a sequence's
  // end once more behind the log-sums; attention is known to be wrong in 9.10.0 and 9.10.1.
  if (version() < 91002) throw std::runtime_error("[cudnn] libcudnn.so.9 is version " + std::to_string(version()) + ": version 9.10.2 (91002) or later is needed");
}

CudnnLibrary::~CudnnLibrary() = default;  // a library with threads of its own is never closed

void CudnnLibrary::check(cudnnStatus_t status, const char* doing) const {
  if (status == CUDNN_STATUS_SUCCESS) return;
  char text[1024] = {};
  last_error_string(text, sizeof text);
  throw std::runtime_error(std::string("[cudnn] ") + doing + ": " + error_string(status) + (text[0] != 0 ? std::string(": ") + text : std::string()));
}

CudnnDescriptor::CudnnDescriptor(const CudnnLibrary& library, cudnnBackendDescriptorType_t type, const char* name) : library_(&library), name_(name) {
  library.check(library.create_descriptor(type, &raw_), name);
}
CudnnDescriptor::~CudnnDescriptor() {
  if (raw_ != nullptr) library_->destroy_descriptor(raw_);
}
CudnnDescriptor::CudnnDescriptor(CudnnDescriptor&& other) noexcept : library_(other.library_), raw_(std::exchange(other.raw_, nullptr)), name_(other.name_) {}

void CudnnDescriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count, const void* values) {
  library_->check(library_->set_attribute(raw_, name, type, count, values), name_);
}
void CudnnDescriptor::set(cudnnBackendAttributeName_t name, const CudnnDescriptor& other) {
  const cudnnBackendDescriptor_t raw = other.raw();
  set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &raw);
}
void CudnnDescriptor::finalize() { library_->check(library_->finalize(raw_), name_); }

CudnnGraph::Tensor CudnnGraph::make(const Four& size, const Four& stride, cudnnDataType_t type, bool is_virtual, bool by_value, const Tensor* ragged) {
  Tensor t{next_++, size, stride, type, nullptr};
  auto d = std::make_unique<CudnnDescriptor>(*library_, CUDNN_BACKEND_TENSOR_DESCRIPTOR, "tensor");
  const std::int64_t alignment = 16;
  d->set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
  d->set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, size.data());
  d->set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, stride.data());
  d->set(CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &t.id);
  d->set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
  d->set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
  d->set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
  if (ragged != nullptr) d->set(CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, *ragged->descriptor);
  d->finalize();
  t.descriptor = d.get();
  kept_.push_back(std::move(d));
  return t;
}

namespace {

std::string name_of(cudnnPointwiseMode_t mode) {
  switch (mode) {
    case CUDNN_POINTWISE_ADD: return "add";
    case CUDNN_POINTWISE_SUB: return "sub";
    case CUDNN_POINTWISE_MUL: return "mul";
    case CUDNN_POINTWISE_DIV: return "div";
    case CUDNN_POINTWISE_EXP: return "exp";
    case CUDNN_POINTWISE_LOG: return "log";
    case CUDNN_POINTWISE_IDENTITY: return "identity";
    case CUDNN_POINTWISE_CMP_LT: return "lt";
    case CUDNN_POINTWISE_CMP_GE: return "ge";
    case CUDNN_POINTWISE_CMP_GT: return "gt";
    case CUDNN_POINTWISE_LOGICAL_AND: return "and";
    case CUDNN_POINTWISE_BINARY_SELECT: return "select";
    case CUDNN_POINTWISE_GEN_INDEX: return "index";
    default: return "pointwise " + std::to_string(static_cast<int>(mode));
  }
}

}  // namespace

CudnnDescriptor& CudnnGraph::add_operation(cudnnBackendDescriptorType_t type, const char* kind, std::string name) {
  kept_.push_back(std::make_unique<CudnnDescriptor>(*library_, type, kind));
  operations_.push_back(kept_.back().get());
  names_.push_back(std::move(name));
  return *kept_.back();
}

void CudnnGraph::product(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor* m, const Tensor* n, const Tensor* k, std::optional<double> padding) {
  auto d = std::make_unique<CudnnDescriptor>(*library_, CUDNN_BACKEND_MATMUL_DESCRIPTOR, "matmul");
  const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
  d->set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
  if (padding) d->set(CUDNN_ATTR_MATMUL_PADDING_VALUE, CUDNN_TYPE_DOUBLE, 1, &*padding);
  d->finalize();
  CudnnDescriptor& o = add_operation(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, "matmul operation", padding ? "product padded" : "product");
  o.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, *a.descriptor);
  o.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, *b.descriptor);
  o.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, *c.descriptor);
  o.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, *d);
  if (m != nullptr) o.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, *m->descriptor);
  if (n != nullptr) o.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, *n->descriptor);
  if (k != nullptr) o.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, *k->descriptor);
  o.finalize();
  kept_.push_back(std::move(d));
}

void CudnnGraph::pointwise(cudnnPointwiseMode_t mode, cudnnDataType_t compute, std::int64_t axis, const Tensor* x, const Tensor* b, const Tensor* t, const Tensor& y) {
  auto d = std::make_unique<CudnnDescriptor>(*library_, CUDNN_BACKEND_POINTWISE_DESCRIPTOR, "pointwise");
  d->set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
  d->set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute);
  if (axis >= 0) d->set(CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
  d->finalize();
  CudnnDescriptor& o = add_operation(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, "pointwise operation", axis >= 0 ? name_of(mode) + " " + std::to_string(axis) : name_of(mode));
  o.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, *d);
  o.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, *x->descriptor);
  if (b != nullptr) o.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *b->descriptor);
  if (t != nullptr) o.set(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, *t->descriptor);
  o.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, *y.descriptor);
  o.finalize();
  kept_.push_back(std::move(d));
}

void CudnnGraph::unary(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor& y) { pointwise(mode, CUDNN_DATA_FLOAT, -1, &x, nullptr, nullptr, y); }
void CudnnGraph::binary(cudnnPointwiseMode_t mode, const Tensor& a, const Tensor& b, const Tensor& y, cudnnDataType_t compute) {
  pointwise(mode, compute, -1, &a, &b, nullptr, y);
}
void CudnnGraph::select(const Tensor& x, const Tensor& b, const Tensor& t, const Tensor& y) { pointwise(CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, -1, &x, &b, &t, y); }
void CudnnGraph::index(std::int64_t axis, const Tensor& x, const Tensor& y) { pointwise(CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_INT32, axis, &x, nullptr, nullptr, y); }

void CudnnGraph::reduce(cudnnReduceTensorOp_t mode, const Tensor& x, const Tensor& y) {
  auto d = std::make_unique<CudnnDescriptor>(*library_, CUDNN_BACKEND_REDUCTION_DESCRIPTOR, "reduction");
  const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
  d->set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &mode);
  d->set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
  d->finalize();
  CudnnDescriptor& o = add_operation(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, "reduction operation", mode == CUDNN_REDUCE_TENSOR_MAX ? "most of" : "sum of");
  o.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, *x.descriptor);
  o.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, *y.descriptor);
  o.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, *d);
  o.finalize();
  kept_.push_back(std::move(d));
}

void CudnnGraph::reshape(const Tensor& x, const Tensor& y) {
  CudnnDescriptor& o = add_operation(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, "reshape operation", "reshape");
  o.set(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, *x.descriptor);
  o.set(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, *y.descriptor);
  o.finalize();
}

namespace {

std::unique_ptr<CudnnDescriptor> operation_graph(const CudnnLibrary& library, cudnnHandle_t handle, const std::vector<CudnnDescriptor*>& operations) {
  auto graph = std::make_unique<CudnnDescriptor>(library, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, "operation graph");
  std::vector<cudnnBackendDescriptor_t> raw;
  for (const CudnnDescriptor* o : operations) raw.push_back(o->raw());
  graph->set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<std::int64_t>(raw.size()), raw.data());
  if (handle != nullptr) graph->set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
  graph->finalize();
  return graph;
}

}  // namespace

void CudnnPlan::check(const CudnnLibrary& library, cudnnHandle_t handle, CudnnGraph& graph) { operation_graph(library, handle, graph.operations_); }

CudnnPlan::CudnnPlan(const CudnnLibrary& library, cudnnHandle_t handle, CudnnGraph&& graph, std::int64_t most) : library_(&library), graph_(std::move(graph)) {
  operations_ = operation_graph(library, handle, graph_.operations_);
  std::string said;
  bool no_room = false;
  for (const cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK}) {
    CudnnDescriptor heuristics(library, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, "heuristics");
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, *operations_);
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    const cudnnStatus_t status = library.finalize(heuristics.raw());
    if (status != CUDNN_STATUS_SUCCESS) {
      char text[512] = {};
      library.last_error_string(text, sizeof text);
      said += std::string(said.empty() ? "" : "; ") + "heuristics: " + library.error_string(status) + " " + text;
      continue;
    }
    std::int64_t count = 0;
    library.check(library.get_attribute(heuristics.raw(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, &count, nullptr), "heuristics");
    std::vector<std::unique_ptr<CudnnDescriptor>> configurations;
    std::vector<cudnnBackendDescriptor_t> raw;
    for (std::int64_t i = 0; i < count; ++i) {
      configurations.push_back(std::make_unique<CudnnDescriptor>(library, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, "engine configuration"));
      raw.push_back(configurations.back()->raw());
    }
    std::int64_t got = 0;
    if (count > 0)
      library.check(library.get_attribute(heuristics.raw(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, count, &got, raw.data()), "heuristics");
    for (std::int64_t i = 0; i < got; ++i) {
      auto plan = std::make_unique<CudnnDescriptor>(library, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, "execution plan");
      plan->set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
      plan->set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, *configurations[static_cast<std::size_t>(i)]);
      try {
        plan->finalize();
      } catch (const std::exception& e) {
        said += (said.empty() ? "" : "; ") + std::string(e.what());
        continue;
      }
      std::int64_t n = 0;
      library.check(library.get_attribute(plan->raw(), CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &n, &workspace_), "execution plan");
      if (workspace_ > most) {
        no_room = true;
        said += std::string(said.empty() ? "" : "; ") + "an engine wants " + std::to_string(workspace_) + " bytes to work in, allowed are " + std::to_string(most);
        continue;
      }
      CudnnDescriptor engine(library, CUDNN_BACKEND_ENGINE_DESCRIPTOR, "engine");
      cudnnBackendDescriptor_t raw_engine = engine.raw();
      library.check(library.get_attribute(raw[static_cast<std::size_t>(i)], CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &n, &raw_engine), "engine");
      library.check(library.get_attribute(raw_engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &n, &engine_), "engine");
      plan_ = std::move(plan);
      return;
    }
    if (got == 0) said += std::string(said.empty() ? "" : "; ") + "the heuristics name no engine";
  }
  if (no_room) throw CudnnNoRoom("[cudnn] no engine takes this graph: " + said);
  throw std::runtime_error("[cudnn] no engine takes this graph: " + said);
}

void CudnnPlan::run(cudnnHandle_t handle, const std::vector<Pointer>& pointers, void* workspace) const {
  std::vector<std::int64_t> ids;
  std::vector<void*> data;
  for (const Pointer& p : pointers) ids.push_back(p.id), data.push_back(const_cast<void*>(p.data));
  CudnnDescriptor pack(*library_, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, "variant pack");
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, static_cast<std::int64_t>(ids.size()), ids.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, static_cast<std::int64_t>(data.size()), data.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  pack.finalize();
  library_->check(library_->execute(handle, plan_->raw(), pack.raw()), "running a plan");
}

}  // namespace capstan::kernels::cuda
#endif
