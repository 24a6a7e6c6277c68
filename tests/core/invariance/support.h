// defines: Layout, layouts_of(), Trained, train_on(), on_ranks(): one recipe trained a few steps on any mesh, its ranks threads of this process.
#pragma once
#include "train/session.h"

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <map>
#include <string>
#include <vector>

namespace capstan::invariance {

/// Sizes of pp, replicate, shard, context, tensor, and the strategy over shard x context.
struct Layout {
  int pp = 1, replicate = 1, shard = 1, context = 1, tensor = 1;
  std::string strategy = "fsdp";
  int world() const { return pp * replicate * shard * context * tensor; }
  std::string name() const;  ///< "pp2_shard2_tensor2_fsdp"
  std::vector<std::string> overrides() const;
};

void PrintTo(const Layout& layout, std::ostream* out);

/// Every factorization of `world` over the five axes.
std::vector<Layout> layouts_of(int world);

/// What a few steps came to: the loss, the gradient's norm and each parameter's gradient, and the bits of the start.
struct Trained {
  std::vector<double> losses, norms;
  std::map<std::string, std::vector<double>> gradients;   ///< of the first step, global shape
  std::map<std::string, std::vector<double>> initial, last;
};

/// Forms of the decoder with what a mesh stumbles over: heads, key/value heads, vocabularies and inner widths that the
/// tensor axis does not divide, tied and untied heads, biases, query and key norms, dropout.
std::vector<std::string> forms();
std::vector<std::string> overrides_of(const std::string& form);

/// Trains `steps` steps of 5 samples in microbatches of 1 per data rank: packed documents of odd lengths, and a last
/// microbatch that is not full. `gradients` off leaves those out.
Trained train_on(const Layout& layout, const std::vector<std::string>& overrides, int steps, bool gradients = true);
/// The same by Engine::queue_step(), each step asked for before the one ahead of it is collected; no gradients. `asked` is told
/// before and after each.
using Asked = std::function<void(int rank, int step, bool after)>;
Trained train_queued_on(const Layout& layout, const std::vector<std::string>& overrides, int steps, const Asked& asked = {});

/// The recipe that all of this starts from.
std::string recipe();

/// Runs `work` on each rank of a mesh, in a thread of its own, with an engine that has no values yet. What a rank throws
/// fails the test with its name.
void on_ranks(const Layout& layout, const std::vector<std::string>& overrides, const std::function<void(train::Session&)>& work);

}  // namespace capstan::invariance
