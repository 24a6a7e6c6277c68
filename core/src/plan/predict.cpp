// Memory, traffic and time of a step over many ranks, on paper.
#include "plan/predict.h"

#include "mesh/mesh.h"
#include "parallel/meta_batch.h"
#include "pipeline/simulate.h"
#include "pipeline/stages.h"
#include "plan/paper_world.h"
#include "plan/timing.h"

#include <capstan/batch.h>
#include <capstan/error.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <utility>

namespace capstan::plan {

namespace {

/// Some of a model's calls, for an engine that holds no more.
class Part final : public Model {
 public:
  Part(std::shared_ptr<Model> whole, const std::vector<int>& calls) : whole_(std::move(whole)) {
    for (const int c : calls) calls_.push_back(whole_->calls()[static_cast<std::size_t>(c)]);
  }
  const std::vector<Call>& calls() const override { return calls_; }
  Head& head(std::string_view name) override { return whole_->head(name); }
  std::int64_t vocabulary() const override { return whole_->vocabulary(); }
  std::int64_t hidden() const override { return whole_->hidden(); }
  std::int64_t longest() const override { return whole_->longest(); }
  std::string describe() const override { return whole_->describe(); }

 private:
  std::shared_ptr<Model> whole_;
  std::vector<Call> calls_;
};

Memory state_memory(const Sources& sources, const Setting& setting, int pipeline_rank, std::vector<int> calls) {
  // Its slice of the mesh, and an engine of its calls alone.
  std::vector<MeshAxis> axes = setting.layout.axes();
  for (MeshAxis& a : axes)
    if (a.name == "pp") a.size = 1;
  const int world = setting.layout.world() / setting.size("pp");
  const std::shared_ptr<Device> meta = make_meta_device();
  const std::shared_ptr<Mesh> mesh = world > 1 ? std::make_shared<Mesh>(make_paper_world(0, world), MeshLayout::make(axes, world)) : nullptr;
  Memory m;
  m.pipeline_rank = pipeline_rank;
  m.calls = std::move(calls);
  Engine engine(std::make_shared<Part>(sources.model(), m.calls), meta, setting.engine, mesh);
  engine.attach(sources.optimizer());
  m.engine = engine.memory();
  if (setting.staging)
    for (const NamedTensor& t : engine.tensors(true, true)) m.staging += t.value.bytes();
  return m;
}

/// Bytes that some calls keep, and the most that one of them needs beside while it runs.
struct Room { std::int64_t kept = 0, beside = 0, logits = 0; };

Room room_of(const Profile& profile, const std::vector<int>& calls) {
  Room room;
  for (const int index : calls) {
    const CallProfile& c = profile.calls[static_cast<std::size_t>(index)];
    const std::int64_t most = std::max(c.forward_room - c.kept, c.backward_room);
    room.kept += c.kept;
    room.beside = std::max(room.beside, most);
    if (c.head) room.logits = std::max(room.logits, most);
  }
  return room;
}

/// One rank with all calls: the walk itself says what was held at once.
void add_activations(Memory& m, const Profile& profile) {
  m.logits = room_of(profile, m.calls).logits;
  m.activations = std::max<std::int64_t>(0, profile.peak - m.logits);
}

/// A row of a pipeline's table: what is kept from forwards whose backward is still to come, and what the action needs.
void add_activations(Memory& m, const Profile& profile, const std::vector<pipeline::Action>& row, const std::vector<std::vector<int>>& cut, int live) {
  m.live = live;
  m.logits = room_of(profile, m.calls).logits;
  std::int64_t held = 0, most = 0;
  for (const pipeline::Action& a : row) {
    if (!a.computes()) continue;
    const Room room = room_of(profile, cut[static_cast<std::size_t>(a.stage)]);
    if (a.kind == pipeline::ActionKind::forward) held += room.kept;
    most = std::max(most, held + room.beside);
    if (a.kind == pipeline::ActionKind::backward || a.kind == pipeline::ActionKind::weight) held -= room.kept;
  }
  m.activations = std::max<std::int64_t>(0, profile.base + most - m.logits);
}

/// Units as the engine makes them: each parameter is in that of its first call. Elements per call, padded to the pieces.
struct Units {
  std::vector<double> elements;              // per unit
  std::vector<std::vector<int>> of_call;     // units whose parameters a call uses
};

Units units_of(const Profile& profile, const std::vector<int>& calls, int pieces) {
  Units units;
  std::map<std::string, int> unit_of;
  for (const int index : calls) {
    std::int64_t size = 0;
    const int next = static_cast<int>(units.elements.size());
    std::vector<int> used;
    for (const auto& p : profile.calls[static_cast<std::size_t>(index)].parameters) {
      const auto [at, fresh] = unit_of.try_emplace(p.name, next);
      if (fresh) size += Unit::round_up(p.numel);
      if (std::find(used.begin(), used.end(), at->second) == used.end()) used.push_back(at->second);
    }
    if (size > 0) units.elements.push_back(static_cast<double>(Unit::round_up((size + pieces - 1) / pieces) * pieces));
    units.of_call.push_back(std::move(used));
  }
  return units;
}

/// Adds up what is sent, by axes, purpose and collective.
class Tally {
 public:
  void add(const std::string& axes, const std::string& what, Collective c, const GroupShape& group, double calls, double bytes, double seconds, double exposed) {
    if (group.size <= 1 || calls <= 0) return;
    for (Traffic& t : all_) {
      if (t.axes != axes || t.what != what || t.collective != c) continue;
      t.calls += calls, t.bytes += calls * DeviceModel::sent(c, bytes, group), t.seconds += calls * seconds, t.exposed += exposed;
      return;
    }
    all_.push_back({axes, what, c, group, calls, calls * DeviceModel::sent(c, bytes, group), calls * seconds, exposed});
  }
  std::vector<Traffic>& all() { return all_; }

