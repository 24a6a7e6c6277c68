// What a rank holds is what was said before the run: 16 N / ranks bytes, pools of twice the largest unit, activations.
#include "core/invariance/support.h"

#include "train/estimate.h"
#include "train/session.h"

#include <capstan/optimizer.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>

namespace capstan::invariance {
namespace {

constexpr const char* model = "model={plugin: gpt, layers: 8, heads: 4, width: 128, context: 64, vocabulary: 1024, tied: true}";

TEST(Memory, FsdpOverFourRanksTakesWhatTheFormulaSays) {
  std::int64_t activations = 0, parameters = 0;
  {
    auto session = train::open_session(recipe(), {model, "data.batch_size=8", "data.micro_batch=2", "data.sequence_length=64"}, CAPSTAN_PROGRAM, train::Placement::none);
    const train::Estimate e = train::estimate_step(*session);
    activations = e.activations_bytes, parameters = e.parameters;
  }
  std::mutex mutex;
  on_ranks({1, 1, 4, 1, 1}, {model}, [&](train::Session& session) {
    Engine& engine = *session.engine;
    engine.attach(session.host->make_as<Optimizer>(session.options().plugin("optimizer")));
    engine.initialize();
    std::int64_t largest = 0;  // a block's parameters, or the table of tokens
    for (const Call& call : session.model->calls()) {
      std::int64_t n = 0;
      for (const Parameter* p : call.block->parameters())
        if (call.block == session.model->calls().front().block || p->role() != Role::embedding) n += p->numel();
      largest = std::max(largest, n);
    }
    EXPECT_EQ(engine.parameters(), parameters);
    const std::int64_t before = session.device->bytes_held();
    EXPECT_NEAR(static_cast<double>(engine.memory().total()) / static_cast<double>(before), 1, 0.001) << "by class against the allocator";
    session.device->reset_peak();
    std::vector<std::int32_t> tokens(128, 7), lengths{64, 64}, targets(128, 9);
    Batch batch = make_batch(*session.device, tokens, lengths, targets);
    batch.step_weight = 512;
    engine.forward_backward(batch, 1);
    engine.update(1, 1, engine.gradient_norm(), 1);
    const auto formula = static_cast<double>(16 * parameters / 4 + 2 * 4 * largest + 2 * 4 * largest + activations);
    const std::lock_guard lock(mutex);
    std::printf("rank %d: peak %.3f MB, formula %.3f MB (N = %lld, largest unit %lld, activations %.3f MB)\n", session.rank(),
                static_cast<double>(session.device->bytes_peak()) * 1e-6, formula * 1e-6, static_cast<long long>(parameters),
                static_cast<long long>(largest), static_cast<double>(activations) * 1e-6);
    EXPECT_NEAR(static_cast<double>(session.device->bytes_peak()) / formula, 1, 0.05);
  });
}

TEST(Memory, NoRankEverHoldsTheWholeModel) {
  on_ranks({1, 1, 8, 1, 1}, {model}, [](train::Session& session) {
    // Placing and filling the weights: the pieces, the two pools, and nothing near the whole.
    session.engine->initialize();
    const EngineMemory m = session.engine->memory();
    EXPECT_LE(session.device->bytes_peak(), m.total() + m.masters);  // a piece's values may be made beside it
    EXPECT_LT(m.masters, 4 * session.engine->parameters() / 8 + 65536);
  });
}

}  // namespace
}  // namespace capstan::invariance
