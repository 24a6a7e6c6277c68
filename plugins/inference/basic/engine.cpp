// BasicEngine: see engine.h.
#include "engine.h"

#include <capstan/ops.h>
#include <capstan/walk.h>

#include <algorithm>
#include <set>
#include <utility>

namespace capstan::basic {

BasicEngine::~BasicEngine() = default;

void BasicEngine::attach(std::shared_ptr<Model> model, std::shared_ptr<const Tokenizer> tokenizer,
                         std::shared_ptr<Device> device, DType dtype, std::uint64_t weights_version) {
  if (!running_.empty() || !waiting_.empty()) {
    fail(Fault::programming, "basic", "attach() while requests are in progress: what they hold was made by other weights");
  }
  if (tokenizer->vocabulary() > model->vocabulary()) {
    fail(Fault::input, "basic",
         "tokenizer " + std::string(tokenizer->name()) + " and model do not belong together: expected " +
             std::to_string(tokenizer->vocabulary()) + " tokens or more, the model has " +
             std::to_string(model->vocabulary()));
  }
  if (options_.record_or_fail && device->kind() != DeviceKind::cuda)
    fail(Fault::input, options_.record_where, "there is no GPU to record steps on: expected auto or off here, got on");
  decodes_.clear();
  state_.reset();
  model_ = std::move(model);
  tokenizer_ = std::move(tokenizer);
  device_ = std::move(device);
  dtype_ = dtype;
  version_ = weights_version;
  const std::int64_t longest = model_->longest();
  room_ = PagedState::pages_of(options_.max_tokens_held);
  if (longest > 0) room_ = std::min(room_, options_.max_batch * PagedState::pages_of(longest));
  room_ *= PagedState::page_tokens;
  longest_ = longest > 0 ? std::min(room_, longest) : room_;
}

void BasicEngine::submit(Request request) {
  if (!model_) fail(Fault::programming, "basic", "submit() before attach()");
  const std::string where = "request " + std::to_string(request.id);
  check_sampling(request.sampling, [&](const std::string& name) { return where + ", " + name; });
  if (request.prompt.empty()) fail(Fault::input, where, "the prompt has no tokens: expected at least one to continue from");
  const auto length = static_cast<std::int64_t>(request.prompt.size());
  if (length > longest_) {
    fail(Fault::input, where,
         "the prompt is too long: expected at most " + std::to_string(longest_) + " tokens (the model takes " +
             std::to_string(model_->longest()) + ", the engine holds " + std::to_string(room_) + "), got " +
             std::to_string(length));
  }
  for (std::size_t i = 0; i < request.prompt.size(); ++i) {
    if (request.prompt[i] < 0 || request.prompt[i] >= model_->vocabulary()) {
      fail(Fault::input, where,
           "token " + std::to_string(i) + " of the prompt: expected an id from 0 to " +
               std::to_string(model_->vocabulary() - 1) + ", got " + std::to_string(request.prompt[i]));
    }
  }
  for (const auto* queue : {&waiting_, &running_}) {
    for (const auto& r : *queue) {
      if (r->request.id == request.id)
        fail(Fault::input, where, "a request of this id is in progress; ids address randomness and results");
    }
  }
  if (!state_) {
    const std::vector<StateSpec> specs = model_->state();
    state_ = std::make_unique<PagedState>(*device_, dtype_, specs, room_);
  }
  auto r = std::make_unique<Running>(Running{{}, request.prompt, -1, TextStream(request.sampling.stop), {}});
  r->out.id = request.id;
  r->request = std::move(request);
  waiting_.push_back(std::move(r));
}

std::int64_t BasicEngine::rows_missing(const Running& r) const {
  return static_cast<std::int64_t>(r.tokens.size()) - state_->length(r.sequence);
}

bool BasicEngine::make_room(std::int64_t pages, const Running& asking, const std::vector<Part>& planned) {
  while (state_->pages_free() < pages) {
    const auto last = std::find_if(running_.rbegin(), running_.rend(), [&](const std::unique_ptr<Running>& r) {
      return r.get() != &asking &&
             std::none_of(planned.begin(), planned.end(), [&](const Part& p) { return p.request == r.get(); });
    });
    if (last == running_.rend()) return false;
    state_->close((*last)->sequence);
    (*last)->sequence = -1;
    waiting_.push_front(std::move(*last));
    running_.erase(std::next(last).base());
  }
  return true;
}

std::vector<BasicEngine::Part> BasicEngine::plan() {
  std::vector<Part> parts;
  std::int64_t budget = options_.max_batch_tokens, pages = 0;
  const std::size_t waiting_before = waiting_.size();
  // Requests that decode go first: theirs is the wait that a reader sees. Pages are counted, not yet taken.
  for (const bool decoding : {true, false}) {
    std::vector<Running*> order;
    for (const auto& r : running_) {
      if ((rows_missing(*r) == 1) == decoding) order.push_back(r.get());
    }
    for (Running* r : order) {
      if (r->sequence < 0) continue;  // gave up its pages just now
      const std::int64_t rows = std::min(rows_missing(*r), budget);
      if (rows == 0) break;
      const std::int64_t needed = state_->pages_needed(r->sequence, rows);
      if (!make_room(pages + needed, *r, parts)) continue;
      pages += needed;
      budget -= rows;
      parts.push_back({r, static_cast<std::int32_t>(rows)});
    }
  }
  // While some give up their pages, nobody new comes in.
  const bool crowded = waiting_.size() > waiting_before;
  while (!crowded && !waiting_.empty() && budget > 0 && static_cast<std::int64_t>(running_.size()) < options_.max_batch) {
    Running& r = *waiting_.front();
    const auto length = static_cast<std::int64_t>(r.tokens.size());
    // Room for all of it and a first token, so that it need not give up at once.
    if (pages + PagedState::pages_of(std::min(length + 1, longest_)) > state_->pages_free()) break;
    const std::int64_t rows = std::min(length, budget);
    r.sequence = state_->open(version_);
    pages += state_->pages_needed(r.sequence, rows);
    budget -= rows;
    parts.push_back({&r, static_cast<std::int32_t>(rows)});
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
  return parts;
}

Batch BasicEngine::batch_of(const std::vector<Part>& parts) const {
  std::vector<std::int32_t> tokens, positions;
  std::vector<std::int64_t> sample_ids;
  Space space;
  space.host_starts.push_back(0);
  for (const Part& part : parts) {
    const std::int64_t held = state_->length(part.request->sequence);
    for (std::int64_t i = held; i < held + part.rows; ++i) {
      tokens.push_back(part.request->tokens[static_cast<std::size_t>(i)]);
      positions.push_back(static_cast<std::int32_t>(i));
      sample_ids.push_back(static_cast<std::int64_t>(sample_ids.size()));
    }
    space.past.push_back(static_cast<std::int32_t>(held));
    space.host_starts.push_back(static_cast<std::int32_t>(tokens.size()));
    space.longest = std::max(space.longest, held + part.rows);
  }
  const auto rows = static_cast<std::int64_t>(tokens.size());
  space.capacity = rows;
  space.starts =
      Tensor::of<std::int32_t>(space.host_starts, {static_cast<std::int64_t>(space.host_starts.size())}, *device_);
  space.positions = Tensor::of<std::int32_t>(positions, {rows}, *device_);
  space.sample_ids = Tensor::of<std::int64_t>(sample_ids, {rows}, *device_);
  Batch batch;
  batch.spaces.push_back(std::move(space));
  batch.set("tokens", Tensor::of<std::int32_t>(tokens, {rows}, *device_));
  return batch;
}

/// On a GPU, with one token for each: then shapes are fixed but for the number of requests.
bool BasicEngine::decodes(const std::vector<Part>& parts) const {
  return device_->kind() == DeviceKind::cuda &&
         std::all_of(parts.begin(), parts.end(), [&](const Part& p) { return p.rows == 1 && rows_missing(*p.request) == 1; });
}

PagedCapacity BasicEngine::capacity_of(const std::vector<Part>& parts) const {
  if (!decodes(parts)) return {};
  std::int64_t n = 1;
  while (n < static_cast<std::int64_t>(parts.size())) n *= 2;
  return {n, n, PagedState::pages_of(longest_ + 1)};
}

BasicEngine::Decode& BasicEngine::decode(const std::vector<Part>& parts) {
  const std::int64_t n = capacity_of(parts).sequences;
  const auto capacity = static_cast<std::size_t>(n), used = parts.size();
  Decode& d = decodes_[n];
  if (!d.work) {
    Space space;
    space.recorded = true;
    space.capacity = n, space.longest = longest_;
    space.host_starts.resize(capacity + 1), space.past.assign(capacity, 0);
    space.starts = Tensor::empty({n + 1}, DType::i32, *device_);
    space.positions = Tensor::empty({n}, DType::i32, *device_);
    space.sample_ids = Tensor::zeros({n}, DType::i64, *device_);
    d.batch.spaces.push_back(std::move(space));
    d.batch.set("tokens", Tensor::empty({n}, DType::i32, *device_));
    std::vector<std::int32_t> rows(capacity);
    for (std::size_t i = 0; i < capacity; ++i) rows[i] = static_cast<std::int32_t>(i);
    d.last = Tensor::of<std::int32_t>(rows, {n}, *device_);
    d.hidden = Tensor::empty({n, model_->hidden()}, dtype_, *device_);
    d.logits = Tensor::empty({n, model_->head().vocabulary()}, DType::f32, *device_);
    d.work = std::make_unique<Recorded>(*device_, options_.record, options_.record_or_fail);
  }
  std::vector<std::int32_t> tokens(capacity, 0), positions(capacity, 0);
  Space& space = d.batch.spaces[0];
  for (std::size_t i = 0; i < capacity; ++i) {
    space.host_starts[i + 1] = static_cast<std::int32_t>(std::min(i + 1, used));
    if (i >= used) continue;
    tokens[i] = parts[i].request->tokens.back();
    positions[i] = static_cast<std::int32_t>(parts[i].request->tokens.size()) - 1;
  }
  space.starts.copy_from_host(space.host_starts.data(), space.starts.bytes());
  space.positions.copy_from_host(positions.data(), space.positions.bytes());
  d.batch.stream("tokens").copy_from_host(tokens.data(), n * size_of(DType::i32));
  d.work->run([&] {
    ForwardContext context(d.batch, *device_, dtype_);
    context.state = state_.get();
    run_forward(*model_, context, false);
    d.hidden.copy_from(context.get("h"));
    d.logits.copy_from(model_->head().logits(context, d.last));
  });
  return d;
}

std::vector<BasicEngine::Sampled> BasicEngine::forward(const std::vector<Part>& parts) {
  Decode* fixed = decodes(parts) ? &decode(parts) : nullptr;
  const Batch batch = fixed != nullptr ? fixed->batch : batch_of(parts);
  ForwardContext context(batch, *device_, dtype_);
  context.state = state_.get();
  if (fixed == nullptr) run_forward(*model_, context, false);

  std::vector<Sampled> sampled;
  std::vector<std::int32_t> last;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].rows < rows_missing(*parts[i].request)) continue;  // more of its prompt is to come
    sampled.push_back({parts[i].request, -1, 0});
    last.push_back(batch.space().host_starts[i + 1] - 1);
  }
  if (sampled.empty()) return sampled;
  const auto n = static_cast<std::int64_t>(sampled.size());
  const Tensor rows = Tensor::of<std::int32_t>(last, {n}, *device_);
  const Tensor logits = fixed != nullptr ? fixed->logits.narrow(0, 0, n) : model_->head().logits(context, rows);
  std::vector<float> values(static_cast<std::size_t>(logits.numel()));
  logits.to(DType::f32).contiguous().copy_to_host(values.data(), logits.numel() * size_of(DType::f32));
  // A model may have more rows than its tokenizer has tokens; those stand for nothing.
  const auto vocabulary = static_cast<std::size_t>(tokenizer_->vocabulary());
  const auto stride = static_cast<std::size_t>(logits.size(1));
  bool score = false;
  std::vector<std::int32_t> targets;
  for (std::size_t i = 0; i < sampled.size(); ++i) {
    const Request& request = sampled[i].request->request;
    const std::span<const float> row(values.data() + i * stride, vocabulary);
    sampled[i].token =
        sample(row, request.sampling, request.id, static_cast<std::int64_t>(sampled[i].request->tokens.size()));
    targets.push_back(request.sampling.logprobs ? sampled[i].token : -1);
    score = score || request.sampling.logprobs;
  }
  if (score) {
    // By the head's own scoring, the one that training uses: rollout and trainer agree to the bit.
    ForwardContext rows_only(batch, *device_, dtype_);
    rows_only.set("h", ops::gather(fixed != nullptr ? fixed->hidden : context.get("h"), rows));
    const Score s = model_->head().score(rows_only, Tensor::of<std::int32_t>(targets, {n}, *device_), nullptr, nullptr);
    std::vector<float> logprobs(sampled.size());
    s.logprob.to(DType::f32).contiguous().copy_to_host(logprobs.data(), n * size_of(DType::f32));
    for (std::size_t i = 0; i < sampled.size(); ++i) sampled[i].logprob = logprobs[i];
  }
  return sampled;
}

