// What is said when a library that is opened on demand, or what it needs, is missing.
#include "base/part.h"

#include <capstan/device.h>
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

namespace capstan {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

class Parts : public ::testing::Test {
 protected:
  fs::path folder = fs::temp_directory_path() / ("capstan-parts-" + std::to_string(getpid()));
  void SetUp() override { fs::create_directories(folder); }
  void TearDown() override { fs::remove_all(folder); }
  static std::string refused(Part part, const fs::path& file, const char* name) {
    part.file = file;
    std::string why;
    EXPECT_EQ(open_part(part, name, why), nullptr);
    return why;
  }
};

TEST_F(Parts, LieBesideTheLibraryOfCapstan) {
  EXPECT_EQ(cuda_part().file.filename(), "libcapstan_cuda.so");
  EXPECT_EQ(nccl_part().file.filename(), "libcapstan_nccl.so");
  EXPECT_TRUE(fs::exists(nccl_part().file.parent_path() / "libcapstan.so.0")) << nccl_part().file;
}

TEST_F(Parts, ThatABuildDoesNotHaveAreSaidToBeMissing) {
  EXPECT_THAT(refused(nccl_part(), folder / "libcapstan_nccl.so", "capstan_nccl_open"),
              AllOf(HasSubstr("no NCCL part"), HasSubstr((folder / "libcapstan_nccl.so").string() + " does not exist"), HasSubstr("-DCAPSTAN_CUDA=ON where nccl.h is"),
                    HasSubstr("mesh.gpu_communication: staged")));
  EXPECT_THAT(refused(cuda_part(), folder / "libcapstan_cuda.so", "capstan_cuda_open"),
              AllOf(HasSubstr("no CUDA part"), HasSubstr("does not exist"), HasSubstr("-DCAPSTAN_CUDA=ON"), HasSubstr("run.device: cpu")));
}

TEST_F(Parts, WhoseLibraryIsMissingNameItAndWhereItComesFrom) {
  EXPECT_THAT(refused(nccl_part(), CAPSTAN_PART_WITHOUT_LIBRARY, "capstan_nccl_open"),
              AllOf(HasSubstr("cannot be opened: libabsent.so.2: cannot open shared object file"), HasSubstr("libnccl2"), HasSubstr("nvidia-nccl-cu13"),
                    HasSubstr("LD_LIBRARY_PATH"), HasSubstr("mesh.gpu_communication: staged")));
  EXPECT_THAT(refused(cuda_part(), CAPSTAN_PART_WITHOUT_LIBRARY, "capstan_cuda_open"),
              AllOf(HasSubstr("libabsent.so.2"), HasSubstr("cublasLt, cudnn"), HasSubstr("run.device: cpu")));
}

TEST_F(Parts, ThatAreNoLibraryOrOfAnotherBuildAreRefused) {
  std::ofstream(folder / "text.so") << "no library";
  EXPECT_THAT(refused(nccl_part(), folder / "text.so", "capstan_nccl_open"), AllOf(HasSubstr("cannot be opened"), HasSubstr("text.so")));
  EXPECT_THAT(refused(nccl_part(), CAPSTAN_PART_OF_ANOTHER_BUILD, "capstan_nccl_open"),
              AllOf(HasSubstr("is from another build"), HasSubstr("does not offer capstan_nccl_open"), HasSubstr("rebuild or reinstall both")));
  Part other = nccl_part();
  other.file = CAPSTAN_PART_OF_ANOTHER_BUILD;
  std::string why;
  EXPECT_NE(open_part(other, "something_else", why), nullptr);
  EXPECT_EQ(why, "");
}

TEST_F(Parts, AMissingDriverIsNamed) {
  if (!fs::exists(cuda_part().file)) GTEST_SKIP() << "this build has no CUDA part";
  if (dlopen("libcuda.so.1", RTLD_LAZY) != nullptr) GTEST_SKIP() << "this machine has a driver";
  const std::string why = cuda_problem();
  if (why.find("cannot be opened") != std::string::npos) GTEST_SKIP() << "CUDA's libraries are missing too: " << why;
  EXPECT_THAT(why, AllOf(HasSubstr("no NVIDIA driver"), HasSubstr("libcuda.so.1 was not found"), HasSubstr("run.device: cpu")));
}

}  // namespace
}  // namespace capstan
