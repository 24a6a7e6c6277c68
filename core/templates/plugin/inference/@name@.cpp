// The inference engine "@name@": a start to write your own from. One request after the other, and for every token one forward
// over the whole text so far: no past is kept, so nothing can be wrong with it. The next step is a SequenceState
// (capstan/paged_state.h), with which a forward takes only the new tokens, and batches of several requests.
#include <capstan/error.h>
#include <capstan/inference.h>
#include <capstan/plugin.h>
#include <capstan/random.h>
#include <capstan/walk.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace capstan;

/// The token at `position`, a function of the logits, the seed, the request and the position alone.
std::int32_t sample(const std::vector<float>& logits, const Request& request, std::size_t position) {
  const SamplingParams& s = request.sampling;
  std::vector<std::int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
  if (s.temperature == 0) return ids[0];
  std::vector<double> p;  // relative to the likeliest, falling
  for (const auto id : ids) p.push_back(std::exp((double(logits[id]) - double(logits[ids[0]])) / s.temperature));
  if (s.top_k > 0) p.resize(std::min(p.size(), static_cast<std::size_t>(s.top_k)));
  const double whole = std::accumulate(p.begin(), p.end(), 0.0);
  std::size_t keep = 0;
  for (double sum = 0; keep < p.size() && (keep == 0 || sum < s.top_p * whole) && p[keep] >= s.min_p; ++keep) sum += p[keep];
  const double left = std::accumulate(p.begin(), p.begin() + static_cast<std::ptrdiff_t>(keep), 0.0);
  double u = left * Rng(s.seed, "@name@", static_cast<std::uint64_t>(request.id)).uniform(position);
  for (std::size_t i = 0; i < keep; ++i)
    if ((u -= p[i]) < 0) return ids[i];
  return ids[keep - 1];
}

/// Valid UTF-8: bytes that are no part of a character become '?'.
std::string printable(const std::string& bytes) {
  std::string text;
  for (std::size_t i = 0, n; i < bytes.size(); i += n) {
    const auto at = [&](std::size_t j) { return i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0u; };
    const unsigned a = at(0), b = at(1);
    n = a < 0x80 ? 1 : a >= 0xC2 && a <= 0xDF ? 2 : a >= 0xE0 && a <= 0xEF ? 3 : a >= 0xF0 && a <= 0xF4 ? 4 : 0;
    bool good = n > 0 && !(a == 0xE0 && b < 0xA0) && !(a == 0xED && b > 0x9F) && !(a == 0xF0 && b < 0x90) && !(a == 0xF4 && b > 0x8F);
    for (std::size_t j = 1; j < n; ++j) good = good && at(j) >> 6 == 2;
    if (!good) n = 1;
    text += good ? bytes.substr(i, n) : "?";
  }
  return text;
}

class @Name@ : public InferenceEngine {
 public:
  void attach(std::shared_ptr<Model> model, std::shared_ptr<const Tokenizer> tokenizer, std::shared_ptr<Device> device, DType dtype,
              std::uint64_t) override {
    if (!waiting_.empty()) fail(Fault::programming, "@name@", "attach() while requests are in progress");
    if (tokenizer->vocabulary() > model->vocabulary()) {
      fail(Fault::input, "@name@", "the tokenizer has " + std::to_string(tokenizer->vocabulary()) + " tokens, the model " +
                                       std::to_string(model->vocabulary()) + ": they do not belong together");
    }
    model_ = std::move(model), tokenizer_ = std::move(tokenizer), device_ = std::move(device), dtype_ = dtype;
  }