 private:
  std::vector<Traffic> all_;
};

/// A stage's walk over one microbatch, and what gathers and scatters of state cost beside it.
struct StageTimes {
  double forward = 0, backward = 0, weight = 0;  // seconds; weight is a part of backward
  double first_gather = 0, last_scatter = 0;     // that nothing is beside
};

constexpr const char* state_axes = "shard+context";

class Stage {
 public:
  Stage(const Profile& profile, const Setting& setting, const DeviceModel* device, const Assumptions& assumptions, std::vector<int> calls)
      : profile_(profile), setting_(setting), device_(device), assumptions_(assumptions), calls_(std::move(calls)),
        units_(units_of(profile, calls_, setting.pieces())),
        group_(group_shape(setting.layout, state_axes, device != nullptr ? device->per_host : 8)) {}

  const std::vector<int>& calls() const { return calls_; }
  double elements() const { return std::accumulate(units_.elements.begin(), units_.elements.end(), 0.0); }

  /// One microbatch's forward and backward; counts its traffic `times` times.
  StageTimes walk(Tally& tally, double times, double scatters) {
    StageTimes result;
    const Sharding& sharding = setting_.engine.sharding;
    const bool gathers = sharding.parameter && group_.size > 1, scatter = sharding.gradient && group_.size > 1 && scatters > 0;
    const double wide = static_cast<double>(size_of(setting_.engine.compute));
    const auto n = static_cast<int>(calls_.size());
    std::set<int> held;
    // Bytes of the units that call i needs and are not there.
    const auto missing = [&](int i) {
      double bytes = 0;
      if (i < 0 || i >= n) return bytes;
      for (const int u : units_.of_call[static_cast<std::size_t>(i)])
        if (!held.contains(u)) bytes += units_.elements[static_cast<std::size_t>(u)] * wide;
      return bytes;
    };
    /// After call i: its units go, but for those that call `next` needs.
    const auto drop = [&](int i, int next) {
      for (const int u : units_.of_call[static_cast<std::size_t>(i)]) {
        const bool stays = next >= 0 && next < n && std::count(units_.of_call[static_cast<std::size_t>(next)].begin(), units_.of_call[static_cast<std::size_t>(next)].end(), u) > 0;
        if (!stays) held.erase(u);
      }
    };
    const auto hold = [&](int i) {
      if (i >= 0 && i < n) held.insert(units_.of_call[static_cast<std::size_t>(i)].begin(), units_.of_call[static_cast<std::size_t>(i)].end());
    };
    const auto seconds_of = [&](Collective c, double bytes) { return device_ != nullptr && bytes > 0 ? device_->collective(c, bytes, group_) : 0.0; };
    // Compute with communication beside it: slower while both run, and never shorter than what it waits for.
    const auto copied = [&](double bytes) { return device_ != nullptr && assumptions_.unit_copies ? device_->streaming(0, bytes, 1) : 0.0; };
    const auto beside = [&](double compute, double comm) {
      if (device_ == nullptr) return 0.0;
      return std::max(compute + (device_->slowdown() - 1) * std::min(compute, comm), comm);
    };
    const double grad_wide = setting_.engine.compute == DType::f64 ? 8 : static_cast<double>(size_of(setting_.engine.reduce));

    double gathered = 0, gather_seconds = 0, gather_calls = 0, gather_exposed = 0;
    double scattered = 0, scatter_seconds = 0, scatter_calls = 0, scatter_exposed = 0;
    const auto note_gather = [&](double bytes, double seconds, double exposed) {
      if (bytes <= 0) return;
      gathered += bytes, gather_seconds += seconds, gather_calls += 1, gather_exposed += exposed;
    };
    const auto times_of = [&](int i) {
      return device_ != nullptr ? call_times(profile_.calls[static_cast<std::size_t>(calls_[static_cast<std::size_t>(i)])], profile_, setting_, *device_, assumptions_) : CallTimes{};
    };
    const bool ahead = setting_.engine.prefetch;

    if (gathers) {
      const double bytes = missing(0), seconds = seconds_of(Collective::all_gather, bytes);
      note_gather(bytes, seconds, seconds);
      result.first_gather = seconds;
      hold(0);
    }
    for (int i = 0; i < n; ++i) {
      CallTimes t = times_of(i);
      double comm = 0;
      if (gathers) {
        const double bytes = missing(i + 1);
        t.forward += copied(2 * bytes);
        comm = seconds_of(Collective::all_gather, bytes);
        const double total = ahead ? beside(t.forward, comm) : t.forward + comm;
        note_gather(bytes, comm, std::max(0.0, total - t.forward));
        hold(i + 1);
        if (setting_.engine.reshard_after_forward && i + 1 < n) drop(i, i + 1);  // the last stays for its backward
        result.forward += total;
      } else {
        result.forward += t.forward;
      }
      result.forward += t.forward_wait;
    }
    double pending = 0;  // seconds of a scatter that waits for compute to hide it
    for (int i = n - 1; i >= 0; --i) {
      CallTimes t = times_of(i);
      double comm = pending;
      double bytes = 0, gather_time = 0;
      if (gathers) {
        bytes = missing(i - 1), gather_time = seconds_of(Collective::all_gather, bytes);
        t.backward += copied(2 * bytes + (scatter ? bytes / wide * (wide + grad_wide) : 0));
        hold(i - 1);
      }
      double total = ahead ? beside(t.backward, comm + gather_time) : beside(t.backward, comm) + gather_time;
      const double exposed = std::max(0.0, total - t.backward), both = comm + gather_time;
      if (bytes > 0) note_gather(bytes, gather_time, both > 0 ? exposed * gather_time / both : 0);
      if (pending > 0) scatter_exposed += both > 0 ? exposed * pending / both : 0;
      result.backward += total + t.backward_wait;
      result.weight += t.weight;
      pending = 0;
      if (scatter) {
        double elements = 0;
        for (const int u : units_.of_call[static_cast<std::size_t>(i)]) elements += units_.elements[static_cast<std::size_t>(u)];
        if (elements > 0) {
          pending = seconds_of(Collective::reduce_scatter, elements * grad_wide);
          scattered += elements * grad_wide, scatter_seconds += pending, scatter_calls += 1;
        }
      }
      if (gathers) drop(i, i - 1);
    }
    result.last_scatter = pending;
    if (gather_calls > 0)
      tally.add(state_axes, "parameters", Collective::all_gather, group_, gather_calls * times, gathered / gather_calls, gather_seconds / gather_calls, gather_exposed * times);
    if (scatter_calls > 0)
      tally.add(state_axes, "gradients", Collective::reduce_scatter, group_, scatter_calls * scatters, scattered / scatter_calls, scatter_seconds / scatter_calls,
                scatter_exposed * scatters + result.last_scatter);
    return result;
  }

