// Which way the ranks' GPUs reach each other. NCCL is in a library of its own, opened when it is wanted: neither this one
// nor the CUDA part needs it.
#include "comm/gpu_world.h"

#include "base/cuda_device.h"
#include "base/part.h"
#include "comm/nccl/nccl_world.h"

#include <capstan/error.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <numeric>

namespace capstan {
namespace {

constexpr std::size_t place_bytes = 320;

/// "host 0000:17:00.0" of every rank: what NCCL tells GPUs apart by.
std::vector<std::string> places_of_ranks(World& control, Device& device) {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  std::array<char, place_bytes> mine{};
  const std::string text = fmt::format("{} {}", host.data(), gpu_of(device).address());
  std::memcpy(mine.data(), text.data(), std::min(text.size(), place_bytes - 1));
  std::vector<int> ranks(static_cast<std::size_t>(control.size()));
  std::iota(ranks.begin(), ranks.end(), 0);
  std::vector<char> all(ranks.size() * place_bytes);
  control.make("places of GPUs", ranks)->all_gather(mine.data(), all.data(), place_bytes, DType::u8).wait();
  std::vector<std::string> places;
  for (std::size_t r = 0; r < ranks.size(); ++r) places.emplace_back(&all[r * place_bytes]);
  return places;
}

GpuRanks open_nccl(std::shared_ptr<World> control, std::shared_ptr<Device> device) {
  std::string why;
  const auto open = reinterpret_cast<OpenNccl>(open_part(nccl_part(), "capstan_nccl_open", why));
  if (open == nullptr) fail(Fault::input, "mesh.gpu_communication", why);
  GpuRanks ranks;
  if (!open(kernels::cuda::gpu_interface, std::move(control), std::move(device), ranks))
    fail(Fault::input, "mesh.gpu_communication", nccl_part().file.string() + " is from another build: rebuild or reinstall both");
  return ranks;
}

}  // namespace

GpuRanks make_gpu_world(std::shared_ptr<World> control, std::shared_ptr<Device> device, GpuCommunication choice) {
  const std::vector<std::string> places = places_of_ranks(*control, *device);
  std::map<std::string, std::vector<int>> ranks_of;
  for (std::size_t r = 0; r < places.size(); ++r) ranks_of[places[r]].push_back(static_cast<int>(r));
  const auto shared = std::find_if(ranks_of.begin(), ranks_of.end(), [](const auto& p) { return p.second.size() > 1; });
  const bool own = shared == ranks_of.end();
  if (choice == GpuCommunication::nccl && !own) {
    const std::string host = shared->first.substr(0, shared->first.find(' '));
    const auto gpus =
        std::count_if(ranks_of.begin(), ranks_of.end(), [&](const auto& p) { return p.first.starts_with(host + " "); });
    fail(Fault::input, "mesh.gpu_communication",
         fmt::format("NCCL wants a GPU for each rank, but ranks {} and {} share {}: start at most {} rank{} on that host "
                     "(or name more GPUs in run.gpus), or {}",
                     shared->second[0], shared->second[1], shared->first, gpus, gpus == 1 ? "" : "s", nccl_part().instead));
  }
  if (choice == GpuCommunication::nccl || (choice == GpuCommunication::automatic && own))
    return open_nccl(std::move(control), std::move(device));
  const auto words = own ? std::string("through host memory")
                         : fmt::format("through host memory ({} ranks share {} GPU{})", places.size(), ranks_of.size(),
                                       ranks_of.size() == 1 ? "" : "s");
  return {make_staged_world(std::move(control), std::move(device)), words};
}

}  // namespace capstan
