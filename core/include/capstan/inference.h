// defines: SamplingParams and their ranges, Request, Completion, InferenceEngine, the interface of plugin kind "inference".
#pragma once
#include <capstan/model.h>
#include <capstan/tokenizer.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace capstan {

struct SamplingParams {
  double temperature = 1;         ///< 0: the most likely token
  std::int64_t top_k = 0;         ///< 0: all
  double top_p = 1;               ///< (0, 1]
  double min_p = 0;               ///< [0, 1]
  std::uint64_t seed = 0;
  std::int64_t max_tokens = 128;
  std::vector<std::string> stop;  ///< texts that end the completion; not part of it
  bool logprobs = false;
};

/// Error(input) when one of them is out of its range. `where`: from its name above to the place that the message gives,
/// "request 4, top_k" or "--top-k". For engines in submit(), and for whoever wants to know before there is one.
CAPSTAN_API void check_sampling(const SamplingParams& params, const std::function<std::string(const std::string& name)>& where);

struct Request {
  std::int64_t id = 0;            ///< addresses the sampler's randomness, with the seed
  std::vector<std::int32_t> prompt;
  SamplingParams sampling;
};

struct Completion {
  std::int64_t id = 0;
  std::vector<std::int32_t> tokens;
  std::string text;
  std::string finish;             ///< "stop", "length", "end_of_document"
  std::vector<float> logprobs;    ///< of the sampled tokens under the model (temperature 1), when asked for
};

/// Runs a model on requests. Many requests share forwards; none changes another's result.
class CAPSTAN_API InferenceEngine {
 public:
  virtual ~InferenceEngine();
  /// Attaches placed weights. `dtype` is that of the weights' working copies.
  virtual void attach(std::shared_ptr<Model> model, std::shared_ptr<const Tokenizer> tokenizer, std::shared_ptr<Device> device,
                      DType dtype, std::uint64_t weights_version) = 0;
  /// Error(input) when the request cannot be met (too long, sampling parameters out of range).
  virtual void submit(Request request) = 0;
  /// One forward over whatever is to be done. False when nothing is left. `on_text` gets new text as it
  /// becomes final (never half a UTF-8 character, never part of a stop text).
  virtual bool step(const std::function<void(std::int64_t id, const std::string& text)>& on_text) = 0;
  /// Completions since the last call.
  virtual std::vector<Completion> finished() = 0;
};

}  // namespace capstan
