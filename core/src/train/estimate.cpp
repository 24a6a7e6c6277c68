#include "train/estimate.h"

#include "base/short_bytes.h"
#include "data/bigram.h"
#include "parallel/meta_batch.h"

#include <capstan/error.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <filesystem>
#include <string>

namespace capstan::train {

bool saves_from_a_copy(const Options& options) {
  const Options& c = options.group("checkpoint");
  return c.flag("asynchronous") && (c.integer("every_steps") > 0 || c.number("every_minutes") > 0 || c.flag("at_end"));
}

std::int64_t sampled_tokens(const Session& session) {
  if (session.options().group("train").integer("sample_every") == 0) return 0;
  const PluginChoice& engine = session.options().plugin("inference");
  const std::string folder = std::filesystem::path(session.recipe.path).parent_path().string();
  if (session.host->schema("inference", engine.name, folder).find("max_tokens_held") == nullptr) return 0;  // it does not say
  const std::int64_t held = engine.options.integer("max_tokens_held");
  // Pages are made for all requests that could run at once, none longer than the model's context.
  const bool batches = session.host->schema("inference", engine.name, folder).find("max_batch") != nullptr;
  return session.model->longest() > 0 && batches ? std::min(held, engine.options.integer("max_batch") * session.model->longest()) : held;
}

std::int64_t state_bytes_per_token(const Model& model, DType compute) {
  std::int64_t bytes = 0;
  for (const StateSpec& s : model.state())
    if (s.kind == StateSpec::Kind::paged) bytes += 2 * s.shape.product() * size_of(compute);
  return bytes;
}

Validation validation_of(const Session& session, std::int64_t micro_batch) {
  const Options& data = session.options().group("data");
  const Options& train = session.options().group("train");
  if (train.integer("validate_every") == 0 || data.number("validation") == 0) return {};
  Validation v;
  v.samples = micro_batch;
  v.microbatches = (train.integer("validate_batches") * data.integer("batch_size") + v.samples - 1) / v.samples;
  v.bigram_bytes = data::bigram_bytes(session.tokenizer->vocabulary());
  constexpr std::int64_t row = 3 * sizeof(std::int32_t) + sizeof(std::int64_t);  // of data::Rows: token, target, weight, id
  if (v.bigram_bytes > 0) v.bigram_bytes += row * v.microbatches * v.samples * data.integer("sequence_length");
  return v;
}

namespace {

Estimate estimate(const Session& session) {
  const Options& data = session.options().group("data");
  const std::int64_t batch_size = data.integer("batch_size"), length = data.integer("sequence_length");
  const std::int64_t micro = session.micro_batch();
  const std::shared_ptr<Device> meta = make_meta_device();
  const EngineOptions options = session.engine_options(true);
  Engine engine(session.make_model(), meta, options);
  engine.attach(session.host->make_as<Optimizer>(session.options().plugin("optimizer")));
  Estimate e;
  e.parameters = engine.parameters();
  e.weights_bytes = meta->bytes_held();
  if (saves_from_a_copy(session.options()))
    for (const NamedTensor& t : engine.tensors(true)) e.staging_bytes += t.value.bytes();
  e.sampling_bytes = sampled_tokens(session) * state_bytes_per_token(engine.model(), options.compute);
  const Batch batch = parallel::meta_batch(*meta, micro, length);
  meta->reset_peak();
  meta->record(true);
  engine.forward_backward(batch, 1);
  const double flop = meta->total_cost().flop;
  e.step_flop = flop * static_cast<double>(batch_size) / static_cast<double>(micro);
  for (const OpRecord& r : meta->ledger())
    if (r.name.starts_with("linear fp8")) e.fp8_flop += r.cost.flop * static_cast<double>(batch_size) / static_cast<double>(micro);
  for (const Parameter* p : engine.model().parameters()) e.quantized_bytes += p->derived_bytes();
  e.activations_bytes = meta->bytes_peak() - e.weights_bytes - e.quantized_bytes;
  e.model_flop_per_token = flop / static_cast<double>(micro * length);
  if (const Validation v = validation_of(session, session.micro_batch()); v.microbatches > 0) {
    const std::int64_t before = meta->bytes_held();
    const Batch another = parallel::meta_batch(*meta, v.samples, length);
    const std::int64_t batch_bytes = meta->bytes_held() - before;
    meta->reset_peak();
    engine.evaluate(another);
    e.validation_bytes = batch_bytes * v.microbatches + std::max(meta->bytes_peak() - before - batch_bytes, v.bigram_bytes);
  }
  if (options.recompute) {  // model FLOPs leave the second forward out
    EngineOptions plain = options;
    plain.recompute = false;
    const std::shared_ptr<Device> again = make_meta_device();
    Engine straight(session.make_model(), again, plain);
    const Batch b = parallel::meta_batch(*again, micro, length);
    again->record(true);
    straight.forward_backward(b, 1);
    e.model_flop_per_token = again->total_cost().flop / static_cast<double>(micro * length);
  }
  return e;
}

}  // namespace

Estimate estimate_step(const Session& session) {
  Estimate e;
  with_sizes_of(session.options(), [&] { e = estimate(session); });
  return e;
}

std::string describe_memory(const Estimate& e, bool shared) {
  const auto words = [](std::int64_t bytes) { return short_bytes(static_cast<double>(bytes)); };
  std::string text = words(e.total_bytes()) + ": " + words(e.weights_bytes) + " weights, gradients and optimizer, ";
  if (e.quantized_bytes > 0) text += words(e.quantized_bytes) + " weights in fp8, ";
  text += words(e.activations_bytes) + " activations";
  if (e.staging_bytes > 0) text += ", " + words(e.staging_bytes) + " to write checkpoints from";
  if (e.sampling_bytes > 0) text += ", " + words(e.sampling_bytes) + " between steps for samples";
  if (e.validation_bytes > 0) text += ", " + words(e.validation_bytes) + " between steps for validation";
  return shared ? text + "; the mesh shares it: `capstan recipe check RECIPE --ranks N` says what a rank has" : text;
}

void check_memory(const Session& session, const Estimate& e, const std::function<void(const std::string&)>& warn) {
  struct sysinfo host{};
  if (::sysinfo(&host) != 0) return;
  const auto there = static_cast<std::int64_t>(host.totalram + host.totalswap) * static_cast<std::int64_t>(host.mem_unit);
  const auto words = [](std::int64_t bytes) { return short_bytes(static_cast<double>(bytes)); };
  if (e.weights_bytes > there)
    fail(Fault::input, session.recipe.path, "the weights, gradients and optimizer take " + words(e.weights_bytes) + ", and this host has " + words(there) +
                                                ": expected a smaller model, an optimizer with less state, or ranks on other hosts that share it (mesh.shard)");
  if (e.total_bytes() > there)
    warn("this run is estimated to take " + words(e.total_bytes()) + ", and this host has " + words(there) +
         ": data.micro_batch, train.recompute=block and checkpoint.asynchronous=false lower it");
}

}  // namespace capstan::train
