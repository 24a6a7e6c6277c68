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
#include <capstan/paged_state.h>
#include <capstan/plugin.h>
#include <capstan/recorded.h>
#include <capstan/tokenizer.h>
#include <capstan/walk.h>

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
REVEAL(Edge, &Edge::node, &Edge::index, &Edge::dtype, &Edge::shape);
REVEAL(Node, &Node::inputs, &Node::outputs, &Node::released, &Node::readers);
REVEAL(Leaf, &Leaf::hook, &Leaf::parameter_, &Leaf::filled_, &Leaf::uses_, &Leaf::grad_);
REVEAL(Deferred, &Deferred::items);
REVEAL(DeferredItem, &Deferred::Item::node, &Deferred::Item::grads);
REVEAL(Space, &Space::name, &Space::starts, &Space::positions, &Space::sample_ids, &Space::host_starts, &Space::past,
       &Space::capacity, &Space::longest, &Space::recorded);
REVEAL(Batch, &Batch::spaces, &Batch::step_weight, &Batch::own_weight, &Batch::streams_);
REVEAL(Rng, &Rng::key_, &Rng::step_);
REVEAL(Segment, &Segment::axis, &Segment::count, &Segment::width, &Segment::part);
REVEAL(Init, &Init::kind, &Init::scale);
REVEAL(ParameterSpec, &ParameterSpec::dims, &ParameterSpec::role, &ParameterSpec::init, &ParameterSpec::trainable,
       &ParameterSpec::persistent, &ParameterSpec::linear);
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
REVEAL(LinearPrecision, &LinearPrecision::kind, &LinearPrecision::gradient);
REVEAL(ForwardContext, &ForwardContext::dtype, &ForwardContext::state, &ForwardContext::grad, &ForwardContext::training,
       &ForwardContext::step, &ForwardContext::seed, &ForwardContext::linear, &ForwardContext::values_, &ForwardContext::memo_, &ForwardContext::losses_);
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
       &ops::AttentionShape::scale, &ops::AttentionShape::window);
