// defines: EngineOptions, BasicEngine: continuous batching over paged keys and values.
#pragma once
#include "sampler.h"
#include "text_stream.h"

#include <capstan/inference.h>
#include <capstan/paged_state.h>
#include <capstan/recorded.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace capstan::basic {

struct EngineOptions {
  std::int64_t max_tokens_held = 16384;  ///< room for keys and values, over all requests
  std::int64_t max_batch_tokens = 512;   ///< rows of one forward: decoded tokens and chunks of prompts together
  std::int64_t max_batch = 32;           ///< requests in progress at once
  bool record = true, record_or_fail = false;  ///< steps on a GPU in which every request decodes
  std::string record_where = "cuda_graphs";    ///< the place that asks for it, in messages
};

/// Every request has tokens (its prompt and what was sampled) of which the state holds the first ones. A step gives each
/// request rows for tokens not yet held, as many as the budget of rows allows: one when it decodes, a chunk when its
/// prompt is long or new. A request that reaches its last token is sampled. When pages run short, the request that came
/// last gives up its pages and starts over later; nobody's result changes by any of this (the numerics contract).
class BasicEngine : public InferenceEngine {
 public:
  explicit BasicEngine(const EngineOptions& options) : options_(options) {}
  ~BasicEngine() override;
  void attach(std::shared_ptr<Model> model, std::shared_ptr<const Tokenizer> tokenizer, std::shared_ptr<Device> device,
              DType dtype, std::uint64_t weights_version) override;
  void submit(Request request) override;
  bool step(const std::function<void(std::int64_t id, const std::string& text)>& on_text) override;
  std::vector<Completion> finished() override;

 private:
  struct Running {
    Request request;
    std::vector<std::int32_t> tokens;  // prompt and sampled
    std::int64_t sequence = -1;        // in the state; -1 while it waits
    TextStream stream;
    Completion out;
  };
  struct Part {
    Running* request;
    std::int32_t rows;
  };  // of one forward
  struct Sampled {
    Running* request;
    std::int32_t token;
    float logprob;
  };

  std::int64_t rows_missing(const Running& r) const;
  std::vector<Part> plan();
  bool make_room(std::int64_t pages, const Running& asking, const std::vector<Part>& planned);
  Batch batch_of(const std::vector<Part>& parts) const;
  bool decodes(const std::vector<Part>& parts) const;
  PagedCapacity capacity_of(const std::vector<Part>& parts) const;
  /// The batch, its hidden states and logits by rows of a forward.
  struct Decode {
    Batch batch;
    Tensor last;            // i32: every row ends a sequence
    Tensor hidden, logits;
    std::unique_ptr<Recorded> work;
  };
  Decode& decode(const std::vector<Part>& parts);
  std::vector<Sampled> forward(const std::vector<Part>& parts);
  /// Adds a sampled token; true when the request is done.
  bool accept(const Sampled& sampled, const std::function<void(std::int64_t, const std::string&)>& on_text);

  EngineOptions options_;
  std::shared_ptr<Model> model_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::shared_ptr<Device> device_;
  DType dtype_ = DType::f32;
  std::uint64_t version_ = 0;
  std::int64_t room_ = 0;     // tokens of all requests that the state holds
  std::int64_t longest_ = 0;  // tokens of one request that model and state can hold
  std::unique_ptr<PagedState> state_;  // while there are requests
  std::map<std::int64_t, Decode> decodes_;  // over the pages of state_, by sequences
  std::deque<std::unique_ptr<Running>> waiting_, running_;  // in order of admission
  std::vector<Completion> finished_;
};

}  // namespace capstan::basic
