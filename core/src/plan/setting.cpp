// From a recipe to what a plan needs, and what to change when it does not fit.
#include "plan/setting.h"

#include "recipe/mesh_schema.h"
#include "train/estimate.h"

#include <capstan/error.h>

#include <algorithm>
#include <functional>
#include <utility>

namespace capstan::plan {

namespace {

std::int64_t up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

/// Microbatches of a rank that has `local` sequences of a step.
void share(Setting& s, std::int64_t micro_batch, std::int64_t pipeline_microbatches) {
  const std::int64_t local = up(s.sequences, s.data_ranks());
  s.micro = micro_batch > 0 ? std::min(micro_batch, local) : local;
  if (pipeline_microbatches > 0 && s.size("pp") > 1) s.micro = up(local, std::min(pipeline_microbatches, local));
  s.microbatches = up(local, s.micro);
}

}  // namespace

Setting setting_from(const train::Session& session, int ranks) {
  const Options& options = session.options();
  const Options& data = options.group("data");
  const Options& mesh = options.group("mesh");
  Setting s;
  s.layout = mesh_from(options, ranks);
  s.engine = session.engine_options(true);
  s.accumulate_whole = mesh.text("accumulate") == "whole";
  s.sequences = data.integer("batch_size"), s.length = data.integer("sequence_length");
  if (s.sequences < s.data_ranks())
    data.refuse("batch_size", "a step has " + std::to_string(s.sequences) + " sequences for " + std::to_string(s.data_ranks()) +
                                  " data ranks (mesh.replicate x mesh.shard): expected at least one each; or give ranks to mesh.context, mesh.tensor or mesh.pp");
  s.pipeline.kind = pipeline::schedule_kind(mesh.group("pipeline").text("schedule"));
  s.pipeline.ranks = s.size("pp");
  s.pipeline.stages_per_rank = static_cast<int>(mesh.group("pipeline").integer("stages_per_rank"));
  s.where_stages = session.where_stages();
  share(s, data.integer("micro_batch"), mesh.group("pipeline").integer("microbatches"));
  s.staging = train::saves_from_a_copy(options);
  s.sampled_tokens = train::sampled_tokens(session);
  const train::Validation validation = train::validation_of(session, s.micro);
  if (validation.microbatches > 0) s.validation = validation.microbatches, s.validation_micro = validation.samples, s.bigram_bytes = validation.bigram_bytes;
  return s;
}

Sources sources_from(const train::Session& session) {
  return {[&session] { return session.make_model(); }, [&session] { return session.host->make_as<Optimizer>(session.options().plugin("optimizer")); }};
}

std::vector<Advice> advise(const Sources& sources, const Setting& setting, double memory) {
  std::vector<Advice> all;
  const auto attempt = [&](std::string key, const std::function<void(Setting&)>& change) {
    Setting s = setting;
    change(s);
    const Prediction p = predict(sources, s, nullptr);
    const double bytes = static_cast<double>(p.memory[p.worst].total());
    all.push_back({std::move(key), bytes, bytes <= memory});
  };
  if (!setting.engine.recompute) attempt("train.recompute=block", [](Setting& s) { s.engine.recompute = true; });
  for (std::int64_t micro = setting.micro / 2; micro >= 1; micro /= 2) {
    attempt("data.micro_batch=" + std::to_string(micro), [&](Setting& s) { share(s, micro, 0); });
    if (all.back().fits) break;
  }
  if (!setting.engine.recompute && setting.micro > 1)
    attempt("train.recompute=block data.micro_batch=1", [](Setting& s) { s.engine.recompute = true, share(s, 1, 0); });
  if (setting.pieces() > 1 && !setting.engine.sharding.parameter)
    attempt("mesh.strategy=fsdp", [](Setting& s) { s.engine.sharding = Sharding::of(Strategy::fsdp); });
  if (setting.staging) attempt("checkpoint.asynchronous=false", [](Setting& s) { s.staging = false; });
  // Ranks move from `shard`, where there are enough, to the axes that cut activations.
  for (const char* axis : {"tensor", "context"}) {
    for (int by = 2; by <= 8; by *= 2) {
      std::vector<MeshAxis> axes = setting.layout.axes();
      const auto of = [&](std::string_view name) { return std::find_if(axes.begin(), axes.end(), [&](const MeshAxis& a) { return a.name == name; }); };
      const auto to = of(axis), from = of("shard");
      if (to == axes.end() || from == axes.end() || from->size % by != 0) break;
      to->size *= by, from->size /= by;
      if (to->size > 8 && to->name == "tensor") break;  // beyond a host
      const std::string key = "mesh." + to->name + "=" + std::to_string(to->size);
      try {
        attempt(key, [&](Setting& s) { s.layout = MeshLayout::make(axes, setting.layout.world()), share(s, setting.micro, 0); });
      } catch (const Error&) {
        break;  // the model cannot be cut so
      }
      if (all.back().fits) break;
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const Advice& a, const Advice& b) { return std::pair(!a.fits, a.bytes) < std::pair(!b.fits, b.bytes); });
  return all;
}

}  // namespace capstan::plan
