// See in_process.h.
#include "in_process.h"

#include <capstan/ops.h>

namespace capstan::train::testing {

void Poison::forward(ForwardContext& context) {
  if (context.training) context.set("h", change_(context.get("h"), context));
}

Poisoned::Poisoned(std::shared_ptr<Model> model, Poison::Change change) : model_(std::move(model)), poison_(std::move(change)), calls_(model_->calls()) {
  calls_.insert(calls_.end() - 1, Call{&poison_, {"h"}, {"h"}});
}

bool holds_sample(const ForwardContext& context, std::int64_t sample) {
  const Space& space = context.batch.space();
  if (space.sample_ids.is_meta()) return false;
  const std::int64_t length = 32, *ids = space.sample_ids.data<std::int64_t>();  // rows of a sample in this recipe
  for (std::int64_t i = 0; i < space.sample_ids.numel(); ++i)
    if (ids[i] / length == sample) return true;
  return false;
}

Tensor times(const Tensor& h, double factor) { return ops::scale(h, factor); }

Values values_of(const Engine& engine) {
  Values all;
  for (const NamedTensor& t : engine.tensors(true)) {
    std::vector<char> bytes(static_cast<std::size_t>(t.value.bytes()));
    t.value.copy_to_host(bytes.data(), t.value.bytes());
    all.emplace_back(t.name, std::move(bytes));
  }
  return all;
}

Outcome run_trainer(const std::string& recipe, const std::vector<std::string>& overrides, const Poison::Change& change,
                    const std::function<void(Session&)>& prepare) {
  Outcome run;
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  try {
    auto session = open_session(recipe, overrides, CAPSTAN_PROGRAM, train::Placement::gradients);
    if (change) session->engine = std::make_unique<Engine>(std::make_shared<Poisoned>(session->model, change), session->device, session->engine_options(true));
    if (prepare) prepare(*session);
    const Engine& engine = *session->engine;
    Trainer* at = nullptr;
    Trainer trainer(std::move(session), [&] {
      if (at == nullptr) return 0;  // it is still being made
      run.after_step.push_back(values_of(engine));
      run.steps.push_back(at->step());
      return 0;
    });
    at = &trainer;
    try {
      trainer.run();
    } catch (const Error& error) {
      run.error = error;
    }
    run.last = values_of(engine);
  } catch (const Error& error) {
    run.error = error;
  }
  run.out = ::testing::internal::GetCapturedStdout();
  run.err = ::testing::internal::GetCapturedStderr();
  return run;
}

}  // namespace capstan::train::testing
