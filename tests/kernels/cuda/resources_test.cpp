// The table of what kernels take: how ptxas's words are read, and that a kernel that grows, spills, comes or goes is seen.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../../gpu/resources.h"

namespace kernel_resources {
namespace {

using ::testing::HasSubstr;

constexpr const char* log_text = R"(ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7capstan7kernels4cuda48_GLOBAL__N__8e3887fc_15_cudnn_ragged_cu_9f59c5a421ragged_offsets_kernelEPKiiiNS1_13RaggedStridesEPi' for 'sm_90a'
ptxas info    : Function properties for _ZN7capstan7kernels4cuda48_GLOBAL__N__8e3887fc_15_cudnn_ragged_cu_9f59c5a421ragged_offsets_kernelEPKiiiNS1_13RaggedStridesEPi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 384 bytes smem
ptxas info    : Compile time = 32.415 ms
ptxas info    : Compiling entry function '_ZN7capstan7kernels4cuda12_GLOBAL__N_16kernelIfLi4EEEvi' for 'sm_100f'
ptxas info    : Function properties for _ZN7capstan7kernels4cuda12_GLOBAL__N_16kernelIfLi4EEEvi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers
)";

Kernels read(const std::string& text) {
  std::istringstream in(text);
  Kernels kernels;
  read_log(in, kernels);
  return kernels;
}

TEST(KernelResources, AreReadFromPtxas) {
  const Kernels k = read(log_text);
  ASSERT_EQ(k.size(), 2u);
  const Resources& a = k.at({"sm_90a", "ragged_offsets_kernel"});
  EXPECT_EQ(a.registers, 32);
  EXPECT_EQ(a.shared, 384);
  EXPECT_EQ(a.stack, 0);
  EXPECT_EQ(a.spilled, 0);
  const Resources& b = k.at({"sm_100f", "kernel<float, 4>"});
  EXPECT_EQ(b.registers, 255);
  EXPECT_EQ(b.shared, 0);
  EXPECT_EQ(b.stack, 16);
  EXPECT_EQ(b.spilled, 20);
}

TEST(KernelResources, ATableSaysWhichKernelGrew) {
  Kernels known = read(log_text);
  known[{"sm_100f", "kernel<float, 4>"}].spilled = 0;
  std::stringstream table;
  write_table(table, known, "13.0.88");
  std::string compiler;
  const Kernels back = read_table(table, compiler);
  EXPECT_EQ(compiler, "13.0.88");
  std::ostringstream out;
  EXPECT_EQ(compare(known, back, out), 0);
  EXPECT_EQ(out.str(), "");
  const auto after = [&](const std::function<void(Kernels&)>& change, int wrong) {
    Kernels now = known;
    change(now);
    std::ostringstream text;
    EXPECT_EQ(compare(now, back, text), wrong);
    return text.str();
  };
  const std::pair<std::string, std::string> key{"sm_90a", "ragged_offsets_kernel"};
  EXPECT_EQ(after([&](Kernels& k) { k[key].registers = 33; }, 1), "ragged_offsets_kernel (sm_90a): registers 32 -> 33\n");
  EXPECT_THAT(after([&](Kernels& k) { k[key].shared = 400; }, 1), HasSubstr("shared bytes 384 -> 400"));
  EXPECT_THAT(after([&](Kernels& k) { k[key].stack = 8; }, 1), HasSubstr("stack bytes 0 -> 8"));
  EXPECT_THAT(after([&](Kernels& k) { k[key].spilled = 4; }, 1), HasSubstr("spills 4 bytes"));
  EXPECT_THAT(after([&](Kernels& k) { k[{"sm_90a", "newcomer"}] = {}; }, 1), HasSubstr("newcomer (sm_90a): not in the table"));
  EXPECT_THAT(after([&](Kernels& k) { k.erase(key); }, 1), HasSubstr("not in the build"));
  EXPECT_THAT(after([&](Kernels& k) { k[key].registers = 24; }, 0), HasSubstr("smaller: ragged_offsets_kernel"));
}

}  // namespace
}  // namespace kernel_resources
