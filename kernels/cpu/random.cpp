// Random numbers by address, four to a Philox block.
#include <capstan/kernels/philox.h>
#include <kernels/cpu/random.h>

#include <type_traits>

namespace capstan::kernels::cpu {

template <class T>
void random(Context& ctx, const RandomFill& fill, std::int64_t n, T* to) {
  const std::uint64_t begin = fill.begin, end = begin + static_cast<std::uint64_t>(n);
  const std::uint64_t first_block = begin / 4, last_block = (end + 3) / 4;
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (end - begin > 4096)
  for (std::uint64_t block = first_block; block < last_block; ++block) {
    const Philox4 bits = philox4x32_10(fill.key, fill.step, block);
    for (std::uint64_t lane = 0; lane < 4; ++lane) {
      const std::uint64_t i = block * 4 + lane;
      if (i < begin || i >= end) continue;
      const double value = random_value(bits.v[lane], fill.normal, fill.scale);
      if constexpr (std::is_same_v<T, bf16>) to[i - begin] = bf16(static_cast<float>(value));
      else to[i - begin] = static_cast<T>(value);
    }
  }
}

template void random(Context&, const RandomFill&, std::int64_t, double*);
template void random(Context&, const RandomFill&, std::int64_t, float*);
template void random(Context&, const RandomFill&, std::int64_t, bf16*);

}  // namespace capstan::kernels::cpu