  /// Rows and keys that calls send inside.
  void inner(Tally& tally, double times) {
    for (const int index : calls_) {
      const CallProfile& c = profile_.calls[static_cast<std::size_t>(index)];
      for (const auto* records : {&c.forward, &c.backward})
        for (const OpRecord& r : *records) {
          const auto t = inner_traffic(r);
          if (!t) continue;
          const GroupShape group = group_shape(setting_.layout, t->axes, device_ != nullptr ? device_->per_host : 8);
          const double bytes = t->bytes / t->calls * group.size / (group.size - 1);
          const double seconds = device_ != nullptr ? device_->collective(t->collective, bytes, group) : 0;
          tally.add(t->axes, t->what, t->collective, group, t->calls * times, bytes, seconds, assumptions_.overlap_tensor ? 0 : t->calls * times * seconds);
        }
    }
  }

 private:
  const Profile& profile_;
  const Setting& setting_;
  const DeviceModel* device_;
  const Assumptions& assumptions_;
  std::vector<int> calls_;
  Units units_;
  GroupShape group_;
};

/// What comes after the last microbatch: reductions that waited for it, the norm, the update, new parameters for all.
struct Tail { double optimizer = 0, wait = 0, beside = 0; };

Tail tail_of(const Stage& stage, const Memory& memory, const Setting& setting, const DeviceModel* device, const Assumptions& assumptions, const StageTimes& walk, Tally& tally) {
  Tail tail;
  const int per_host = device != nullptr ? device->per_host : 8;
  const GroupShape state = group_shape(setting.layout, state_axes, per_host), copies = group_shape(setting.layout, "replicate", per_host);
  const Sharding& sharding = setting.engine.sharding;
  const bool f64 = setting.engine.compute == DType::f64;
  const DType reduce = setting.engine.reduce == DType::f32 ? assumptions.gradients : setting.engine.reduce;
  const double elements = stage.elements(), grad_wide = f64 ? 8 : static_cast<double>(size_of(reduce)), wide = static_cast<double>(size_of(setting.engine.compute));
  double hideable = walk.backward;  // compute of the last backward that reductions may hide behind
  const auto after = [&](const std::string& axes, const char* what, Collective c, const GroupShape& group, double bytes, bool overlap, double& room) {
    if (group.size <= 1) return;
    const double seconds = device != nullptr ? device->collective(c, bytes, group) : 0;
    const double hidden = overlap ? std::min(seconds, room) : 0;
    room -= hidden;
    tail.wait += seconds - hidden;
    if (device != nullptr) tail.beside += hidden * (device->slowdown() - 1);
    tally.add(axes, what, c, group, 1, bytes, seconds, seconds - hidden);
  };
  if (!sharding.gradient)
    after(state_axes, "gradients", sharding.optimizer ? Collective::reduce_scatter : Collective::all_reduce, state, elements * grad_wide, assumptions.overlap_gradients, hideable);
  const double piece = sharding.optimizer ? elements / state.size : elements;
  after("replicate", "gradients", Collective::all_reduce, copies, piece * grad_wide, assumptions.overlap_gradients, hideable);
  double forward_room = walk.forward;
  if (sharding.optimizer && !sharding.parameter)
    after(state_axes, "parameters", Collective::all_gather, state, elements * wide, assumptions.overlap_parameters, forward_room);
  if (device == nullptr) return tail;
  // The norm reads gradients; the update reads and writes masters and states, reads gradients and writes working copies.
  const EngineMemory& e = memory.engine;
  const double gradients = sharding.gradient || !sharding.optimizer ? double(e.gradients) : double(e.gradients) / state.size;
  const double working = double(e.masters) / (f64 ? 8 : 4) * (setting.engine.compute == DType::bf16 && !sharding.parameter ? 2 : 0);
  tail.optimizer = device->streaming(0, gradients, 1) + device->streaming(0, 2 * double(e.masters) + 2 * double(e.optimizer) + gradients + working, double(stage.calls().size()));
  const GroupShape world = group_shape(setting.layout, "pp+replicate+shard+context+tensor", per_host);
  tail.wait += device->collective(Collective::all_reduce, 8, world);
  return tail;
}

}  // namespace

GroupShape group_shape(const MeshLayout& layout, const std::string& axes, int per_host) {
  // Ranks of the group of rank 0: row-major, so that hosts are runs of neighbouring ranks.
  GroupShape shape;
  std::map<int, int> hosts;
  int size = 1;
  std::vector<std::pair<int, int>> strides;  // of the group's axes: size, distance in ranks
  int stride = 1;
  for (auto a = layout.axes().rbegin(); a != layout.axes().rend(); stride *= a->size, ++a)
    if (("+" + axes + "+").find("+" + a->name + "+") != std::string::npos && a->size > 1) strides.emplace_back(a->size, stride), size *= a->size;
  for (int i = 0; i < size; ++i) {
    int left = i, rank = 0;
    for (const auto& [n, distance] : strides) rank += left % n * distance, left /= n;
    ++hosts[rank / per_host];
  }
  shape.size = size, shape.hosts = static_cast<int>(hosts.size());
  for (const auto& [host, count] : hosts) shape.per_host = std::max(shape.per_host, count);
  return shape;
}

std::vector<std::vector<int>> cut_stages(const Profile& profile, int stages, const std::string& where) {
  constexpr double flop_per_byte = 100;  // as call_costs() takes it
  std::vector<pipeline::CallCost> costs;
  for (const CallProfile& c : profile.calls) {
    const auto sum = [](const std::vector<OpRecord>& records) {
      double cost = 0;
      for (const OpRecord& r : records) cost += std::max(r.cost.flop, flop_per_byte * (r.cost.read + r.cost.write));
      return cost;
    };
    costs.push_back({sum(c.forward), sum(c.backward), 0});
  }
  const std::vector<int> stage = pipeline::cut_into_stages(costs, stages, where);
  std::vector<std::vector<int>> cut(static_cast<std::size_t>(stages));
  for (std::size_t c = 0; c < stage.size(); ++c) cut[static_cast<std::size_t>(stage[c])].push_back(static_cast<int>(c));
  return cut;
}

/// Bytes of a batch as the data comes.
std::int64_t batch_bytes(std::int64_t sequences, std::int64_t length) {
  const std::shared_ptr<Device> meta = make_meta_device();
  const Batch batch = parallel::meta_batch(*meta, sequences, length);
  return meta->bytes_held();
}

Prediction predict(const Sources& sources, const Setting& setting, const DeviceModel* device, const Assumptions& assumptions) {
  Prediction p;
  const Profile profile = profile_model(sources.model, setting);
  const int pp = setting.size("pp"), stages = pp > 1 ? setting.pipeline.stages() : 1;
  std::vector<std::vector<int>> cut = cut_stages(profile, stages, setting.where_stages);
  if (pp > 1 && setting.engine.stage_of_call.size() == profile.calls.size()) {  // as the session says
    for (auto& calls : cut) calls.clear();
    for (std::size_t c = 0; c < profile.calls.size(); ++c) cut.at(static_cast<std::size_t>(setting.engine.stage_of_call[c])).push_back(static_cast<int>(c));
  }
  const auto microbatches = static_cast<int>(setting.microbatches);
  p.parameters = profile.parameters;
  p.microbatches = setting.microbatches;
  p.tokens = double(setting.sequences) * double(setting.length);

  pipeline::Schedule schedule;
  std::vector<int> live(static_cast<std::size_t>(pp), 1);
  if (pp > 1) {
    schedule = pipeline::make_schedule(setting.pipeline, microbatches);
    live = pipeline::simulate(schedule).live;
  }
  // What a forward keeps, its second run aside.
  double flop = 0;
  for (const CallProfile& c : profile.calls) {
    const double forward = flop_of(c.forward), backward = flop_of(c.backward);
    flop += forward + backward - (setting.engine.recompute && !c.head ? forward : 0);
  }
  p.model_flop_per_token = flop * setting.size("tensor") / profile.rows;

  // Memory: of each rank of the pipeline, and of its ends alone when there are many.
  for (int r = 0; r < pp; ++r) {
    if (pp > 32 && r > 1 && r < pp - 2) continue;
    std::vector<int> calls;
    for (int s = r; s < stages; s += pp) calls.insert(calls.end(), cut[static_cast<std::size_t>(s)].begin(), cut[static_cast<std::size_t>(s)].end());
    Memory m = state_memory(sources, setting, r, std::move(calls));
    const bool one_at_a_time = setting.engine.sharding.parameter && setting.pieces() > 1 && setting.engine.reshard_after_forward;
    for (const int c : m.calls) {
      const std::int64_t bytes = profile.calls[static_cast<std::size_t>(c)].quantized;
      m.quantized = one_at_a_time ? std::max(m.quantized, bytes) : m.quantized + bytes;
    }
    if (pp == 1) add_activations(m, profile);
    else add_activations(m, profile, schedule.rows[static_cast<std::size_t>(r)], cut, live[static_cast<std::size_t>(r)]);
    if (r == 0 && setting.sampled_tokens > 0) {
      const bool shared = pp > 1 || setting.size("tensor") > 1 || (setting.engine.sharding.parameter && setting.pieces() > 1);
      m.sampling = setting.sampled_tokens * profile.state_bytes + (shared ? profile.parameters * size_of(setting.engine.compute) : 0);
    }
    if (setting.validation > 0) {
      const std::int64_t mine = (setting.validation + setting.data_ranks() - 1) / setting.data_ranks();
      m.validation = mine * batch_bytes(setting.validation_micro, setting.length) + profile.evaluation;
      if (r == 0) m.bigram = setting.bigram_bytes;
    }
    p.memory.push_back(std::move(m));
  }
  for (std::size_t i = 0; i < p.memory.size(); ++i)
    if (p.memory[i].total() > p.memory[p.worst].total()) p.worst = i;

  // Traffic and time by pipeline rank; the one that has most to do speaks for all.
  const double count = static_cast<double>(setting.microbatches);
  const double scatters = setting.accumulate_whole ? 1 : count;
  pipeline::Costs costs;
  costs.forward.clear(), costs.input.clear(), costs.weight.clear();
  double most_work = -1, most_tail = 0;
  for (const Memory& m : p.memory) {
    Tally tally;
    double work = 0, bytes = 0;
    StageTimes sum;
    Stage all(profile, setting, device, assumptions, m.calls);
    for (int s = m.pipeline_rank; s < stages; s += pp) {
      Stage stage(profile, setting, device, assumptions, cut[static_cast<std::size_t>(s)]);
      const StageTimes t = stage.walk(tally, count, scatters);
      stage.inner(tally, count);
      sum.forward += t.forward, sum.backward += t.backward, sum.weight += t.weight;
      sum.first_gather += t.first_gather, sum.last_scatter += t.last_scatter;
      work += count * (t.forward + t.backward + t.first_gather) + t.last_scatter;
    }
    const Tail tail = tail_of(all, m, setting, device, assumptions, sum, tally);
    if (pp > 1) {
      const GroupShape pair = group_shape(setting.layout, "pp", device != nullptr ? device->per_host : 8);
      const double h = profile.rows / setting.size("tensor") * profile.hidden * double(size_of(setting.engine.compute));
      const double sends = count * (stages / pp) * (m.pipeline_rank == 0 || m.pipeline_rank == pp - 1 ? (stages > pp ? 2 : 1) : 2);
      GroupShape two{2, pair.per_host > 1 ? 1 : 2, pair.per_host > 1 ? 2 : 1};
      tally.add("pp", "activations", Collective::send, two, sends, h, device != nullptr ? device->collective(Collective::send, h, two) : 0, 0);
    }
    for (const Traffic& t : tally.all()) bytes += t.bytes;
    work = device != nullptr ? work + tail.wait + tail.optimizer + tail.beside : bytes;
    if (work > most_work) {
      most_work = work;
      p.traffic = tally.all();
      p.exposed = 0;
      for (const Traffic& t : p.traffic) p.exposed += t.exposed;
      p.optimizer = tail.optimizer;
      double rank_flop = 0;
      for (const int c : m.calls) rank_flop += flop_of(profile.calls[static_cast<std::size_t>(c)].forward) + flop_of(profile.calls[static_cast<std::size_t>(c)].backward);
      p.rank_flop = rank_flop * count;
    }
    most_tail = std::max(most_tail, tail.wait + tail.optimizer + tail.beside + (pp > 1 ? sum.last_scatter : 0));
  }
  if (device == nullptr) return p;
  p.timed = true;
  if (pp == 1) {
    p.step = most_work;
  } else {
    for (int s = 0; s < stages; ++s) {
      Tally ignored;
      Stage stage(profile, setting, device, assumptions, cut[static_cast<std::size_t>(s)]);
      const StageTimes t = stage.walk(ignored, 1, scatters / count);
      costs.forward.push_back(t.forward + t.first_gather);
      costs.input.push_back(t.backward - t.weight);
      costs.weight.push_back(t.weight);
    }
    const GroupShape pair = group_shape(setting.layout, "pp", device->per_host);
    const GroupShape two{2, pair.per_host > 1 ? 1 : 2, pair.per_host > 1 ? 2 : 1};
    costs.latency = device->collective(Collective::send, profile.rows / setting.size("tensor") * profile.hidden * double(size_of(setting.engine.compute)), two);
    const pipeline::Simulation sim = pipeline::simulate(schedule, costs);
    p.bubble = sim.bubble;
    p.step = sim.makespan + most_tail;
  }
  p.compute = std::max(0.0, p.step * (1 - p.bubble) - p.exposed);
  p.tokens_per_rank = p.tokens / p.step / setting.layout.world();
  p.share_of_peak = p.model_flop_per_token * p.tokens_per_rank / device->peak(setting.engine.compute);
  return p;
}

}  // namespace capstan::plan
