// decays() and is_hidden_matrix(): by role and axes, whatever a parameter is called.
#include <capstan/optimizer.h>

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace capstan {
namespace {

Parameter make(const std::string& name, Role role, int rank) {
  ParameterSpec spec;
  for (int i = 0; i < rank; ++i) spec.dims.push_back({Segment{"axis" + std::to_string(i), 4, 1, ""}});
  spec.role = role;
  return Parameter(name, spec);
}

TEST(DecayGroups, GoByRole) {
  const std::pair<Role, bool> expected[] = {{Role::matrix, true},  {Role::embedding, true}, {Role::head, true},
                                            {Role::router, true},  {Role::conv, true},      {Role::vector, false},
                                            {Role::bias, false},   {Role::state, false}};
  for (const auto& [role, decay] : expected) EXPECT_EQ(decays(make("p", role, 2)), decay) << name_of(role);
}

TEST(DecayGroups, VectorsNeverDecay) {
  for (const Role role : {Role::matrix, Role::embedding, Role::head, Role::router, Role::conv, Role::vector, Role::bias}) {
    EXPECT_FALSE(decays(make("p", role, 1))) << name_of(role);
  }
}

TEST(DecayGroups, NamesDoNotMatter) {
  EXPECT_TRUE(decays(make("norm.bias", Role::matrix, 2)));
  EXPECT_FALSE(decays(make("layers.0.attention.qkv.weight", Role::vector, 1)));
  EXPECT_TRUE(is_hidden_matrix(make("tokens.embedding.weight", Role::matrix, 2)));
  EXPECT_FALSE(is_hidden_matrix(make("layers.0.mlp.up.weight", Role::embedding, 2)));
}

TEST(HiddenMatrix, IsAMatrixOfRankTwoOrMore) {
  EXPECT_FALSE(is_hidden_matrix(make("p", Role::matrix, 1)));
  EXPECT_TRUE(is_hidden_matrix(make("p", Role::matrix, 2)));
  EXPECT_TRUE(is_hidden_matrix(make("p", Role::matrix, 3)));  // one matrix for each expert
  for (const Role role : {Role::embedding, Role::head, Role::router, Role::conv, Role::vector, Role::bias, Role::state}) {
    EXPECT_FALSE(is_hidden_matrix(make("p", role, 2))) << name_of(role);
  }
}

}  // namespace
}  // namespace capstan
