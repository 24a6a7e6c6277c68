// defines: Session: what a recipe comes to: plugins, tokenizer, model, engine on a device. Shared by
// `train`, `generate` and whatever else runs a model from a recipe.
#pragma once
#include "comm/communicator.h"
#include "engine/engine.h"
#include "mesh/mesh.h"
#include "plugin/host.h"
#include "recipe/recipe.h"

#include <capstan/export.h>
#include <capstan/tokenizer.h>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace capstan::train {

/// Members in order of dependence: the last is destroyed first.
struct CAPSTAN_API Session {
  std::unique_ptr<PluginHost> host;
  Recipe recipe;
  std::shared_ptr<Tokenizer> tokenizer;
  std::shared_ptr<World> world;  ///< the ranks of this job
  std::shared_ptr<Mesh> mesh;    ///< null on one rank
  std::shared_ptr<Device> device;
  std::string communication;     ///< how the ranks' GPUs reach each other, in words; "" on CPUs and on one rank
  std::shared_ptr<Model> model;
  std::unique_ptr<Engine> engine;  ///< null with Placement::none, until place()
  std::string products;            ///< how a GPU's matrix products are chosen, for a person; "" elsewhere

  const Options& options() const { return recipe.options; }
  int rank() const { return mesh ? mesh->rank() : 0; }
  EngineOptions engine_options(bool gradients) const;
  /// Says in `e` which of the model's calls are on which pipeline stage: as even as their costs allow.
  void cut_into_stages(EngineOptions& e) const;
  /// The recipe's place that says how many stages there are, for messages.
  std::string where_stages() const;
  /// Whether mesh.pipeline.microbatches says how many microbatches there are, and not data.micro_batch.
  bool pipeline_cuts_batches() const;
  /// Samples of a microbatch on one rank, at most.
  std::int64_t micro_batch() const;
  /// A second model of the same recipe, for the meta device.
  std::shared_ptr<Model> make_model() const;
  /// The run's folder: run.dir, or runs/<recipe's name> below the working directory.
  std::string run_folder() const;
  /// The options as the run's folder keeps them: run.dir is that folder, so that they train this run wherever they are read.
  Options kept_options() const;
};

/// What memory a session takes for the model: nothing (to look at it), its weights (to run it), or gradients too.
enum class Placement : unsigned char { none, weights, gradients };

/// Reads the recipe (model.vocabulary 0 becomes the tokenizer's), makes the parts, and places parameters
/// without values. `world` null: one rank, on which Placement::weights takes any `mesh` block for a mesh of one.
/// Throws Error(input) as the recipe's and the plugins' parsers do.
CAPSTAN_API std::unique_ptr<Session> open_session(const std::string& recipe, const std::vector<std::string>& overrides,
                                                  const std::string& executable, Placement placement,
                                                  std::shared_ptr<World> world = nullptr);

/// Takes the memory that Placement::none left out: the trainer's, once its header stands.
CAPSTAN_API void place(Session& session, Placement placement);
/// Error(input) when sequences are longer than the model's context, or a microbatch has more rows than can be counted.
CAPSTAN_API void check_lengths(const Session& session);
/// Runs `work`, which makes tensors of the recipe's sizes: a size that no memory has is Error(input) at the recipe's model.
CAPSTAN_API void with_sizes_of(const Options& recipe, const std::function<void()>& work);

/// Which key of a data set a run is refused for, and why; both "" when the set is there or can be built.
struct SetProblem { std::string key, what; };
/// A set that can neither be read nor built from its text, or that was built, or is to be built for one of the sets ahead of it,
/// from another text than it names.
CAPSTAN_API SetProblem problem_of_set(const Options& set, std::span<const Options> ahead);

/// Fills the weights from a run folder's newest good checkpoint, or from that of `step` when it is not
/// negative. `report` hears of damaged ones. Returns the step; Error(input) when there is none.
CAPSTAN_API std::int64_t load_weights(Session& session, const std::string& run_folder, std::int64_t step,
                                      const std::function<void(const std::string&)>& report);

}  // namespace capstan::train
