// The `mesh` block: defaults, contradictions, and the mesh that a recipe means over a number of ranks.
#include "recipe/mesh_schema.h"
#include "recipe_fixture.h"

namespace capstan::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class MeshSchemaTest : public RecipeTest {
 protected:
  Options options(const std::string& more, const std::vector<std::string>& words = {}) {
    return load(write("r.yaml", minimal(more)), words).options;
  }
  std::string contradiction(const std::string& more, const std::vector<std::string>& words = {}) {
    const Options o = options(more, words);
    return error_of(Fault::input, [&] { check_run_options(o); });
  }
  std::string misfit(const std::string& more, int world, const std::vector<std::string>& words = {}) {
    const Options o = options(more, words);
    EXPECT_NO_THROW(check_run_options(o));  // it is right for other numbers of ranks
    return error_of(Fault::input, [&] { mesh_from(o, world); });
  }
};

TEST_F(MeshSchemaTest, WithoutABlockAllRanksShard) {
  const Options o = options("");
  for (const int world : {1, 2, 7, 8, 1024, 100000}) {
    const MeshLayout m = mesh_from(o, world);
    EXPECT_EQ(m.world(), world);
    EXPECT_EQ(m.size("shard"), world);
    EXPECT_EQ(m.axes().size(), 5u);
    EXPECT_EQ(m.axes().front().name, "pp");
    EXPECT_EQ(m.axes().back().name, "tensor");
  }
  const Options& mesh = o.group("mesh");
  EXPECT_EQ(mesh.text("strategy"), "fsdp");
  EXPECT_TRUE(mesh.flag("reshard_after_forward"));
  EXPECT_EQ(mesh.text("reduce"), "f32");
  EXPECT_EQ(mesh.text("accumulate"), "scatter");
  EXPECT_TRUE(mesh.flag("prefetch"));
  EXPECT_EQ(mesh.number("timeout_seconds"), 60);
  EXPECT_EQ(mesh.group("pipeline").text("schedule"), "1f1b");
  EXPECT_EQ(mesh.group("pipeline").integer("microbatches"), 0);
  EXPECT_EQ(mesh.group("pipeline").integer("stages_per_rank"), 1);
}

TEST_F(MeshSchemaTest, ShardTakesWhatIsLeft) {
  const Options o = options("mesh: {pp: 2, tensor: 2, replicate: 3}\n");
  EXPECT_EQ(mesh_from(o, 24).describe(), "pp 2 x replicate 3 x shard 2 x tensor 2 (24 ranks)");
  EXPECT_EQ(mesh_from(o, 12).size("shard"), 1);
  EXPECT_EQ(mesh_from(options("mesh: {shard: 4, context: 2}\n"), 8).describe(), "shard 4 x context 2 (8 ranks)");
}

TEST_F(MeshSchemaTest, AMisfitNamesTheLineTheKeyAndWhatFits) {
  EXPECT_THAT(misfit("mesh:\n  tensor: 3\n", 8), AllOf(HasSubstr("r.yaml:8, mesh.tensor]"), HasSubstr("does not divide the job's 8 ranks (2^3)"),
                                                       HasSubstr("shard 2 x tensor 4"), HasSubstr("start 6 or 9 ranks")));
  EXPECT_THAT(misfit("mesh:\n  tensor: 2\n  shard: 3\n", 8), AllOf(HasSubstr("r.yaml:9, mesh.shard]"), HasSubstr("shard 4 x tensor 2")));
  EXPECT_THAT(misfit("", 8, {"mesh.pp=5"}), HasSubstr("[command line, mesh.pp]"));
  // The mesh nearest to it puts another axis to use; the line is that of a key which was given.
  EXPECT_THAT(misfit("mesh:\n  shard: 2\n  context: 3\n", 7), HasSubstr("r.yaml:8, mesh.shard]"));
  EXPECT_THAT(misfit("mesh: {shard: 2}\n", 1), AllOf(HasSubstr("mesh.shard]"), HasSubstr("the job has 1 rank;"), HasSubstr("start 2 ranks")));
}

TEST_F(MeshSchemaTest, RangesAndWords) {
  const std::string path = write("r.yaml", minimal());
  for (const char* word : {"mesh.pp=0", "mesh.tensor=-1", "mesh.shard=-2", "mesh.replicate=1.5", "mesh.context=auto", "mesh.strategy=zero3",
                           "mesh.reduce=f16", "mesh.accumulate=once", "mesh.timeout_seconds=0", "mesh.pipeline.schedule=zbv",
                           "mesh.pipeline.microbatches=-1", "mesh.pipeline.stages_per_rank=0", "mesh.pp=100000000000"}) {
    EXPECT_THAT(refusal(path, {word}), HasSubstr("expected")) << word;
  }
  EXPECT_THAT(refusal(path, {"mesh.ranks=8"}), HasSubstr("unknown key 'ranks'"));  // the launch says how many
}

TEST_F(MeshSchemaTest, Contradictions) {
  EXPECT_THAT(contradiction("mesh:\n  shard: 0\n"), HasSubstr("r.yaml:8, mesh.shard] out of range"));
  EXPECT_THAT(contradiction("mesh: {reduce: bf16}\nprecision: {compute: f64}\n"), HasSubstr("mesh.reduce]"));
  EXPECT_THAT(contradiction("mesh: {strategy: ddp, accumulate: whole}\n"), HasSubstr("mesh.accumulate]"));
  EXPECT_THAT(contradiction("mesh: {strategy: zero1, accumulate: whole}\n"), HasSubstr("mesh.accumulate]"));
  EXPECT_THAT(contradiction("mesh: {pipeline: {schedule: interleaved}}\n"), HasSubstr("mesh.pipeline.schedule] interleaved"));
  EXPECT_THAT(contradiction("mesh: {pipeline: {stages_per_rank: 2}}\n"), HasSubstr("choose schedule=interleaved"));
  for (const char* good : {"mesh: {strategy: zero2, accumulate: whole}\n", "mesh: {strategy: fsdp, accumulate: whole, reduce: bf16}\n",
                           "mesh: {pipeline: {schedule: interleaved, stages_per_rank: 2}}\n", "mesh: {pipeline: {schedule: zero_bubble}}\n"}) {
    EXPECT_NO_THROW(check_run_options(options(good))) << good;
  }
}

}  // namespace
}  // namespace capstan::testing
