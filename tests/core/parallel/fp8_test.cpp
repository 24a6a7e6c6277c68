// Linear layers in mxfp8 under tensor ranks against one rank: blocks of 32 lie within a rank's part, so the numbers are the
// same.
#include "core/parallel/support.h"

#include <capstan/autograd.h>
#include <capstan/batch.h>
#include <capstan/nn.h>
#include <support/tolerance.h>

namespace capstan::parallel_test {
namespace {

constexpr std::int64_t rows = 12, hidden = 64, inner = 128;

void play(const Rank& rank, LinearPrecision::Kind kind, Gradients& result) {
  const std::vector<std::int32_t> tokens(rows, 1), lengths{5, 7};
  const Batch batch = make_batch(*rank.device, tokens, lengths, {}, {}, 77);
  ForwardContext context(batch, *rank.device, DType::f32);
  context.grad = context.training = true, context.mesh = rank.mesh.get(), context.linear.kind = kind;
  nn::Linear up("up", {{"mlp", inner, 1, ""}}, {{"hidden", hidden, 1, ""}}, true, 0.2),
      down("down", {{"hidden", hidden, 1, ""}}, {{"mlp", inner, 1, ""}}, true, 0.2);
  std::vector<Parameter*> parameters;
  for (nn::Linear* layer : {&up, &down})
    for (Parameter* p : layer->parameters()) place(*p, rank, DType::f32), parameters.push_back(p);
  const Tensor all = tensor(noise("x", rows * hidden), Dims{rows, hidden}, DType::f32, *rank.device);
  const Tensor x = make_leaf(nn::stream_rows(context, all).clone(), false);
  const Tensor y = down.add_to(context, ops::gelu(up(context, x)), x);
  const std::int64_t first = rank.tensor_rank() * y.size(0);
  const Tensor g =
      tensor(noise("g", rows * hidden), Dims{rows, hidden}, DType::f32, *rank.device).narrow(0, first, y.size(0));
  result.add("y", static_cast<std::size_t>(first * hidden), host(y));
  const Tensor roots[] = {y}, gradients[] = {g};
  backward(roots, gradients);
  result.add(parameters);
  result.add("x", static_cast<std::size_t>(first * hidden), host(static_cast<Leaf*>(x.node().get())->grad()));
}

TEST(LinearFp8OnTensorRanks, InBlocksIsWhatOneRankComputes) {
  Gradients alone, plain;
  play(Rank(), LinearPrecision::Kind::mxfp8, alone);
  play(Rank(), LinearPrecision::Kind::compute, plain);
  EXPECT_NE(alone.all().at("y"), plain.all().at("y"));
  for (const int size : {2, 4}) {
    Gradients together;
    run_ranks(size,
              [&](std::shared_ptr<World> world) { play(Rank(world, size, 1), LinearPrecision::Kind::mxfp8, together); });
    together.expect_near(alone, bounds::mesh(DType::f32), "on " + std::to_string(size));
  }
}

}  // namespace
}  // namespace capstan::parallel_test
