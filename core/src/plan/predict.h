// defines: Assumptions, Memory, Traffic, Prediction, predict(): what a step of a recipe takes on each of many ranks.
#pragma once
#include "plan/device_model.h"
#include "plan/profile.h"

#include <capstan/export.h>
#include <capstan/optimizer.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace capstan::plan {

/// Where the trainer that is planned for differs from this one: published runs were made by others.
struct Assumptions {
  bool overlap_tensor = false;      ///< row gathers and scatters run beside the products that they feed
  bool overlap_gradients = true;    ///< ddp, zero1: gradients are reduced beside the last backward
  bool overlap_parameters = false;  ///< zero1, zero2: updated parameters are gathered beside the next forward
  bool unit_copies = false;         ///< gathered parameters are copied out of the gather's buffer, gradients into the scatter's
  double attention_rate = 1;        ///< of its attention kernels, relative to the device's table
  bool f8_products = false;         ///< linear layers multiply 8-bit numbers, cast on the way
  DType gradients = DType::f32;     ///< type that zero1's and ddp's are sent in when the setting says f32
  /// Share of the forward that the backward repeats, by kind; unset: as the setting says, none or all of a block.
  struct Repeated { double products = 0, attention = 0, others = 0; };
  std::optional<Repeated> repeated;
};

/// Bytes on one rank by what they are for.
struct Memory {
  int pipeline_rank = 0;
  std::vector<int> calls;            ///< of the model, that this rank runs
  EngineMemory engine;
  std::int64_t quantized = 0;        ///< weights in fp8; under fsdp those of one call at a time
  std::int64_t activations = 0;      ///< kept from forwards to backwards, and the most that one call needs beside
  int live = 1;                      ///< microbatches that are kept at once
  std::int64_t logits = 0;           ///< the head's own room: a chunk of logits, its gradient
  std::int64_t staging = 0;          ///< what a checkpoint is written from while training goes on
  std::int64_t sampling = 0;         ///< between steps: keys and values of samples, and the whole model for them where ranks share it
  std::int64_t validation = 0;       ///< between steps: all of this rank's batches of a validation, and the forward of one
  std::int64_t bigram = 0;           ///< beside those batches, on the host: counts of token pairs, and the tokens to score
  /// Most at once: samples and validations come while there are no activations. `host`: with what is in the host's memory anyway.
  std::int64_t total(bool host = true) const {
    return engine.total() + quantized + std::max({activations + logits, sampling, validation + (host ? bigram : 0)}) + (host ? staging : 0);
  }
};

/// One kind of communication of a step, of the rank that has most to do.
struct Traffic {
  std::string axes;                  ///< "shard", "tensor", "pp"
  std::string what;                  ///< "parameters", "gradients", "rows", "keys and values", "activations"
  Collective collective = Collective::all_gather;
  GroupShape group;
  double calls = 0;                  ///< in a step
  double bytes = 0;                  ///< that a rank sends in a step
  double seconds = 0;                ///< of a step, were nothing beside it
  double exposed = 0;                ///< of those, that compute does not hide
};

struct Prediction {
  std::int64_t parameters = 0;
  std::int64_t microbatches = 1, live_rows = 0;
  double tokens = 0;                 ///< of a step, all ranks
  double model_flop_per_token = 0;   ///< forward and backward once
  double rank_flop = 0;              ///< of a step on the busiest rank, as run
  std::vector<Memory> memory;        ///< by pipeline rank
  std::size_t worst = 0;             ///< index in `memory`
  std::vector<Traffic> traffic;
  // With a device:
  bool timed = false;
  double compute = 0;                ///< seconds of a step on the busiest pipeline rank, communication apart
  double optimizer = 0;              ///< of those, the norm and the update
  double exposed = 0;                ///< seconds that it waits for communication
  double bubble = 0;                 ///< share of the pipeline's time that ranks are idle
  double step = 0;                   ///< seconds
  double tokens_per_rank = 0;        ///< a second
  double share_of_peak = 0;
};

struct Sources {
  ModelMaker model;
  std::function<std::shared_ptr<Optimizer>()> optimizer;
};

/// Memory and traffic of a step, and its time when there is a device. Takes time with the model's layers and pipeline ranks,
/// not with the ranks of the job.
CAPSTAN_API Prediction predict(const Sources& sources, const Setting& setting, const DeviceModel* device, const Assumptions& assumptions = {});

/// The calls that each stage runs, cut by cost as the trainer cuts them. Error(input) when there are more stages than calls.
CAPSTAN_API std::vector<std::vector<int>> cut_stages(const Profile& profile, int stages);

/// Where the ranks are that differ from rank 0 in these axes only ("shard+context"), `per_host` ranks on a host.
CAPSTAN_API GroupShape group_shape(const MeshLayout& layout, const std::string& axes, int per_host);

}  // namespace capstan::plan