bool BasicEngine::accept(const Sampled& sampled, const std::function<void(std::int64_t, const std::string&)>& on_text) {
  Running& r = *sampled.request;
  const auto show = [&](const std::string& text) {
    r.out.text += text;
    if (!text.empty() && on_text) on_text(r.out.id, text);
  };
  r.tokens.push_back(sampled.token);
  r.out.tokens.push_back(sampled.token);
  if (r.request.sampling.logprobs) r.out.logprobs.push_back(sampled.logprob);
  if (sampled.token == tokenizer_->end_of_document()) {
    r.out.finish = "end_of_document";
  } else {
    show(r.stream.feed(tokenizer_->decode(std::span(&sampled.token, 1))));
    if (r.stream.stopped())
      r.out.finish = "stop";
    else if (static_cast<std::int64_t>(r.out.tokens.size()) == r.request.sampling.max_tokens ||
             static_cast<std::int64_t>(r.tokens.size()) > longest_)
      r.out.finish = "length";
  }
  if (r.out.finish.empty()) return false;
  show(r.stream.finish());
  return true;
}

bool BasicEngine::step(const std::function<void(std::int64_t, const std::string&)>& on_text) {
  if (waiting_.empty() && running_.empty()) return false;
  const std::vector<Part> parts = plan();
  if (parts.empty())
    fail(Fault::programming, "basic", "no request can go on, though each fits alone; the scheduler is wrong");
  std::vector<std::int64_t> ids;
  std::vector<std::int32_t> counts;
  for (const Part& part : parts) {
    ids.push_back(part.request->sequence);
    counts.push_back(part.rows);
  }
  state_->begin(ids, counts, capacity_of(parts));
  std::vector<Sampled> sampled;
  try {
    sampled = forward(parts);
  } catch (...) {
    state_->cancel();
    throw;
  }
  state_->end();
  std::set<const Running*> done;
  for (const Sampled& s : sampled) {
    if (!accept(s, on_text)) continue;
    state_->close(s.request->sequence);
    finished_.push_back(std::move(s.request->out));
    done.insert(s.request);
  }
  std::erase_if(running_, [&](const std::unique_ptr<Running>& r) { return done.contains(r.get()); });
  if (!waiting_.empty() || !running_.empty()) return true;
  decodes_.clear();
  state_.reset();  // a trainer that takes samples needs the memory for its next step
  return false;
}

std::vector<Completion> BasicEngine::finished() { return std::exchange(finished_, {}); }

}  // namespace capstan::basic
