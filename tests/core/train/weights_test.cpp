// Weights that are loaded to write text: in the type that computes, and nothing beside them.
#include "support.h"
#include "train/session.h"

#include <cstring>

namespace capstan::train::testing {
namespace {

std::unique_ptr<Session> loaded(const Project& project, const std::string& compute) {
  auto session = open_session((project / "run/recipe.yaml").string(), {"precision.compute=" + compute}, CAPSTAN_PROGRAM, Placement::weights);
  EXPECT_EQ(load_weights(*session, (project / "run").string(), -1, [](const std::string& line) { ADD_FAILURE() << line; }), 2);
  return session;
}

TEST(Weights, ForTextAreHeldInTheComputeTypeAlone) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {"train.steps=2", "precision.compute=bf16"}).code, 0);
  const auto wide = loaded(project, "f32"), narrow = loaded(project, "bf16");
  const auto masters = wide->engine->tensors(false), copies = narrow->engine->tensors(false);
  ASSERT_EQ(masters.size(), copies.size());
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < copies.size(); ++i) {
    ASSERT_EQ(copies[i].name, masters[i].name);
    ASSERT_EQ(masters[i].value.dtype(), DType::f32);
    ASSERT_EQ(copies[i].value.dtype(), DType::bf16);
    const Tensor rounded = masters[i].value.to(DType::bf16);
    EXPECT_EQ(std::memcmp(copies[i].value.raw(), rounded.raw(), static_cast<std::size_t>(rounded.bytes())), 0) << copies[i].name;
    bytes += rounded.bytes();
  }
  // Alignment is all that is added, and f32 was there at no time.
  EXPECT_GE(narrow->device->bytes_held(), bytes);
  EXPECT_LT(narrow->device->bytes_peak(), bytes + bytes / 10);
  EXPECT_EQ(narrow->engine->memory().total(), narrow->device->bytes_held());
}

// The numbers that text is written with are those that training computes with.
TEST(Weights, ForTextAreTheTrainersWorkingCopies) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {"train.steps=2", "precision.compute=bf16"}).code, 0);
  const auto session = loaded(project, "bf16");
  const auto trainer = open_session((project / "run/recipe.yaml").string(), {}, CAPSTAN_PROGRAM, Placement::gradients);
  load_weights(*trainer, (project / "run").string(), -1, [](const std::string& line) { ADD_FAILURE() << line; });
  const std::vector<Parameter*> here = session->model->parameters(), there = trainer->model->parameters();
  ASSERT_EQ(here.size(), there.size());
  for (std::size_t i = 0; i < here.size(); ++i) {
    const Tensor a = here[i]->local(), b = there[i]->local();
    ASSERT_EQ(a.dtype(), DType::bf16) << here[i]->name();
    ASSERT_EQ(b.dtype(), DType::bf16) << here[i]->name();
    EXPECT_EQ(std::memcmp(a.raw(), b.raw(), static_cast<std::size_t>(a.bytes())), 0) << here[i]->name();
  }
}

}  // namespace
}  // namespace capstan::train::testing
