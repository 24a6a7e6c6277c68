// What a snapshot costs the training loop: Saver::save() of the bytes of GPT-2's masters and moments (1.5 GB), warm, against
// a memcpy of the same bytes by the same number of threads. save_bench FOLDER HDF5_PLUGIN_PROGRAM: see run.sh save.
#include "checkpoint/saver.h"
#include "plugin/host.h"

#include <capstan/checkpoint.h>

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <vector>

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  if (argc < 3) return fmt::print(stderr, "save_bench PROGRAM FOLDER [rounds]\n"), 2;
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 7, threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency() / 2));
  capstan::PluginHost host(argv[1]);
  const std::filesystem::path folder = argv[2];
  std::filesystem::remove_all(folder);

  const std::int64_t tensors = 36, each = 124'439'808LL * 12 / tensors / 4 * 4;
  std::vector<std::vector<char>> data(tensors), target(tensors);
  capstan::checkpoint::Snapshot snapshot;
  for (std::int64_t t = 0; t < tensors; ++t) {
    data[t].assign(each, static_cast<char>(t)), target[t].assign(each, 1);
    capstan::SavedTensor s;
    s.name = "model/t" + std::to_string(t), s.dtype = capstan::DType::f32, s.global_shape = {each / 4}, s.box = {{0}, {each / 4}};
    s.data = data[t].data(), s.bytes = each;
    snapshot.tensors.push_back(std::move(s));
  }
  snapshot.state_json = "{}";
  capstan::checkpoint::SaverOptions options;
  options.keep = 1, options.copy_threads = threads;
  capstan::checkpoint::Saver saver(folder, host.make_as<capstan::CheckpointFormat>(host.choice("checkpoint", "hdf5", {})), options);
  saver.reserve(std::vector<std::int64_t>(tensors, each));
  std::vector<double> copies, snapshots;
  for (int r = 0; r < rounds; ++r) {
    const auto begin = Clock::now();
    {
      std::vector<std::jthread> team;
      for (int k = 0; k < threads; ++k)
        team.emplace_back([&, k] {
          for (std::int64_t t = k; t < tensors; t += threads) std::memcpy(target[t].data(), data[t].data(), each);
        });
    }
    copies.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    snapshot.step = r + 1;
    saver.save(snapshot);
    saver.wait();
    if (const auto error = saver.take_error()) return fmt::print(stderr, "{}\n", error->what()), 1;
    snapshots.push_back(saver.last_report().snapshot_seconds);
  }
  std::sort(copies.begin(), copies.end()), std::sort(snapshots.begin(), snapshots.end());
  const double copy = copies[copies.size() / 2], taken = snapshots[snapshots.size() / 2];
  fmt::print("{:.2f} GB, {} thread{}: memcpy {:.1f} ms, snapshot {:.1f} ms, ratio {:.2f} (medians of {}); written in the background in {:.2f} s\n",
             1e-9 * static_cast<double>(tensors * each), threads, threads > 1 ? "s" : "", 1e3 * copy, 1e3 * taken, taken / copy, rounds, saver.last_report().write_seconds);
  std::filesystem::remove_all(folder);
}
