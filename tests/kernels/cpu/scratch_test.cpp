// Scratch memory that cannot be had is an error that can be caught, also where every thread takes its own.
#include <gtest/gtest.h>
#include <kernels/cpu/attention.h>
#include <sys/resource.h>

#include <cstdlib>
#include <fstream>
#include <new>

namespace capstan::kernels::cpu {
namespace {

/// No more address space than 64 MiB beyond what is held.
void hold_memory() {
  std::int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit limit{};
  ::getrlimit(RLIMIT_AS, &limit);
  limit.rlim_cur = static_cast<rlim_t>(pages * 4096 + (64 << 20));
  if (::setrlimit(RLIMIT_AS, &limit) != 0) std::exit(4);
}

/// 0: nothing was thrown; 3: bad_alloc.
template <class Call>
[[noreturn]] void end_of(const Call& call) {
  Context context(2);
  int threads = 0;
#pragma omp parallel num_threads(2) reduction(+ : threads)  // threads need memory too
  ++threads;
  hold_memory();
  try {
    call(context);
  } catch (const std::bad_alloc&) {
    std::exit(threads == 2 ? 3 : 5);
  }
  std::exit(0);
}

TEST(Scratch, AttentionOverTooMuchForItsThreadsThrows) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a forked child has no OpenMP team
  // Half a million rows of 64: its backward takes 670 MB a thread, its forward, with every key packed once, 280 MB.
  const std::int32_t starts[] = {0, 1 << 19};
  AttentionArgs<float> a;
  a.heads = a.kv_heads = 2, a.head_size = 64, a.starts = starts, a.sequences = 1, a.rows = 1 << 19;
  EXPECT_EXIT(end_of([&](Context& context) { attention_backward(context, a); }), ::testing::ExitedWithCode(3), "");
  EXPECT_EXIT(end_of([&](Context& context) { attention_forward(context, a); }), ::testing::ExitedWithCode(3), "");
}

}  // namespace
}  // namespace capstan::kernels::cpu
