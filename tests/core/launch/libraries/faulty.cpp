// Plain descent that has an accident: on one rank, at one step, once. For tests of what the job makes of it.
#include <capstan/optimizer.h>
#include <capstan/plugin.h>
#include <capstan/update.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

namespace {

/// A plugin has no business to know its rank; this one asks the launcher.
int rank() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "RANK"})
    if (const char* value = std::getenv(name)) return std::atoi(value);
  return 0;
}

class Faulty final : public capstan::Optimizer {
 public:
  explicit Faulty(const capstan::Options& options)
      : rank_(options.integer("rank")), step_(options.integer("step")), fault_(options.text("fault")), once_(options.path("once")) {}

  std::vector<capstan::StateDecl> state_of(const capstan::Parameter&) const override { return {{"momentum", capstan::DType::f32}}; }
  capstan::Atomicity atomicity(const capstan::Parameter&) const override { return capstan::Atomicity::element; }
  double peak_lr() const override { return 0.05; }

  void update(const capstan::UpdateContext& context, std::span<capstan::UpdateItem> items) override {
    if (context.step == step_ && rank() == rank_ && !std::filesystem::exists(once_)) {
      std::ofstream(once_) << "it happened\n";
      if (fault_ == "kill") std::raise(SIGKILL);
      if (fault_ == "stop") std::raise(SIGSTOP);
      if (fault_ == "throw") throw std::runtime_error("the optimizer had an accident");
    }
    for (capstan::UpdateItem& item : items)
      capstan::update::sgd({.grad_scale = context.grad_scale, .momentum = 0.9, .lr = 0.05 * context.lr_scale}, item.value, item.grad, item.state[0]);
  }

 private:
  std::int64_t rank_, step_;
  std::string fault_, once_;
};

}  // namespace

CAPSTAN_PLUGIN("optimizer", "faulty", "1.0.0") {
  capstan::Schema schema;
  schema.integer("rank", 0, "which rank");
  schema.integer("step", 0, "at which step; 0: never");
  schema.text("fault", "throw", "what happens").one_of({"kill", "stop", "throw"});
  schema.path("once", "", "file that is made when it happens, and keeps it from happening again");
  registrar.add("optimizer", "faulty", schema, [](const capstan::Options& options, capstan::Registrar&) {
    return capstan::as_interface<capstan::Optimizer>(std::make_shared<Faulty>(options));
  });
}
