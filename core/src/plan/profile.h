// defines: Setting, CallProfile, Profile, profile_model(): what each call of a model does to one microbatch, by the model's own
// code on the meta device.
#pragma once
#include "engine/engine.h"
#include "mesh/layout.h"
#include "pipeline/schedule.h"

#include <capstan/device.h>
#include <capstan/dtype.h>
#include <capstan/export.h>
#include <capstan/model.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace capstan::plan {

/// What a recipe says of how a step runs over the ranks of a job.
struct Setting {
  MeshLayout layout;
  EngineOptions engine;
  bool accumulate_whole = false;      ///< gradients are reduced once, at the end of the step
  std::int64_t sequences = 1;         ///< of one step, all ranks
  std::int64_t length = 1;            ///< tokens of a sequence
  std::int64_t micro = 1;             ///< sequences of one microbatch
  std::int64_t microbatches = 1;      ///< of one step, each rank
  pipeline::Plan pipeline;
  std::string where_stages = "stages";  ///< the recipe's place that says how many, for messages
  bool staging = false;               ///< checkpoints are written from a copy in memory
  std::int64_t sampled_tokens = 0;    ///< that samples have room for, on rank 0; 0: no samples
  std::int64_t validation = 0;        ///< microbatches of one validation, all ranks; 0: none
  std::int64_t validation_micro = 1;  ///< sequences of each
  std::int64_t bigram_bytes = 0;      ///< of the bigram model beside it, on rank 0's host

  int size(const char* axis) const { return layout.size(axis); }
  int data_ranks() const { return size("replicate") * size("shard"); }
  /// Ranks over which state is cut.
  int pieces() const { return size("shard") * size("context"); }
};

/// A matrix that products are made with, as this rank holds it.
struct Matrix { double out = 0, in = 0; };

struct CallProfile {
  std::string name;
  bool head = false;
  std::vector<OpRecord> forward, backward;  ///< backward: what is computed again included
  std::int64_t kept = 0;                    ///< bytes that stay from its forward to its backward
  std::int64_t forward_room = 0, backward_room = 0;  ///< most bytes at once above those held before, in each
  std::vector<Matrix> matrices;             ///< of linear layers; of a head: its own alone
  std::int64_t quantized = 0;               ///< bytes of its weights in fp8, straight and turned over
  struct Piece { std::string name; std::int64_t numel = 0; };
  std::vector<Piece> parameters;            ///< in order; elements that this tensor rank holds
};

struct Profile {
  std::vector<CallProfile> calls;
  std::int64_t parameters = 0;  ///< of the whole model
  std::int64_t base = 0;        ///< bytes of the batch and of what a forward makes once
  std::int64_t peak = 0;        ///< most bytes of activations at once when one rank has all calls
  double rows = 0;              ///< of a microbatch on this rank's context share
  double length = 0;            ///< tokens of a sequence
  double head_size = 128;       ///< of attention heads; where no segment says it, 128
  double hidden = 0;
  std::int64_t state_bytes = 0; ///< keys and values of one token, whole model
  std::int64_t evaluation = 0;  ///< most bytes that the forward of a validation's microbatch takes beside it
};

using ModelMaker = std::function<std::shared_ptr<Model>()>;

/// One microbatch of the setting through the model as the first of the setting's context and tensor ranks runs it.
CAPSTAN_API Profile profile_model(const ModelMaker& make, const Setting& setting);

}  // namespace capstan::plan
