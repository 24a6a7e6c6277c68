// Sums of gradients over ranks run beside a step's last backward, and only there.
#include "core/invariance/support.h"

#include "train/session.h"

#include <capstan/error.h>

#include <gmock/gmock.h>

#include <chrono>
#include <set>
#include <thread>

namespace capstan::invariance {
namespace {

struct Case {
  Layout layout;
  const char* axes;  ///< whose sum is looked at
  const char* reduce = "f32";
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.layout.name() << "_" << c.reduce; }

std::int64_t calls_of(const Communicator& c) {
  std::int64_t calls = 0;
  for (const CommRecord& r : c.ledger()) calls += r.calls;
  return calls;
}

Batch batch_of(train::Session& session) {
  const std::vector<std::int32_t> tokens(32, 7), lengths{16, 16}, targets(32, 9);
  Batch batch = make_batch(*session.device, tokens, lengths, targets);
  batch.step_weight = 64 * 2;
  return batch;
}

class Overlap : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Layouts, Overlap,
                         ::testing::Values(Case{{1, 1, 2, 1, 1, "ddp"}, "shard+context"}, Case{{1, 1, 2, 1, 1, "ddp"}, "shard+context", "bf16"},
                                           Case{{1, 1, 2, 1, 1, "zero1"}, "shard+context"}, Case{{1, 1, 2, 1, 1, "zero1"}, "shard+context", "bf16"},
                                           Case{{1, 2, 1, 1, 1, "ddp"}, "replicate"}, Case{{1, 2, 2, 1, 1, "zero1"}, "replicate"},
                                           Case{{1, 2, 2, 1, 1, "fsdp"}, "replicate"}));

TEST_P(Overlap, SumsBeginBesideTheLastBackward) {
  const Case& c = GetParam();
  on_ranks(c.layout, {"model={plugin: gpt, layers: 8, heads: 2, width: 32, context: 16, vocabulary: 512, tied: false}", std::string("mesh.reduce=") + c.reduce}, [&](train::Session& session) {
    Engine& engine = *session.engine;
    engine.initialize();
    const Communicator& sums = session.mesh->comm(c.axes, "reduce");
    std::vector<std::int64_t> begun;  // by the time that the second block's backward runs, in each microbatch
    const auto& calls = session.model->calls();
    const std::int64_t behind = static_cast<std::int64_t>(calls.size()) - 2, wanted = behind - 4;  // a few are on their way
    calls[1].block->parameters().front()->leaf()->hook = [&](Leaf&) {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      const bool last = begun.size() == 1;
      while (last && calls_of(sums) < wanted && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      begun.push_back(calls_of(sums));
    };
    const std::vector<Batch> batches{batch_of(session), batch_of(session)};
    engine.forward_backward(std::span<const Batch>(batches), 1);
    ASSERT_EQ(begun.size(), 2u);
    EXPECT_EQ(begun[0], 0);
    EXPECT_GE(begun[1], wanted);
    engine.gradient_norm();
    // Each unit once: what had begun is not summed again.
    std::set<const Block*> units;
    for (const Call& call : calls)
      if (!call.block->parameters().empty()) units.insert(call.block);
    EXPECT_EQ(calls_of(sums), static_cast<std::int64_t>(units.size()));
  });
}

TEST(Overlap, MicrobatchesAfterTheSumAreRefused) {
  on_ranks({1, 1, 2, 1, 1, "ddp"}, {"model={plugin: gpt, layers: 2, heads: 2, width: 32, context: 16, vocabulary: 512}"}, [](train::Session& session) {
    Engine& engine = *session.engine;
    engine.initialize();
    const std::vector<Batch> batches{batch_of(session)};
    engine.forward_backward(batches[0], 1);  // one by one: more may come
    engine.forward_backward(std::span<const Batch>(batches), 1);
    try {
      engine.forward_backward(batches[0], 1);
      ADD_FAILURE() << "not refused";
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), ::testing::HasSubstr("all of a step's microbatches in one call"));
    }
    engine.discard();
    engine.forward_backward(batches[0], 2);
  });
}

}  // namespace
}  // namespace capstan::invariance