REVEAL(HeadScore, &ops::HeadScore::logprob, &ops::HeadScore::logsumexp, &ops::HeadScore::entropy, &ops::HeadScore::objective);
REVEAL(StateSpec, &StateSpec::kind, &StateSpec::name, &StateSpec::shape);
REVEAL(PagedKV, &PagedKV::k, &PagedKV::v, &PagedKV::blocks, &PagedKV::lengths, &PagedKV::page);
REVEAL(PagedCapacity, &PagedCapacity::sequences, &PagedCapacity::rows, &PagedCapacity::pages);
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
         LAYOUT(LinearPrecision, LinearPrecision) + LAYOUT(ForwardContext, ForwardContext) + LAYOUT(Module, Module) + SIZE(Block) + SIZE(Layer) + SIZE(LayerMaker) +
         SIZE(Head) + SIZE(Model) + LAYOUT(LayerContext, LayerContext) + LAYOUT(Score, Score) + LAYOUT(Call, Call) +
         LAYOUT(Linear, nn::Linear) + LAYOUT(Norm, nn::Norm) + LAYOUT(Embedding, nn::Embedding) +
         LAYOUT(AttentionShape, ops::AttentionShape) + LAYOUT(HeadScore, ops::HeadScore) + LAYOUT(StateSpec, StateSpec) +
         LAYOUT(PagedKV, PagedKV) + SIZE(SequenceState) + SIZE(PagedState) + LAYOUT(PagedCapacity, PagedCapacity) + SIZE(Recorded) + SIZE(WalkHooks) + LAYOUT(StateDecl, StateDecl) + LAYOUT(UpdateItem, UpdateItem) +
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
         VTABLE(Optimizer, &Optimizer::state_of, &Optimizer::atomicity, &Optimizer::peak_lr, &Optimizer::update, &Optimizer::gated) +
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
constexpr std::uint32_t golden_epoch = 7;
constexpr const char* golden = R"(
Dims 56/8: v_@0+48[8] size_@48+4
Storage 56/8: device@0+16 data@16+8 bytes@24+8 owned@32+1 keeper@40+16
Tensor 160/8: storage_@0+16 shape_@16+56 strides_@72+56 offset_@128+8 dtype_@136+1 output_index_@140+4 node_@144+16
Cost 32/8: flop@0+8 read@8+8 write@16+8 comm@24+8
OpRecord 80/8: name@0+32[1] calls@32+8 cost@40+32 seconds@72+8
Device 72/8: held_@24+8 peak_@32+8 recording_@40+1 timed_@41+1 ledger_@48+24[80]
OpScope 72/8: name_@8+16[1] cost_@24+32 start_@56+8 meta_@64+1
Edge 80/8: node@0+16 index@16+4 dtype@20+1 shape@24+56
Node 48/8: inputs@8+24[80] outputs@32+4 released@36+1 readers@40+4
Leaf 248/8: hook@48+32 parameter_@80+1 filled_@81+1 uses_@84+4 grad_@88+160
Deferred 24/8: items@0+24[40]
Deferred::Item 40/8: node@0+16 grads@16+24[160]
Space 600/8: name@0+32[1] starts@32+160 positions@192+160 sample_ids@352+160 host_starts@512+24[4] past@536+24[4] capacity@560+8 longest@568+8 recorded@592+1
Batch 64/8: spaces@0+24[600] step_weight@24+8 own_weight@32+8 streams_@40+24[192]
Rng 16/8: key_@0+8 step_@8+8
Segment 88/8: axis@0+32[1] count@32+8 width@40+8 part@48+32[1]
Init 16/8: kind@0+1 scale@8+8
ParameterSpec 56/8: dims@0+24[24] role@24+1 init@32+16 trainable@48+1 persistent@49+1 linear@50+1
Parameter 320/8: name_@0+32[1] spec_@32+56 local_@88+160 version_@264+8 derived_@272+48[232]
OptionSpec 248/8: name@0+32[1] help@32+32[1] unit@64+32[1] type@96+1 required@97+1 optional@98+1 default_text@104+32[1] minimum@136+16[8] maximum@152+16[8] exclusive_minimum@168+1 allowed@176+24[32] plugin_kind@200+32[1] group@232+16
Schema 24/8: options_@0+24[248]
Options 16/8: impl_@0+16
PluginChoice 80/8: kind@0+32[1] name@32+32[1] options@64+16
PluginInfo 204/4: magic@0+8 size@8+4 core_epoch@12+4 kind_epoch@16+4 kind@20+16 name@36+48 version@84+24 toolchain@108+96
PluginError 1024/1:
Registrar 8/8:
Error 24/8:
LossEntry 208/8: name@0+32[1] sum@32+160 count@192+8 weight@200+8
LinearPrecision 2/1: kind@0+1 gradient@1+1
ForwardContext 224/8: dtype@16+1 state@24+8 grad@32+1 training@33+1 step@40+8 seed@48+8 linear@64+2 values_@72+48[192] memo_@120+48[192] losses_@168+24[208]
Module 64/8: name_@8+32[1] items_@40+24[32]
Block 64/8:
Layer 64/8:
LayerMaker 8/8:
Head 64/8:
Model 24/8:
LayerContext 136/8: name@0+32[1] hidden@32+8 index@40+8 layers@48+8 init_std@56+8 residual_init_std@64+8 norm@72+32[1] norm_epsilon@104+8 bias@112+1 dropout@120+8 longest@128+8
Score 480/8: logprob@0+160 logsumexp@160+160 entropy@320+160
Call 64/8: block@0+8 reads@8+24[32] writes@32+24[32] recompute@56+1
nn::Linear 80/8: weight_@64+8 bias_@72+8
nn::Norm 96/8: weight_@64+8 bias_@72+8 epsilon_@80+8 rms_@88+1
nn::Embedding 72/8: weight_@64+8
ops::AttentionShape 40/8: heads@0+8 kv_heads@8+8 head_size@16+8 scale@24+8 window@32+8
ops::HeadScore 640/8: logprob@0+160 logsumexp@160+160 entropy@320+160 objective@480+160
StateSpec 96/8: kind@0+1 name@8+32[1] shape@40+56
PagedKV 648/8: k@0+160 v@160+160 blocks@320+160 lengths@480+160 page@640+8
SequenceState 8/8:
PagedState 736/8:
PagedCapacity 24/8: sequences@0+8 rows@8+8 pages@16+8
Recorded 64/8:
WalkHooks 64/8:
StateDecl 40/8: name@0+32[1] dtype@32+1
UpdateItem 352/8: parameter@0+8 value@8+160 grad@168+160 state@328+24[160]
UpdateContext 32/8: device@0+8 step@8+8 lr_scale@16+8 grad_scale@24+8
Optimizer 8/8:
Box 48/8: begin@0+24[8] extent@24+24[8]
SavedTensor 176/8: name@0+32[1] dtype@32+1 global_shape@40+24[8] box@64+48 data@112+8 bytes@120+8 xxh3@128+8 file@136+32[1] file_offset@168+8
CheckpointFormat 8/8:
Tokenizer 8/8:
SamplingParams 80/8: temperature@0+8 top_k@8+8 top_p@16+8 min_p@24+8 seed@32+8 max_tokens@40+8 stop@48+24[32] logprobs@72+1
Request 112/8: id@0+8 prompt@8+24[4] sampling@32+80
Completion 120/8: id@0+8 tokens@8+24[4] text@32+32[1] finish@64+32[1] logprobs@96+24[4]
InferenceEngine 8/8:
Registrar::add slot 2 MN7capstan9RegistrarEFvSt17basic_string_viewIcSt11char_traitsIcEES4_RKNS_6SchemaESt8functionIFSt10shared_ptrIvERKNS_7OptionsERS0_EEE
Registrar::make slot 3 MN7capstan9RegistrarEFSt10shared_ptrIvERKNS_12PluginChoiceEE
Registrar::choice slot 4 MN7capstan9RegistrarEFNS_12PluginChoiceESt17basic_string_viewIcSt11char_traitsIcEES5_St4spanIKSt4pairINSt7__cxx1112basic_stringIcS4_SaIcEEESB_ELm18446744073709551615EEE
Registrar slots 5
Device::kind slot 2 MN7capstan6DeviceEKFNS_10DeviceKindEvE
Device::allocate slot 3 MN7capstan6DeviceEFPvlE
Device::release slot 4 MN7capstan6DeviceEDoFvPvlE
Device::bytes_reserved slot 5 MN7capstan6DeviceEKFlvE
Device::cpu slot 7 MN7capstan6DeviceEFRNS_7kernels3cpu7ContextEvE
Device slots 9
Node::name slot 2 MN7capstan4NodeEKFSt17basic_string_viewIcSt11char_traitsIcEEvE
Node::backward slot 3 MN7capstan4NodeEFSt6vectorINS_6TensorESaIS2_EESt4spanIKS2_Lm18446744073709551615EENS_4PartEE
Node::release slot 4 MN7capstan4NodeEFvvE
Node slots 5
Module slots 2
Block::forward slot 2 MN7capstan5BlockEFvRNS_14ForwardContextEE
Block::state slot 3 MN7capstan5BlockEKFSt6vectorINS_9StateSpecESaIS2_EEvE
Block slots 4
Layer::forward slot 2 MN7capstan5LayerEFvRNS_14ForwardContextEE
Layer::state slot 3 MN7capstan5BlockEKFSt6vectorINS_9StateSpecESaIS2_EEvE
Layer::apply slot 4 MN7capstan5LayerEFNS_6TensorERNS_14ForwardContextERKS1_E
Layer slots 5
LayerMaker::make slot 2 MN7capstan10LayerMakerEFSt10shared_ptrINS_5LayerEERKNS_12LayerContextEE
LayerMaker slots 3
Head::forward slot 2 MN7capstan4HeadEFvRNS_14ForwardContextEE
Head::state slot 3 MN7capstan5BlockEKFSt6vectorINS_9StateSpecESaIS2_EEvE
Head::score slot 4 MN7capstan4HeadEFNS_5ScoreERNS_14ForwardContextERKNS_6TensorEPS5_PS4_E
Head::logits slot 5 MN7capstan4HeadEFNS_6TensorERNS_14ForwardContextERKS1_E
Head::vocabulary slot 6 MN7capstan4HeadEKFlvE
Head slots 7
Model::calls slot 2 MN7capstan5ModelEKFRKSt6vectorINS_4CallESaIS2_EEvE
Model::head slot 3 MN7capstan5ModelEFRNS_4HeadESt17basic_string_viewIcSt11char_traitsIcEEE
Model::vocabulary slot 4 MN7capstan5ModelEKFlvE
Model::hidden slot 5 MN7capstan5ModelEKFlvE
Model::longest slot 6 MN7capstan5ModelEKFlvE
Model::describe slot 7 MN7capstan5ModelEKFNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEEvE
Model slots 8
SequenceState::append slot 2 MN7capstan13SequenceStateEFNS_7PagedKVESt17basic_string_viewIcSt11char_traitsIcEERKNS_6TensorES8_E
SequenceState::slot slot 3 MN7capstan13SequenceStateEFNS_6TensorESt17basic_string_viewIcSt11char_traitsIcEEE
SequenceState::truncate slot 4 MN7capstan13SequenceStateEFvllE
SequenceState::commit slot 5 MN7capstan13SequenceStateEFvllE
SequenceState::fork slot 6 MN7capstan13SequenceStateEFllE
SequenceState::weights_version slot 7 MN7capstan13SequenceStateEKFmlE
SequenceState slots 8
Optimizer::state_of slot 2 MN7capstan9OptimizerEKFSt6vectorINS_9StateDeclESaIS2_EERKNS_9ParameterEE
Optimizer::atomicity slot 3 MN7capstan9OptimizerEKFNS_9AtomicityERKNS_9ParameterEE
Optimizer::peak_lr slot 4 MN7capstan9OptimizerEKFdvE
Optimizer::update slot 5 MN7capstan9OptimizerEFvRKNS_13UpdateContextESt4spanINS_10UpdateItemELm18446744073709551615EEE
Optimizer::gated slot 6 MN7capstan9OptimizerEKFbvE
Optimizer slots 7
CheckpointFormat::name slot 2 MN7capstan16CheckpointFormatEKFSt17basic_string_viewIcSt11char_traitsIcEEvE
CheckpointFormat::extension slot 3 MN7capstan16CheckpointFormatEKFSt17basic_string_viewIcSt11char_traitsIcEEvE
CheckpointFormat::write_shard slot 4 MN7capstan16CheckpointFormatEFvRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEESt4spanINS_11SavedTensorELm18446744073709551615EERKSt8functionIFvlEEE
CheckpointFormat::read slot 5 MN7capstan16CheckpointFormatEFvRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEERKNS_11SavedTensorEPvE
CheckpointFormat::write_index slot 6 MN7capstan16CheckpointFormatEFvRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEESt4spanIKNS_11SavedTensorELm18446744073709551615EEE
CheckpointFormat slots 7
Tokenizer::name slot 2 MN7capstan9TokenizerEKFSt17basic_string_viewIcSt11char_traitsIcEEvE
Tokenizer::vocabulary slot 3 MN7capstan9TokenizerEKFlvE
Tokenizer::end_of_document slot 4 MN7capstan9TokenizerEKFivE
Tokenizer::encode slot 5 MN7capstan9TokenizerEKFvSt17basic_string_viewIcSt11char_traitsIcEERSt6vectorIiSaIiEEE
Tokenizer::decode slot 6 MN7capstan9TokenizerEKFNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEESt4spanIKiLm18446744073709551615EEE
Tokenizer::splits_anywhere slot 7 MN7capstan9TokenizerEKFbvE
Tokenizer slots 8
InferenceEngine::attach slot 2 MN7capstan15InferenceEngineEFvSt10shared_ptrINS_5ModelEES1_IKNS_9TokenizerEES1_INS_6DeviceEENS_5DTypeEmE
InferenceEngine::submit slot 3 MN7capstan15InferenceEngineEFvNS_7RequestEE
InferenceEngine::step slot 4 MN7capstan15InferenceEngineEFbRKSt8functionIFvlRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEEEEE
InferenceEngine::finished slot 5 MN7capstan15InferenceEngineEFSt6vectorINS_10CompletionESaIS2_EEvE
InferenceEngine slots 6
Fault 0 1 2 of 1
DType 0 1 2 3 4 5 6 7 8 9 of 1
DeviceKind 0 1 2 of 1
Part 1 2 3 of 1
Role 0 1 2 3 4 5 6 7 of 1
Init::Kind 0 1 2 3 of 1
StateSpec::Kind 0 1 2 of 1
Atomicity 0 1 2 3 of 1
OptionSpec::Type 0 1 2 3 4 5 6 7 8 9 10 11 12 of 1
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
