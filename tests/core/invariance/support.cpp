#include "core/invariance/support.h"

#include "comm/communicator.h"
#include "data/build.h"
#include "data/loader.h"
#include "train/session.h"

#include <capstan/optimizer.h>

#include <gtest/gtest.h>

#include <cstdlib>
#include <deque>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <numeric>
#include <ostream>
#include <stdexcept>
#include <thread>

namespace capstan::invariance {

namespace fs = std::filesystem;

std::string Layout::name() const {
  std::string text;
  const auto add = [&](const char* axis, int size) {
    if (size > 1) text += (text.empty() ? "" : "_") + std::string(axis) + std::to_string(size);
  };
  add("pp", pp), add("replicate", replicate), add("shard", shard), add("context", context), add("tensor", tensor);
  return (text.empty() ? "one" : text) + "_" + strategy;
}

void PrintTo(const Layout& layout, std::ostream* out) { *out << layout.name(); }

std::vector<std::string> Layout::overrides() const {
  return {"mesh.pp=" + std::to_string(pp),           "mesh.replicate=" + std::to_string(replicate), "mesh.shard=" + std::to_string(shard),
          "mesh.context=" + std::to_string(context), "mesh.tensor=" + std::to_string(tensor),       "mesh.strategy=" + strategy};
}

std::vector<Layout> layouts_of(int world) {
  std::vector<Layout> all;
  for (int pp = 1; pp <= world; ++pp)
    for (int replicate = 1; pp * replicate <= world; ++replicate)
      for (int shard = 1; pp * replicate * shard <= world; ++shard)
        for (int context = 1; pp * replicate * shard * context <= world; ++context) {
          const int rest = pp * replicate * shard * context;
          if (world % rest == 0) all.push_back({pp, replicate, shard, context, world / rest});
        }
  return all;
}

std::vector<std::string> forms() { return {"gpt2", "llama", "odd"}; }

std::vector<std::string> overrides_of(const std::string& form) {
  if (form == "gpt2")
    return {"model={plugin: gpt, layers: 6, heads: 4, width: 32, context: 32, vocabulary: 257, activation: gelu, norm: layer, positions: learned, bias: true, "
            "tied: true, dropout: 0.1, ffn: 64}"};
  if (form == "llama")
    return {"model={plugin: gpt, layers: 6, heads: 8, kv_heads: 2, head_size: 4, width: 24, context: 32, vocabulary: 260, tied: false, ffn: 40}"};
  return {"model={plugin: gpt, layers: 6, heads: 6, kv_heads: 3, head_size: 4, width: 20, context: 32, vocabulary: 263, qk_norm: true, tied: true, ffn: 27, dropout: 0.2}"};
}

namespace {

/// A data set of short documents of odd lengths, kept for the whole test program.
class Corpus {
 public:
  Corpus() {
    std::string pattern = (fs::temp_directory_path() / "capstan_invariance_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    folder_ = pattern;
    fs::create_directories(folder_ / "text");
    for (int d = 0; d < 60; ++d) {
      std::string text;
      for (int i = 0; i < 7 + 13 * (d % 9); ++i) text += static_cast<char>('a' + (i * i + 5 * d) % 26);
      std::ofstream(folder_ / "text" / (std::to_string(100 + d) + ".txt")) << text;
    }
    std::ofstream(folder_ / "recipe.yaml") << "model: {plugin: gpt}\n"
                                              "data: {sets: [{path: set}], sequence_length: 24, batch_size: 5, micro_batch: 1, prefetch: 0}\n"
                                              "optimizer: {plugin: adamw, lr: 0.01}\n"
                                              "train: {steps: 30}\n"
                                              "run: {threads: 1}\n";
  }
  ~Corpus() { fs::remove_all(folder_); }
  std::string recipe() const { return (folder_ / "recipe.yaml").string(); }
  std::string prefix() const { return (folder_ / "set").string(); }
  void build(const std::shared_ptr<Tokenizer>& tokenizer) {
    const std::lock_guard lock(mutex_);
    if (built_) return;
    data::BuildOptions build;
    build.inputs = {(folder_ / "text").string()};
    build.prefix = prefix();
    build.tokenizer = tokenizer;
    data::build_dataset(build);
    built_ = true;
  }

 private:
  fs::path folder_;
  std::mutex mutex_;
  bool built_ = false;
};

Corpus& corpus() {
  static Corpus one;
  return one;
}

std::vector<double> values(const Tensor& t) {
  const Tensor d = t.detach().to(DType::f64).contiguous();
  std::vector<double> all(static_cast<std::size_t>(d.numel()));
  d.copy_to_host(all.data(), d.bytes());
  return all;
}

/// What one rank does. Gradients come from whoever has the parameter. `asked`: of queued steps.
void train_rank(train::Session& session, int steps, bool gradients, const Asked* asked, Trained& run, std::mutex& mutex) {
  corpus().build(session.tokenizer);
  Engine& engine = *session.engine;
  engine.attach(session.host->make_as<Optimizer>(session.options().plugin("optimizer")));
  engine.initialize();
  const std::shared_ptr<Mesh> mesh = session.mesh;
  const auto keep = [&](std::map<std::string, std::vector<double>>& to, auto&& tensor_of) {
    for (const Parameter* p : session.model->parameters()) {
      const Tensor t = tensor_of(*p);
      if (!t.defined()) continue;
      const std::lock_guard lock(mutex);
      to.emplace(p->name(), values(t));
    }
  };
  if (gradients || asked) keep(run.initial, [&](const Parameter& p) { return engine.whole_value(p); });

  data::DataOptions d;
  d.sets = {{corpus().prefix(), 1}};
  d.sequence_length = 24, d.batch_size = 5, d.micro_batch = 1, d.prefetch = 0;
  if (mesh) {
    d.ranks = mesh->data_ranks(), d.rank = mesh->data_rank();
    d.sum_over_ranks = [&](double x) {
      mesh->host("replicate+shard", "control").all_reduce(&x, 1, DType::f64).wait();
      return x;
    };
  }
  data::DataSource source(d, {std::string(session.tokenizer->name()), session.tokenizer->vocabulary()}, session.device);
  const auto report = [&](double loss, double norm) {
    if (mesh) mesh->host("pp+replicate+shard+context+tensor", "control").all_reduce(&loss, 1, DType::f64).wait();
    if (session.rank() == 0) run.losses.push_back(loss), run.norms.push_back(norm);
  };
  std::deque<QueuedStep> ahead;
  const auto collect = [&] {
    const StepNumbers n = engine.collect(ahead.front());
    ahead.pop_front();
    if (!n.updated) throw std::runtime_error("a step was held back");
    report(n.loss, n.norm);
  };
  for (int step = 1; step <= steps; ++step) {
    const std::vector<Batch> batches = source.next();
    if (asked) {
      if (*asked) (*asked)(session.rank(), step, false);
      ahead.push_back(engine.queue_step(std::span<const Batch>(batches), step, 1, 1.0));
      if (*asked) (*asked)(session.rank(), step, true);
      if (ahead.size() > 1) collect();
      continue;
    }
    double loss = 0;
    for (const LossEntry& e : engine.forward_backward(std::span<const Batch>(batches), static_cast<std::uint64_t>(step))) loss += e.weight * e.sum.item();
    const double norm = engine.gradient_norm();
    if (step == 1 && gradients) keep(run.gradients, [&](const Parameter& p) { return engine.whole_gradient(p); });
    engine.update(step, 1, norm, 1.0);
    report(loss, norm);
  }
  while (!ahead.empty()) collect();
  if (gradients || asked) keep(run.last, [&](const Parameter& p) { return engine.whole_value(p); });
}

}  // namespace

std::string recipe() { return corpus().recipe(); }

void on_ranks(const Layout& layout, const std::vector<std::string>& overrides, const std::function<void(train::Session&)>& work) {
  std::vector<std::string> words = overrides;
  for (const std::string& w : layout.overrides()) words.push_back(w);
  std::mutex mutex;
  std::vector<std::string> errors;
  const auto rank = [&](const std::shared_ptr<World>& world) {
    try {
      const auto session = train::open_session(recipe(), words, CAPSTAN_PROGRAM, train::Placement::gradients, world);
      work(*session);
    } catch (const std::exception& e) {
      if (!world->fail_job(e.what()) && world->size() > 1) return;
      const std::lock_guard lock(mutex);
      errors.push_back("rank " + std::to_string(world->rank()) + ": " + e.what());
    }
  };
  if (layout.world() == 1) {
    rank(make_single_world());
  } else {
    std::vector<std::thread> threads;
    for (const auto& world : make_thread_worlds(layout.world(), 20)) threads.emplace_back([&, world] { rank(world); });
    for (std::thread& t : threads) t.join();
  }
  for (const std::string& e : errors) ADD_FAILURE() << layout.name() << ": " << e;
}

Trained train_on(const Layout& layout, const std::vector<std::string>& overrides, int steps, bool gradients) {
  Trained run;
  std::mutex mutex;
  on_ranks(layout, overrides, [&](train::Session& session) { train_rank(session, steps, gradients, nullptr, run, mutex); });
  return run;
}

Trained train_queued_on(const Layout& layout, const std::vector<std::string>& overrides, int steps, const Asked& asked) {
  Trained run;
  std::mutex mutex;
  on_ranks(layout, overrides, [&](train::Session& session) { train_rank(session, steps, false, &asked, run, mutex); });
  return run;
}

}  // namespace capstan::invariance
