// Pins the layout of every type that crosses the boundary between core and plugins, and the order and signature of every
// virtual function. A plugin that was built against other layouts would not fail, it would compute nonsense.
#include <capstan/autograd.h>
#include <capstan/batch.h>
#include <capstan/checkpoint.h>
#include <capstan/inference.h>
#include <capstan/model.h>
#include <capstan/nn.h>
#include <capstan/ops.h>
#include <capstan/optimizer.h>
#include <capstan/options.h>
#include <capstan/plugin.h>
#include <capstan/tokenizer.h>

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <string>
#include <typeinfo>
#include <vector>

namespace capstan {
namespace {

/// One member's place: offset, size, and the size of what it lists.
struct Place {
  std::ptrdiff_t offset = 0;
  std::size_t size = 0, element = 0;
};

template <class C, class M>
Place place_of(M C::* member) {
  // The Itanium C++ ABI represents a pointer to a data member by its offset.
  static_assert(sizeof member == sizeof(std::ptrdiff_t));
  Place place;
  std::memcpy(&place.offset, &member, sizeof member);
  place.size = sizeof(M);
  if constexpr (requires { typename M::value_type; }) place.element = sizeof(typename M::value_type);
  return place;
}

/// "&A::x, &A::y" -> x, y
std::vector<std::string> names_in(const std::string& list) {
  std::vector<std::string> names;
  for (std::size_t at = 0; (at = list.find('&', at)) != std::string::npos;) {
    std::size_t end = list.find(',', at);
    if (end == std::string::npos) end = list.size();
    const std::string one = list.substr(at, end - at);
    names.push_back(one.substr(one.rfind("::") + 2));
    at = end;
  }
  return names;
}

template <class T>
std::string layout(const std::string& type, const std::string& list, const std::vector<Place>& places) {
  std::string line = type + " " + std::to_string(sizeof(T)) + "/" + std::to_string(alignof(T)) + ":";
  const auto names = names_in(list);
  for (std::size_t i = 0; i < places.size(); ++i) {
    line += " " + names.at(i) + "@" + std::to_string(places[i].offset) + "+" + std::to_string(places[i].size);
    if (places[i].element != 0) line += "[" + std::to_string(places[i].element) + "]";
  }
  return line + "\n";
}

/// Explicit instantiation may name private members; that is how they are reached here.
template <class Tag, auto... members>
struct Reveal {
  friend std::vector<Place> places(Tag) { return {place_of(members)...}; }
};

#define REVEAL(TAG, ...)                                                                    \
  struct TAG##Tag { friend std::vector<Place> places(TAG##Tag); };                           \
  template struct Reveal<TAG##Tag, __VA_ARGS__>;                                            \
  const std::string TAG##_members = #__VA_ARGS__
#define LAYOUT(TAG, TYPE) layout<TYPE>(#TYPE, TAG##_members, places(TAG##Tag{}))
#define SIZE(TYPE) layout<TYPE>(#TYPE, "", {})

/// A virtual function's slot in the vtable: the first word of its member pointer is 1 + 8 * slot (on ARM 8 * slot).
template <class F>
std::size_t slot_of(F function) {
  std::size_t word = 0;
  std::memcpy(&word, &function, sizeof word);
#if defined(__aarch64__)
  return word / sizeof(void*);
#else
  return (word - 1) / sizeof(void*);
#endif
}

/// `end` is a virtual function that a class below adds: its slot is the number of slots of T.
template <class End, class... F>
std::string vtable(const std::string& type, const std::string& list, End end, F... functions) {
  const auto names = names_in(list);
  std::string text;
  std::size_t i = 0;
  [[maybe_unused]] const auto line = [&](std::size_t slot, const char* signature) {
    text += type + "::" + names.at(i++) + " slot " + std::to_string(slot) + " " + signature + "\n";
  };
  (line(slot_of(functions), typeid(F).name()), ...);
  return text + type + " slots " + std::to_string(slot_of(end)) + "\n";
}

#define VTABLE(TYPE, ...)                                                                                          \
  [] {                                                                                                             \
    struct End : TYPE { using TYPE::TYPE; virtual void end_of_slots(); };                                          \
    return vtable(#TYPE, #__VA_ARGS__, &End::end_of_slots __VA_OPT__(,) __VA_ARGS__);                                           \
  }()

REVEAL(Dims, &Dims::v_, &Dims::size_);
REVEAL(Storage, &Storage::device, &Storage::data, &Storage::bytes, &Storage::owned, &Storage::keeper);
REVEAL(Tensor, &Tensor::storage_, &Tensor::shape_, &Tensor::strides_, &Tensor::offset_, &Tensor::dtype_, &Tensor::output_index_,
       &Tensor::node_);
REVEAL(Cost, &Cost::flop, &Cost::read, &Cost::write, &Cost::comm);
REVEAL(OpRecord, &OpRecord::name, &OpRecord::calls, &OpRecord::cost, &OpRecord::seconds);
REVEAL(Device, &Device::held_, &Device::peak_, &Device::recording_, &Device::timed_, &Device::ledger_);
REVEAL(OpScope, &OpScope::name_, &OpScope::cost_, &OpScope::start_, &OpScope::meta_);
REVEAL(Edge, &Edge::node, &Edge::index);
REVEAL(Node, &Node::inputs, &Node::outputs, &Node::released);
REVEAL(Leaf, &Leaf::hook, &Leaf::parameter_, &Leaf::filled_, &Leaf::uses_, &Leaf::grad_);
REVEAL(Deferred, &Deferred::items);
REVEAL(DeferredItem, &Deferred::Item::node, &Deferred::Item::grads);
REVEAL(Space, &Space::name, &Space::starts, &Space::positions, &Space::sample_ids, &Space::host_starts, &Space::past,
       &Space::capacity, &Space::longest);
REVEAL(Batch, &Batch::spaces, &Batch::step_weight, &Batch::streams_);
REVEAL(Rng, &Rng::key_, &Rng::step_);
REVEAL(Segment, &Segment::axis, &Segment::count, &Segment::width, &Segment::part);
REVEAL(Init, &Init::kind, &Init::scale);
REVEAL(ParameterSpec, &ParameterSpec::dims, &ParameterSpec::role, &ParameterSpec::init, &ParameterSpec::trainable,
       &ParameterSpec::persistent);
REVEAL(Parameter, &Parameter::name_, &Parameter::spec_, &Parameter::local_, &Parameter::version_, &Parameter::derived_);
REVEAL(OptionSpec, &OptionSpec::name, &OptionSpec::help, &OptionSpec::unit, &OptionSpec::type, &OptionSpec::required,
       &OptionSpec::optional, &OptionSpec::default_text, &OptionSpec::minimum, &OptionSpec::maximum,
       &OptionSpec::exclusive_minimum, &OptionSpec::allowed, &OptionSpec::plugin_kind, &OptionSpec::group);
REVEAL(Schema, &Schema::options_);
REVEAL(Options, &Options::impl_);
REVEAL(PluginChoice, &PluginChoice::kind, &PluginChoice::name, &PluginChoice::options);
REVEAL(PluginInfo, &PluginInfo::magic, &PluginInfo::size, &PluginInfo::core_epoch, &PluginInfo::kind_epoch, &PluginInfo::kind,
       &PluginInfo::name, &PluginInfo::version, &PluginInfo::toolchain);
REVEAL(LossEntry, &LossEntry::name, &LossEntry::sum, &LossEntry::count, &LossEntry::weight);
REVEAL(ForwardContext, &ForwardContext::dtype, &ForwardContext::state, &ForwardContext::grad, &ForwardContext::training,
       &ForwardContext::step, &ForwardContext::seed, &ForwardContext::values_, &ForwardContext::memo_, &ForwardContext::losses_);
REVEAL(Module, &Module::name_, &Module::items_);
REVEAL(LayerContext, &LayerContext::name, &LayerContext::hidden, &LayerContext::index, &LayerContext::layers,
       &LayerContext::init_std, &LayerContext::residual_init_std, &LayerContext::norm, &LayerContext::norm_epsilon,
       &LayerContext::bias, &LayerContext::dropout, &LayerContext::longest);
REVEAL(Score, &Score::logprob, &Score::logsumexp, &Score::entropy);
REVEAL(Call, &Call::block, &Call::reads, &Call::writes, &Call::recompute);
REVEAL(Linear, &nn::Linear::weight_, &nn::Linear::bias_);
REVEAL(Norm, &nn::Norm::weight_, &nn::Norm::bias_, &nn::Norm::epsilon_, &nn::Norm::rms_);
REVEAL(Embedding, &nn::Embedding::weight_);
REVEAL(AttentionShape, &ops::AttentionShape::heads, &ops::AttentionShape::kv_heads, &ops::AttentionShape::head_size,
       &ops::AttentionShape::scale);
REVEAL(HeadScore, &ops::HeadScore::logprob, &ops::HeadScore::logsumexp, &ops::HeadScore::entropy, &ops::HeadScore::objective);
REVEAL(StateSpec, &StateSpec::kind, &StateSpec::name, &StateSpec::shape);
REVEAL(PagedKV, &PagedKV::k, &PagedKV::v, &PagedKV::blocks, &PagedKV::lengths, &PagedKV::page);
REVEAL(StateDecl, &StateDecl::name, &StateDecl::dtype);
REVEAL(UpdateItem, &UpdateItem::parameter, &UpdateItem::value, &UpdateItem::grad, &UpdateItem::state);
REVEAL(UpdateContext, &UpdateContext::device, &UpdateContext::step, &UpdateContext::lr_scale, &UpdateContext::grad_scale);
REVEAL(Box, &Box::begin, &Box::extent);
REVEAL(SavedTensor, &SavedTensor::name, &SavedTensor::dtype, &SavedTensor::global_shape, &SavedTensor::box, &SavedTensor::data,
       &SavedTensor::bytes, &SavedTensor::xxh3, &SavedTensor::file, &SavedTensor::file_offset);
REVEAL(SamplingParams, &SamplingParams::temperature, &SamplingParams::top_k, &SamplingParams::top_p, &SamplingParams::min_p,
       &SamplingParams::seed, &SamplingParams::max_tokens, &SamplingParams::stop, &SamplingParams::logprobs);
REVEAL(Request, &Request::id, &Request::prompt, &Request::sampling);
REVEAL(Completion, &Completion::id, &Completion::tokens, &Completion::text, &Completion::finish, &Completion::logprobs);

std::string layouts() {
  return LAYOUT(Dims, Dims) + LAYOUT(Storage, Storage) + LAYOUT(Tensor, Tensor) + LAYOUT(Cost, Cost) +
         LAYOUT(OpRecord, OpRecord) + LAYOUT(Device, Device) + LAYOUT(OpScope, OpScope) + LAYOUT(Edge, Edge) +
         LAYOUT(Node, Node) + LAYOUT(Leaf, Leaf) + LAYOUT(Deferred, Deferred) + LAYOUT(DeferredItem, Deferred::Item) +
         LAYOUT(Space, Space) + LAYOUT(Batch, Batch) + LAYOUT(Rng, Rng) + LAYOUT(Segment, Segment) + LAYOUT(Init, Init) +
         LAYOUT(ParameterSpec, ParameterSpec) + LAYOUT(Parameter, Parameter) + LAYOUT(OptionSpec, OptionSpec) +
         LAYOUT(Schema, Schema) + LAYOUT(Options, Options) + LAYOUT(PluginChoice, PluginChoice) +
         LAYOUT(PluginInfo, PluginInfo) + SIZE(PluginError) + SIZE(Registrar) + SIZE(Error) + LAYOUT(LossEntry, LossEntry) +
         LAYOUT(ForwardContext, ForwardContext) + LAYOUT(Module, Module) + SIZE(Block) + SIZE(Layer) + SIZE(LayerMaker) +
         SIZE(Head) + SIZE(Model) + LAYOUT(LayerContext, LayerContext) + LAYOUT(Score, Score) + LAYOUT(Call, Call) +
         LAYOUT(Linear, nn::Linear) + LAYOUT(Norm, nn::Norm) + LAYOUT(Embedding, nn::Embedding) +
         LAYOUT(AttentionShape, ops::AttentionShape) + LAYOUT(HeadScore, ops::HeadScore) + LAYOUT(StateSpec, StateSpec) +
         LAYOUT(PagedKV, PagedKV) + SIZE(SequenceState) + LAYOUT(StateDecl, StateDecl) + LAYOUT(UpdateItem, UpdateItem) +
         LAYOUT(UpdateContext, UpdateContext) + SIZE(Optimizer) + LAYOUT(Box, Box) + LAYOUT(SavedTensor, SavedTensor) +
         SIZE(CheckpointFormat) + SIZE(Tokenizer) + LAYOUT(SamplingParams, SamplingParams) + LAYOUT(Request, Request) +
         LAYOUT(Completion, Completion) + SIZE(InferenceEngine);
}

std::string vtables() {
  return VTABLE(Registrar, &Registrar::add, &Registrar::make, &Registrar::choice) +
         VTABLE(Device, &Device::kind, &Device::allocate, &Device::release, &Device::bytes_reserved, &Device::cpu) +
         VTABLE(Node, &Node::name, &Node::backward, &Node::release) +
         VTABLE(Module) +
         VTABLE(Block, &Block::forward, &Block::state) +
         VTABLE(Layer, &Layer::forward, &Layer::state, &Layer::apply) +
         VTABLE(LayerMaker, &LayerMaker::make) +
         VTABLE(Head, &Head::forward, &Head::state, &Head::score, &Head::logits, &Head::vocabulary) +
         VTABLE(Model, &Model::calls, &Model::head, &Model::vocabulary, &Model::hidden, &Model::longest, &Model::describe) +
         VTABLE(SequenceState, &SequenceState::append, &SequenceState::slot, &SequenceState::truncate, &SequenceState::commit,
                &SequenceState::fork, &SequenceState::weights_version) +
         VTABLE(Optimizer, &Optimizer::state_of, &Optimizer::atomicity, &Optimizer::peak_lr, &Optimizer::update) +
         VTABLE(CheckpointFormat, &CheckpointFormat::name, &CheckpointFormat::extension, &CheckpointFormat::write_shard,
                &CheckpointFormat::read, &CheckpointFormat::write_index) +
         VTABLE(Tokenizer, &Tokenizer::name, &Tokenizer::vocabulary, &Tokenizer::end_of_document, &Tokenizer::encode,
                &Tokenizer::decode, &Tokenizer::splits_anywhere) +
         VTABLE(InferenceEngine, &InferenceEngine::attach, &InferenceEngine::submit, &InferenceEngine::step,
                &InferenceEngine::finished);
}

/// Numbers that both sides must spell alike.
std::string enumerators() {
  std::string text;
  const auto add = [&](const char* name, auto... values) {
    text += name;
    ((text += " " + std::to_string(static_cast<int>(values))), ...);
    text += " of " + std::to_string(sizeof(std::common_type_t<decltype(values)...>)) + "\n";
  };
  add("Fault", Fault::input, Fault::runtime, Fault::programming);
  add("DType", DType::f64, DType::f32, DType::bf16, DType::f16, DType::f8e4m3, DType::f8e5m2, DType::i32, DType::i64, DType::u8,
      DType::boolean);
  add("DeviceKind", DeviceKind::meta, DeviceKind::cpu, DeviceKind::cuda);
  add("Part", Part::input, Part::weight, Part::both);
  add("Role", Role::matrix, Role::embedding, Role::head, Role::vector, Role::bias, Role::router, Role::conv, Role::state);
  add("Init::Kind", Init::Kind::zeros, Init::Kind::ones, Init::Kind::normal, Init::Kind::uniform);
  add("StateSpec::Kind", StateSpec::Kind::paged, StateSpec::Kind::slot, StateSpec::Kind::window);
  add("Atomicity", Atomicity::element, Atomicity::row, Atomicity::block, Atomicity::tensor);
  using Type = OptionSpec::Type;
  add("OptionSpec::Type", Type::flag, Type::integer, Type::number, Type::text, Type::path, Type::integers, Type::numbers,
      Type::texts, Type::paths, Type::plugin, Type::plugins, Type::group, Type::groups);
  return text;
}

/// The table of epoch `golden_epoch`.
constexpr std::uint32_t golden_epoch = 0;
constexpr const char* golden = R"(
)";

TEST(Abi, LayoutsAreThoseOfTheEpoch) {
  const std::string now = "\n" + layouts() + vtables() + enumerators();
  EXPECT_EQ(now, golden)
      << "A type that plugins see has changed: libraries built before would compute nonsense. Raise core_epoch in\n"
         "core/include/capstan/plugin.h, then update this table and golden_epoch in " << __FILE__ << " to what was found.\n"
         "Found:\n" << now;
}

TEST(Abi, EpochIsThatOfTheTable) {
  EXPECT_EQ(core_epoch, golden_epoch) << "core_epoch was raised: check the table above it in " << __FILE__
                                      << " and set golden_epoch.";
}

// What the macro writes must be what the host reads.
TEST(Abi, PluginInfoNeverChanges) {
  EXPECT_EQ(sizeof(PluginInfo), 204u);
  EXPECT_EQ(offsetof(PluginInfo, core_epoch), 12u);
  EXPECT_EQ(offsetof(PluginInfo, kind), 20u);
  EXPECT_EQ(offsetof(PluginInfo, name), 36u);
  EXPECT_EQ(offsetof(PluginInfo, version), 84u);
  EXPECT_EQ(offsetof(PluginInfo, toolchain), 108u);
}

}  // namespace
}  // namespace capstan
