#include "train/session.h"

#include "base/cuda_device.h"
#include "base/look.h"
#include "checkpoint/loader.h"
#include "comm/gpu_world.h"
#include "data/indexed_dataset.h"
#include "data/inputs.h"
#include "pipeline/stages.h"
#include "launch/launch.h"
#include "recipe/mesh_schema.h"
#include "recipe/run_schema.h"
#include "tensor/too_large.h"
#include "train/precision.h"
#include "train/state_tensors.h"

#include <kernels/backend.h>
#include <kernels/queue.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <numeric>
#include <optional>
#include <stdexcept>

namespace capstan::train {

EngineOptions Session::engine_options(bool gradients) const {
  EngineOptions e;
  e.compute = dtype_from(options().group("precision").text("compute"));
  e.linear = linear_precision(options());
  e.seed = static_cast<std::uint64_t>(options().group("run").integer("seed"));
  e.gradients = gradients;
  e.recompute = options().group("train").text("recompute") == "block";
  const Options& mesh_options = options().group("mesh");
  const std::string& strategy = mesh_options.text("strategy");
  e.sharding = Sharding::of(strategy == "ddp" ? Strategy::ddp : strategy == "zero1" ? Strategy::zero1 : strategy == "zero2" ? Strategy::zero2 : Strategy::fsdp);
  if (mesh_options.text("accumulate") == "whole") e.sharding.gradient = false;
  e.reshard_after_forward = mesh_options.flag("reshard_after_forward");
  e.prefetch = mesh_options.flag("prefetch");
  if (mesh_options.text("reduce") == "bf16") e.reduce = DType::bf16;
  const std::string& graphs = options().group("run").text("cuda_graphs");
  e.recording = graphs == "off" ? Recording::off : graphs == "on" ? Recording::required : Recording::automatic;
  return e;
}

void Session::cut_into_stages(EngineOptions& e) const {
  const Options& p = options().group("mesh").group("pipeline");
  e.pipeline.kind = pipeline::schedule_kind(p.text("schedule"));
  e.pipeline.ranks = mesh->size("pp");
  e.pipeline.stages_per_rank = static_cast<int>(p.integer("stages_per_rank"));
  const Options& data = options().group("data");
  const std::int64_t micro = data.integer("micro_batch") > 0 ? data.integer("micro_batch") : data.integer("batch_size");
  const std::vector<pipeline::CallCost> costs = pipeline::call_costs(*make_model(), micro, data.integer("sequence_length"), e.compute, e.recompute);
  e.stage_of_call = pipeline::cut_into_stages(costs, e.pipeline.stages(), where_stages());
}

std::string Session::where_stages() const {
  const Options& mesh_options = options().group("mesh");
  const Options& p = mesh_options.group("pipeline");
  return p.integer("stages_per_rank") > 1 ? p.where("stages_per_rank") : mesh_options.where("pp");
}

bool Session::pipeline_cuts_batches() const {
  return mesh && mesh->size("pp") > 1 && options().group("mesh").group("pipeline").integer("microbatches") > 0;
}

std::int64_t Session::micro_batch() const {
  const Options& data = options().group("data");
  const std::int64_t given = data.integer("micro_batch"), ranks = mesh ? mesh->data_ranks() : 1;
  const std::int64_t local = (data.integer("batch_size") + ranks - 1) / ranks;
  if (!pipeline_cuts_batches()) return given > 0 ? std::min(given, local) : local;
  const std::int64_t pieces = options().group("mesh").group("pipeline").integer("microbatches");
  return std::max<std::int64_t>(1, (local + pieces - 1) / pieces);
}

std::shared_ptr<Model> Session::make_model() const { return host->make_as<Model>(options().plugin("model")); }

std::string Session::run_folder() const {
  const std::string& dir = options().group("run").path("dir");
  if (!dir.empty()) return dir;
  return (std::filesystem::path("runs") / std::filesystem::path(recipe.path).stem()).string();
}

Options Session::kept_options() const {
  return with_path(options(), "run", "dir", std::filesystem::absolute(run_folder()).lexically_normal().string());
}

namespace {

/// run.device and run.gpus on this rank. All ranks or none compute on GPUs.
std::shared_ptr<Device> device_of(const Options& run, int threads, World& world) {
  const std::string& device = run.text("device");
  if (device == "cpu") return make_cpu_device(threads);
  const std::string problem = cuda_problem();
  std::int64_t can = problem.empty() ? 1 : 0;
  if (world.size() > 1) {
    std::vector<int> all(static_cast<std::size_t>(world.size()));
    std::iota(all.begin(), all.end(), 0);
    world.make("who has a GPU", all)->all_reduce(&can, 1, DType::i64, Reduction::min).wait();
  }
  if (can != 0) {
    std::vector<std::int64_t> gpus = run.integers("gpus");
    if (gpus.empty()) {
      gpus.resize(static_cast<std::size_t>(cuda_device_count()));
      std::iota(gpus.begin(), gpus.end(), 0);
    }
    return make_cuda_device(static_cast<int>(gpus[static_cast<std::size_t>(world.local_rank()) % gpus.size()]), threads);
  }
  if (device == "cuda") run.refuse("device", problem.empty() ? "another rank's host has no GPU to use: its message says what is missing there" : problem);
  return make_cpu_device(threads);
}

GpuCommunication communication_of(const Options& mesh) {
  const std::string& choice = mesh.text("gpu_communication");
  return choice == "nccl" ? GpuCommunication::nccl : choice == "staged" ? GpuCommunication::staged : GpuCommunication::automatic;
}

/// run.gemm_choice, where there is a GPU to follow it.
std::string choose_products(const Session& s) {
  const Options& run = s.options().group("run");
  if (s.device->kind() != DeviceKind::cuda) return "";
  if (run.text("gemm_choice") == "heuristic") return "cuBLASLt's first proposals";
  const std::string& named = run.path("gemm_file");
  const std::string file = !named.empty() ? named : (std::filesystem::path(s.run_folder()) / "products.txt").string();
  try {
    return s.device->backend().queue()->tune_products(file);
  } catch (const std::runtime_error& e) {
    run.refuse("gemm_file", e.what());
  }
}

}  // namespace

std::unique_ptr<Session> open_session(const std::string& recipe, const std::vector<std::string>& overrides,
                                      const std::string& executable, Placement placement, std::shared_ptr<World> world) {
  auto s = std::make_unique<Session>();
  s->world = world ? std::move(world) : make_single_world();
  s->host = std::make_unique<PluginHost>(executable);
  s->recipe = load_recipe(recipe, overrides, run_schema(), *s->host);
  check_run_options(s->options());
  s->tokenizer = s->host->make_as<Tokenizer>(s->options().plugin("tokenizer"));
  const PluginChoice& model = s->options().plugin("model");
  const Schema& schema = s->host->schema("model", model.name, std::filesystem::path(recipe).parent_path().string());
  if (schema.find("vocabulary") != nullptr && model.options.integer("vocabulary") == 0) {
    // The resolved recipe says the number, so that a run folder stands on its own.
    std::vector<std::string> more = overrides;
    more.push_back("model.vocabulary=" + std::to_string(s->tokenizer->vocabulary()));
    s->recipe = load_recipe(recipe, more, run_schema(), *s->host);
  }
  if (s->world->size() > 1) s->mesh = std::make_shared<Mesh>(s->world, mesh_from(s->options(), s->world->size()));
  else if (placement != Placement::weights) mesh_from(s->options(), 1);  // a mesh that asks for more ranks is refused
  // Weights alone, to write text, are whole on their one rank: the mesh is of how the run was trained.
  const Options& run = s->options().group("run");
  s->device = device_of(run, launch::threads_of_rank(static_cast<int>(run.integer("threads")), s->world->local_size()), *s->world);
  if (s->mesh && s->device->kind() == DeviceKind::cuda) {
    GpuRanks gpus = make_gpu_world(s->world, s->device, communication_of(s->options().group("mesh")));
    s->mesh->use_data_world(std::move(gpus.world));
    s->communication = std::move(gpus.words);
  }
  s->model = s->make_model();
  if (placement == Placement::none) check_precision(*s, false);
  if (s->model->vocabulary() < s->tokenizer->vocabulary()) {
    const bool option = schema.find("vocabulary") != nullptr;
    fail(Fault::input, option ? s->options().plugin("model").options.where("vocabulary") : s->options().where("model"),
         "the model's vocabulary is smaller than the tokenizer's (" + s->options().plugin("tokenizer").name + "): expected " +
             std::to_string(s->tokenizer->vocabulary()) + " tokens or more, got " + std::to_string(s->model->vocabulary()) +
             (option ? "; 0 takes the tokenizer's" : "; choose a tokenizer that this model knows"));
  }
  if (placement != Placement::none) place(*s, placement);
  return s;
}

void place(Session& s, Placement placement) {
  if (placement != Placement::weights) check_precision(s, placement == Placement::gradients);  // what writes text has no fp8
  s.products = choose_products(s);
  if (s.device->kind() == DeviceKind::cuda) gpu_of(*s.device).allow_any_order(s.options().group("run").text("attention_backward") == "free");
  EngineOptions e = s.engine_options(placement == Placement::gradients);
  if (s.mesh && s.mesh->size("pp") > 1) s.cut_into_stages(e);
  with_sizes_of(s.options(), [&] { s.engine = std::make_unique<Engine>(s.model, s.device, std::move(e), s.mesh); });
}

void check_lengths(const Session& session) {
  const Options& data = session.options().group("data");
  const std::int64_t length = data.integer("sequence_length"), samples = session.micro_batch(), most = INT32_MAX / length;
  if (session.model->longest() > 0 && length > session.model->longest())
    data.refuse("sequence_length", "the model's context is " + std::to_string(session.model->longest()) + " tokens");
  if (samples <= most) return;
  const std::string why = "a microbatch of " + std::to_string(samples) + " samples of " + std::to_string(length) + " tokens has more than 2^31 - 1 rows: ";
  const Options& pipeline = session.options().group("mesh").group("pipeline");
  if (session.pipeline_cuts_batches()) pipeline.refuse("microbatches", why + "ask for more microbatches");
  data.refuse(data.integer("micro_batch") > 0 ? "micro_batch" : "batch_size", why + "set data.micro_batch to at most " + std::to_string(most));
}

void with_sizes_of(const Options& recipe, const std::function<void()>& work) {
  try {
    work();
  } catch (const TooLarge& e) {
    fail(Fault::input, recipe.where("model"), std::string(e.what()) + ": expected a smaller model, or smaller data.batch_size, data.micro_batch or data.sequence_length");
  }
}

SetProblem problem_of_set(const Options& set, std::span<const Options> ahead) {
  const std::string& prefix = set.path("path");
  const std::vector<std::string>& text = set.texts("text");
  if (!is_there(prefix + ".idx")) {
    for (const Options& other : ahead) {
      if (text.empty() || other.path("path") != prefix) continue;
      const std::string folder = data::folder_of(prefix), why = fmt::format("two sets at {} name different ", prefix), remedy = "; give one of them another `path`";
      if (!data::same_inputs(other.texts("text"), folder, text, folder))
        return {"text", fmt::format("{}text: {} and {}{}", why, fmt::join(other.texts("text"), ", "), fmt::join(text, ", "), remedy)};
      if (other.integer("max_bytes") != set.integer("max_bytes"))
        return {"max_bytes", fmt::format("{}limits: {} and {}{}", why, other.integer("max_bytes"), set.integer("max_bytes"), remedy)};
    }
    if (!text.empty()) return {};
    return {"path", "there is no dataset " + prefix + ".idx, and `text` names nothing to build it from: run `capstan data build --out " + prefix + " FILES...`"};
  }
  const std::optional<data::Sidecar> note = data::Sidecar::read(prefix);
  if (text.empty() || !note || note->named.empty()) return {};
  const std::string remedy = "; to build it again remove " + prefix + ".idx, .bin and .json, to keep both give this one another `path`";
  if (!data::same_inputs(note->named, note->folder, text, data::folder_of(prefix)))
    return {"text", "the dataset " + prefix + " was built from other text: expected " + fmt::format("{}", fmt::join(note->named, ", ")) + ", got " +
                        fmt::format("{}", fmt::join(text, ", ")) + remedy};
  if (note->max_bytes != set.integer("max_bytes"))
    return {"max_bytes", fmt::format("the dataset {} was built with another limit: expected {}, got {} (0: all text){}", prefix, note->max_bytes, set.integer("max_bytes"), remedy)};
  return {};
}

std::int64_t load_weights(Session& session, const std::string& run_folder, std::int64_t step, const std::function<void(const std::string&)>& report) {
  const std::vector<NamedTensor> tensors = session.engine->tensors(false);
  const std::vector<checkpoint::Wanted> wanted = wanted_tensors(tensors, master_type(session.engine->options().compute));
  const checkpoint::FormatMaker maker = format_maker(*session.host);
  checkpoint::LoadOptions load;
  load.leave_unread = {"optimizer/"};
  const std::filesystem::path root = std::filesystem::path(run_folder) / "checkpoints";
  std::int64_t found = 0;
  if (step >= 0) {
    const std::filesystem::path folder = root / checkpoint::step_name(step);
    if (!is_there(folder)) fail(Fault::input, folder.string(), "there is no checkpoint of step " + std::to_string(step) + ": `capstan checkpoint info " + run_folder + "` lists those that there are");
    found = checkpoint::load(folder, wanted, maker, load).step;
  } else {
    const auto loaded = checkpoint::load_newest(root, wanted, maker, checkpoint::OnDamage::fall_back, report, load);
    if (!loaded) fail(Fault::input, root.string(), "there is no checkpoint: train first, with checkpoint.at_end or checkpoint.every_steps");
    found = loaded->step;
  }
  session.engine->publish();
  return found;
}

}  // namespace capstan::train
