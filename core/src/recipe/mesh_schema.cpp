// The `mesh` block: its keys, what contradicts what, and the layout over the ranks of a job.
#include "recipe/mesh_schema.h"

#include "recipe/options_impl.h"

#include <fmt/format.h>

#include <string>
#include <vector>

namespace capstan {
namespace {

constexpr int most_ranks = 1 << 24;
constexpr const char* axis_names[] = {"pp", "replicate", "shard", "context", "tensor"};

Schema pipeline_group() {
  Schema s;
  s.text("schedule", "1f1b",
         "order of forwards and backwards over the stages: what fills the bubble, and what memory it takes")
      .one_of({"1f1b", "gpipe", "interleaved", "zero_bubble"});
  s.integer("microbatches", 0,
            "microbatches of one step that are on their way through the stages; 0: as data.micro_batch cuts them")
      .range(0, 1 << 24);
  s.integer("stages_per_rank", 1, "stages that each rank holds; interleaved needs 2 or more").range(1, 1024);
  return s;
}

bool is_given(const Options& mesh, const std::string& name) {
  const auto& specs = mesh.impl().schema->options();
  for (std::size_t i = 0; i < specs.size(); ++i)
    if (specs[i].name == name) return mesh.impl().slots[i].origin.kind != Origin::Kind::default_value;
  return false;
}

}  // namespace

Schema mesh_schema() {
  Schema s;
  s.integer("pp", 1, "pipeline ranks: each holds a run of the model's blocks").in("ranks").range(1, most_ranks);
  s.integer("replicate", 1, "copies of the sharded model, each with samples of its own (the outer axis of HSDP)")
      .in("ranks")
      .range(1, most_ranks);
  s.integer("shard", -1,
            "ranks that share the model's state, each with samples of its own; -1: all that the other axes leave")
      .in("ranks")
      .range(-1, most_ranks);
  s.integer("context", 1, "ranks that share the tokens of each sequence, and the model's state as `shard` does")
      .in("ranks")
      .range(1, most_ranks);
  s.integer("tensor", 1, "ranks that share each matrix product: heads, inner width, vocabulary; and the tokens between them")
      .in("ranks")
      .range(1, most_ranks);
  s.text("strategy", "fsdp",
         "what is cut over shard x context; fsdp: parameters, gradients and optimizer state; zero2: the last two; zero1: "
         "optimizer "
         "state; ddp: nothing")
      .one_of({"fsdp", "zero2", "zero1", "ddp"});
  s.flag("reshard_after_forward", true,
         "fsdp: drop gathered parameters after the forward and gather them again; false: keep them, more memory");
  s.text("reduce", "f32",
         "type that gradients are sent in; sums are f32 either way. Under precision.compute=f64 all of it is f64")
      .one_of({"f32", "bf16"});
  s.text(
       "accumulate", "scatter",
       "fsdp and zero2; scatter: reduce after each microbatch, least memory; whole: once at the end of the step, least sent")
      .one_of({"scatter", "whole"});
  s.text("gpu_communication", "auto",
         "how ranks on GPUs reach each other; nccl: NCCL, a GPU for each rank; staged: copies through host memory, which ranks "
         "that share a GPU need; auto: nccl where each rank has a GPU of its own, else staged")
      .one_of({"auto", "nccl", "staged"});
  s.flag("prefetch", true, "fsdp: gather the next block's parameters while this one computes");
  s.number("timeout_seconds", 60, "how long a rank is waited for before the job ends with its name")
      .in("seconds")
      .range(0.1, 86400);
  s.integer("check_every", 100, "compare the parameters that ranks should hold alike every so many steps and before each save; 0: never")
      .in("steps")
      .at_least(0);
  s.group("pipeline", pipeline_group(), "how microbatches go through the stages when pp > 1");
  return s;
}

void check_mesh_options(const Options& options) {
  const Options& mesh = options.group("mesh");
  if (mesh.integer("shard") == 0)
    mesh.refuse("shard", "out of range: expected 1 or more, or -1 for what the other axes leave, got 0");
  if (mesh.text("reduce") == "bf16" && options.group("precision").text("compute") == "f64")
    mesh.refuse(
        "reduce",
        "gradients of precision.compute=f64 are sent as f64: leave mesh.reduce out, or choose another precision.compute");
  const std::string& strategy = mesh.text("strategy");
  if (mesh.text("accumulate") == "whole" && (strategy == "ddp" || strategy == "zero1"))
    mesh.refuse(
        "accumulate",
        fmt::format("mesh.strategy={} keeps whole gradients to the end of the step by itself: leave mesh.accumulate out, "
                    "or choose fsdp or zero2",
                    strategy));
  const Options& pipeline = mesh.group("pipeline");
  const std::string& schedule = pipeline.text("schedule");
  const std::int64_t stages = pipeline.integer("stages_per_rank");
  if (schedule == "interleaved" && stages < 2)
    pipeline.refuse("schedule",
                    "interleaved goes round the ranks more than once: set pipeline.stages_per_rank to 2 or more");
  if ((schedule == "1f1b" || schedule == "gpipe") && stages > 1)
    pipeline.refuse("stages_per_rank",
                    fmt::format("schedule={} has one stage on each rank: expected 1, got {}; or choose schedule=interleaved",
                                schedule, stages));
}

MeshLayout mesh_from(const Options& options, int world) {
  const Options& mesh = options.group("mesh");
  std::vector<MeshAxis> axes;
  for (const char* name : axis_names) axes.push_back({name, static_cast<int>(mesh.integer(name))});
  if (const auto fault = MeshLayout::check(axes, world)) {
    // The line is that of a key which somebody wrote.
    std::string at = fault->axis.empty() ? "shard" : fault->axis;
    if (!is_given(mesh, at))
      for (const char* name : axis_names)
        if (is_given(mesh, name)) at = name;
    mesh.refuse(at, fault->message);
  }
  return MeshLayout::make(std::move(axes), world);
}

}  // namespace capstan