  void submit(Request request) override {
    if (!model_) fail(Fault::programming, "@name@", "submit() before attach()");
    const std::string where = "request " + std::to_string(request.id);
    check_sampling(request.sampling, [&](const std::string& name) { return where + ", " + name; });
    if (request.prompt.empty() || full(request.prompt.size() - 1)) {
      fail(Fault::input, where, "expected a prompt of 1 to " + std::to_string(model_->longest()) + " tokens, got " +
                                    std::to_string(request.prompt.size()));
    }
    for (const auto token : request.prompt) {
      if (token >= 0 && token < model_->vocabulary()) continue;
      fail(Fault::input, where, "expected tokens of 0 to " + std::to_string(model_->vocabulary() - 1) + ", got " + std::to_string(token));
    }
    Running r{request.prompt, {}, {}, std::move(request)};
    r.out.id = r.request.id;
    waiting_.push_back(std::move(r));
  }

  /// The text is given when the request is done: until then a stop text might end it earlier.
  bool step(const std::function<void(std::int64_t, const std::string&)>& on_text) override {
    if (waiting_.empty()) return false;
    Running& r = waiting_.front();
    advance(r);
    if (!r.out.finish.empty()) {
      r.out.text = printable(r.bytes);
      if (on_text && !r.out.text.empty()) on_text(r.out.id, r.out.text);
      finished_.push_back(std::move(r.out));
      waiting_.pop_front();
    }
    return !waiting_.empty();
  }

  std::vector<Completion> finished() override { return std::exchange(finished_, {}); }

 private:
  struct Running {
    std::vector<std::int32_t> tokens;  // prompt and sampled
    std::string bytes;                 // of the sampled
    Completion out;
    Request request;
  };

  /// Whether a text of that many tokens takes no further one.
  bool full(std::size_t tokens) const { return model_->longest() > 0 && static_cast<std::int64_t>(tokens) >= model_->longest(); }

  /// Samples one more token.
  void advance(Running& r) {
    const auto rows = static_cast<std::int32_t>(r.tokens.size()), last = rows - 1;
    const Batch batch = make_batch(*device_, r.tokens, {&rows, 1});
    ForwardContext context(batch, *device_, dtype_);
    run_forward(*model_, context, false);
    const Tensor row = model_->head().logits(context, Tensor::of<std::int32_t>({&last, 1}, {1}, *device_)).to(DType::f32).contiguous();
    std::vector<float> logits(static_cast<std::size_t>(row.numel()));
    row.copy_to_host(logits.data(), row.bytes());
    logits.resize(static_cast<std::size_t>(tokenizer_->vocabulary()));  // a model may have more; those stand for nothing
    if (!std::all_of(logits.begin(), logits.end(), [](float l) { return std::isfinite(l); })) {
      fail(Fault::runtime, "@name@", "a logit is not finite: the model's weights are broken; use an earlier checkpoint");
    }
    const SamplingParams& s = r.request.sampling;
    const std::int32_t token = sample(logits, r.request, r.tokens.size());
    r.tokens.push_back(token);
    r.out.tokens.push_back(token);
    if (s.logprobs) {
      double sum = 0;
      for (const float l : logits) sum += std::exp(double(l) - double(logits[token]));
      r.out.logprobs.push_back(static_cast<float>(-std::log(sum)));
    }
    if (token == tokenizer_->end_of_document()) {
      r.out.finish = "end_of_document";
      return;
    }
    r.bytes += tokenizer_->decode({&token, 1});
    std::size_t end = std::string::npos;
    for (const auto& stop : s.stop) end = std::min(end, r.bytes.find(stop));
    if (end != std::string::npos) r.bytes.resize(end), r.out.finish = "stop";
    else if (static_cast<std::int64_t>(r.out.tokens.size()) == s.max_tokens || full(r.tokens.size() - 1)) r.out.finish = "length";
  }

  std::shared_ptr<Model> model_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::shared_ptr<Device> device_;
  DType dtype_ = DType::f32;
  std::deque<Running> waiting_;  // the first is in progress
  std::vector<Completion> finished_;
};

}  // namespace

CAPSTAN_PLUGIN("inference", "@name@", "0.1.0") {
  registrar.add("inference", "@name@", Schema(), [](const Options&, Registrar&) {
    return as_interface<InferenceEngine>(std::make_shared<@Name@>());
  });
}
