// Runs one microbatch on the meta device and notes what each call did.
#include "plan/profile.h"

#include "mesh/mesh.h"
#include "ops/linear_fp8.h"
#include "parallel/meta_batch.h"
#include "plan/paper_world.h"
#include "train/estimate.h"

#include <capstan/batch.h>
#include <capstan/walk.h>

#include <algorithm>
#include <utility>

namespace capstan::plan {

Profile profile_model(const ModelMaker& make, const Setting& setting) {
  const std::shared_ptr<Device> meta = make_meta_device();
  const int tensor = setting.size("tensor"), context = setting.size("context");
  const MeshLayout layout = MeshLayout::make({{"pp", 1}, {"replicate", 1}, {"shard", 1}, {"context", context}, {"tensor", tensor}}, context * tensor);
  EngineOptions options = setting.engine;
  options.sharding = {};
  const std::shared_ptr<Mesh> mesh = layout.world() > 1 ? std::make_shared<Mesh>(make_paper_world(0, layout.world()), layout) : nullptr;
  const std::shared_ptr<Model> model = make();
  const Engine engine(model, meta, options, mesh);
  Profile profile;
  profile.parameters = engine.parameters();
  profile.state_bytes = train::state_bytes_per_token(*model, options.compute);
  profile.hidden = static_cast<double>(model->hidden());
  profile.length = static_cast<double>(setting.length);
  for (const Call& call : model->calls()) {
    CallProfile c;
    c.name = call.block->name();
    c.head = dynamic_cast<const Head*>(call.block) != nullptr;
    for (const Parameter* p : call.block->parameters()) {
      const Dims& local = p->local().shape();
      c.parameters.push_back({p->name(), local.product()});
      if (p->spec().linear && ops::fits_fp8(options.linear, local)) c.quantized += ops::fp8_form(*p, options.linear).bytes();
      const bool table = p->role() == Role::embedding && !c.head;  // rows are looked up, not multiplied
      if (local.size() == 2 && !table) c.matrices.push_back({static_cast<double>(local[0]), static_cast<double>(local[1])});
      for (const auto& segments : p->spec().dims)
        for (const Segment& s : segments)
          if (s.axis == "heads" && s.width > 1) profile.head_size = static_cast<double>(s.width);
    }
    profile.calls.push_back(std::move(c));
  }

  const std::int64_t weights = meta->bytes_held();
  const Batch batch = parallel::meta_batch(*meta, setting.micro, setting.length, context, tensor);
  profile.rows = static_cast<double>(batch.space().capacity);
  profile.base = meta->bytes_held() - weights;
  ForwardContext run(batch, *meta, options.compute);
  run.grad = run.training = true;
  run.mesh = mesh.get();
  run.linear = options.linear;
  meta->record(true);
  std::int64_t before = 0, peak = 0;
  const auto of = [&](const Call& call) -> CallProfile& { return profile.calls[static_cast<std::size_t>(&call - model->calls().data())]; };
  WalkHooks hooks;
  hooks.before = [&](const Call&, WalkStep::Kind) {
    peak = std::max(peak, meta->bytes_peak());
    meta->reset_peak();
    meta->clear_ledger();
    before = meta->bytes_held();
  };
  hooks.after = [&](const Call& call, WalkStep::Kind step) {
    CallProfile& c = of(call);
    const std::int64_t room = meta->bytes_peak() - before;
    if (step == WalkStep::forward) {
      c.forward = meta->ledger();
      c.kept = std::max<std::int64_t>(0, meta->bytes_held() - before);
      c.forward_room = room;
    } else {
      c.backward = meta->ledger();
      c.backward_room = std::max<std::int64_t>(0, room);
    }
  };
  forward_backward(*model, run, hooks, options.recompute);
  profile.peak = std::max(peak, meta->bytes_peak()) - weights;
  if (setting.validation > 0) {
    const Batch more = parallel::meta_batch(*meta, setting.validation_micro, setting.length, context, tensor);
    ForwardContext look(more, *meta, options.compute);
    look.mesh = mesh.get();
    look.linear = options.linear;
    const std::int64_t held = meta->bytes_held();
    meta->reset_peak();
    run_forward(*model, look, true);
    profile.evaluation = meta->bytes_peak() - held;
  }
  return profile;
}

}  // namespace capstan::plan
