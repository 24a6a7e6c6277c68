// PagedState: pages, block tables, copy on write. Keys and values are written by rows: a page holds, for each head, 64
// consecutive rows of head_size elements, which is what attention reads as one tile.
#include <capstan/paged_state.h>
#include <kernels/backend.h>

#include <algorithm>
#include <functional>
#include <set>

namespace capstan {

PagedState::~PagedState() = default;

PagedState::PagedState(Device& device, DType dtype, std::span<const StateSpec> specs, std::int64_t tokens)
    : device_(device.shared_from_this()) {
  if (tokens < 1)
    fail(Fault::programming, "PagedState", "expected room for at least one token, got " + std::to_string(tokens));
  const std::int64_t pages = pages_of(tokens);
  references_.assign(static_cast<std::size_t>(pages), 0);
  // Taken from the back: low pages are used again first, and pages never needed are never touched.
  for (std::int64_t p = pages; p-- > 0;) free_.push_back(static_cast<std::int32_t>(p));
  for (const StateSpec& spec : specs) {
    if (spec.kind != StateSpec::Kind::paged) {
      fail(Fault::input, spec.name,
           "this layer keeps a state for each sequence, and the engine keeps paged keys and values only; "
           "choose an inference engine that holds such states");
    }
    if (spec.shape.size() != 2) {
      fail(Fault::programming, spec.name,
           "paged state: expected the shape [kv_heads, head_size], got " + to_string(spec.shape));
    }
    const Dims shape{pages, spec.shape[0], page_tokens, spec.shape[1]};
    Store store{Tensor::empty(shape, dtype, device), Tensor::empty(shape, dtype, device), spec.shape};
    if (!stores_.emplace(spec.name, std::move(store)).second) {
      fail(Fault::programming, spec.name, "two blocks declare a state of this name; names are unique within a model");
    }
  }
}

PagedState::Sequence& PagedState::find(std::int64_t id, const char* what) {
  return const_cast<Sequence&>(static_cast<const PagedState*>(this)->find(id, what));
}

const PagedState::Sequence& PagedState::find(std::int64_t id, const char* what) const {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) {
    fail(Fault::programming, std::string("PagedState::") + what, "no sequence has the id " + std::to_string(id));
  }
  return it->second;
}

void PagedState::refuse_inside(const char* what) const {
  if (!forward_.empty()) {
    fail(Fault::programming, std::string("PagedState::") + what, "not between begin() and end() of a forward");
  }
}

std::int64_t PagedState::open(std::uint64_t weights_version) {
  Sequence sequence;
  sequence.version = weights_version;
  sequences_.emplace(next_id_, std::move(sequence));
  return next_id_++;
}

void PagedState::close(std::int64_t id) {
  refuse_inside("close");
  Sequence& sequence = find(id, "close");
  // From the end, so that the pages of a sequence's start are handed out again first.
  for (auto it = sequence.blocks.rbegin(); it != sequence.blocks.rend(); ++it) drop(*it);
  sequences_.erase(id);
}

std::int64_t PagedState::length(std::int64_t id) const { return find(id, "length").length; }

std::int32_t PagedState::take() {
  const std::int32_t page = free_.back();
  free_.pop_back();
  references_[static_cast<std::size_t>(page)] = 1;
  return page;
}

void PagedState::drop(std::int32_t page) {
  if (--references_[static_cast<std::size_t>(page)] == 0) free_.push_back(page);
}

std::int64_t PagedState::pages_needed(std::int64_t id, std::int64_t tokens) const {
  const Sequence& s = find(id, "pages_needed");
  std::int64_t needed = std::max<std::int64_t>(0, pages_of(s.length + tokens) - static_cast<std::int64_t>(s.blocks.size()));
  // The page that the first new token falls into may be shared with a fork; later ones are new.
  const auto first = static_cast<std::size_t>(s.length / page_tokens);
  if (first < s.blocks.size() && references_[static_cast<std::size_t>(s.blocks[first])] > 1) ++needed;
  return needed;
}

void PagedState::begin(std::span<const std::int64_t> ids, std::span<const std::int32_t> tokens, const PagedCapacity& capacity) {
  refuse_inside("begin");
  if (ids.size() != tokens.size() || ids.empty()) {
    fail(Fault::programming, "PagedState::begin",
         "expected as many ids as token counts, at least one; got " + std::to_string(ids.size()) + " and " +
             std::to_string(tokens.size()));
  }
  std::set<std::int64_t> seen;
  std::int64_t needed = 0, rows_asked = 0, most_pages = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (!seen.insert(ids[i]).second) {
      fail(Fault::programming, "PagedState::begin", "sequence " + std::to_string(ids[i]) + " is named twice");
    }
    if (tokens[i] < 1) {
      fail(Fault::programming, "PagedState::begin",
           "sequence " + std::to_string(ids[i]) + ": expected at least one new token, got " + std::to_string(tokens[i]));
    }
    needed += pages_needed(ids[i], tokens[i]);
    rows_asked += tokens[i], most_pages = std::max(most_pages, pages_of(find(ids[i], "begin").length + tokens[i]));
  }
  if (capacity.sequences > 0 && (static_cast<std::int64_t>(ids.size()) > capacity.sequences || rows_asked > capacity.rows || most_pages > capacity.pages)) {
    fail(Fault::programming, "PagedState::begin",
         "expected at most " + std::to_string(capacity.sequences) + " sequences, " + std::to_string(capacity.rows) + " rows and " + std::to_string(capacity.pages) +
             " pages of one, got " + std::to_string(ids.size()) + ", " + std::to_string(rows_asked) + " and " + std::to_string(most_pages));
  }
  // Counted one by one, a page shared by two of these sequences is copied for both though one copy would do; the bound
  // holds either way, and begin() never fails half way.
  if (needed > pages_free()) {
    fail(Fault::runtime, "PagedState::begin",
         "the pool of keys and values is full: expected " + std::to_string(needed) + " free pages of " +
             std::to_string(page_tokens) + " tokens, got " + std::to_string(pages_free()) + " of " +
             std::to_string(pages()) + "; raise max_tokens_held or run fewer requests at once");
  }
  std::size_t most = 1;
  forward_tokens_ = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Sequence& s = find(ids[i], "begin");
    const auto first = static_cast<std::size_t>(s.length / page_tokens);
    if (first < s.blocks.size() && references_[static_cast<std::size_t>(s.blocks[first])] > 1) {
      const std::int32_t own = take();
      copy_page(s.blocks[first], own);
      drop(s.blocks[first]);
      s.blocks[first] = own;
    }
    while (static_cast<std::int64_t>(s.blocks.size()) < pages_of(s.length + tokens[i])) s.blocks.push_back(take());
    most = std::max(most, s.blocks.size());
    forward_.push_back({ids[i], tokens[i]});
    forward_tokens_ += tokens[i];
  }
  const std::size_t n = capacity.sequences > 0 ? static_cast<std::size_t>(capacity.sequences) : ids.size();
  if (capacity.sequences > 0) most = static_cast<std::size_t>(capacity.pages);
  std::vector<std::int32_t> table(n * most, 0), lengths(n, 0);
  std::vector<std::int64_t> rows;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const Sequence& s = find(ids[i], "begin");
    std::copy(s.blocks.begin(), s.blocks.end(), table.begin() + static_cast<std::ptrdiff_t>(i * most));
    lengths[i] = static_cast<std::int32_t>(s.length + tokens[i]);
    for (std::int64_t t = s.length; t < s.length + tokens[i]; ++t)
      rows.push_back(s.blocks[static_cast<std::size_t>(t / page_tokens)] * page_tokens + t % page_tokens);
  }
  if (capacity.sequences > 0) rows.resize(static_cast<std::size_t>(capacity.rows), -1);
  const Dims shape{static_cast<std::int64_t>(n), static_cast<std::int64_t>(most)};
  const auto count = static_cast<std::int64_t>(rows.size());
  Tables fresh;
  Tables& to = capacity.sequences > 0 ? fixed_[capacity.sequences] : fresh;
  if (!to.blocks.defined() || !(to.blocks.shape() == shape) || to.rows.numel() != count)
    to = {Tensor::empty(shape, DType::i32, *device_), Tensor::empty({shape[0]}, DType::i32, *device_), Tensor::empty({count}, DType::i64, *device_)};
  to.blocks.copy_from_host(table.data(), to.blocks.bytes());
  to.lengths.copy_from_host(lengths.data(), to.lengths.bytes());
  to.rows.copy_from_host(rows.data(), to.rows.bytes());
  tables_ = to;
}

void PagedState::end() {
  if (forward_.empty()) fail(Fault::programming, "PagedState::end", "no forward was begun");
  for (const Part& part : forward_) find(part.id, "end").length += part.tokens;
  forward_.clear();
}

void PagedState::cancel() {
  if (forward_.empty()) fail(Fault::programming, "PagedState::cancel", "no forward was begun");
  const std::vector<Part> parts = std::move(forward_);
  forward_.clear();
  for (const Part& part : parts) truncate(part.id, find(part.id, "cancel").length);
}

void PagedState::truncate(std::int64_t id, std::int64_t length) {
  refuse_inside("truncate");
  Sequence& s = find(id, "truncate");
  if (length > s.length || length < s.committed) {
    fail(Fault::programming, "PagedState::truncate",
         "sequence " + std::to_string(id) + ": expected a length from " + std::to_string(s.committed) + " (committed) to " +
             std::to_string(s.length) + " (held), got " + std::to_string(length));
  }
  s.length = length;
  while (static_cast<std::int64_t>(s.blocks.size()) > pages_of(length)) {
    drop(s.blocks.back());
    s.blocks.pop_back();
  }
}

void PagedState::commit(std::int64_t id, std::int64_t length) {
  Sequence& s = find(id, "commit");
  if (length > s.length || length < s.committed) {
    fail(Fault::programming, "PagedState::commit",
         "sequence " + std::to_string(id) + ": expected a length from " + std::to_string(s.committed) + " (committed) to " +
             std::to_string(s.length) + " (held), got " + std::to_string(length));
  }
  s.committed = length;
}

std::int64_t PagedState::fork(std::int64_t id) {
  refuse_inside("fork");
  Sequence copy = find(id, "fork");
  for (const std::int32_t page : copy.blocks) ++references_[static_cast<std::size_t>(page)];
  sequences_.emplace(next_id_, std::move(copy));
  return next_id_++;
}

std::uint64_t PagedState::weights_version(std::int64_t id) const { return find(id, "weights_version").version; }

Tensor PagedState::slot(std::string_view name) {
  fail(Fault::programming, std::string(name),
       "PagedState keeps pages only; declare the state as paged or use another engine");
}

void PagedState::copy_page(std::int32_t from, std::int32_t to) const {
  for (const auto& [name, store] : stores_) {
    store.k.narrow(0, to, 1).copy_from(store.k.narrow(0, from, 1));
    store.v.narrow(0, to, 1).copy_from(store.v.narrow(0, from, 1));
  }
}

PagedKV PagedState::append(std::string_view name, const Tensor& k, const Tensor& v) {
  const auto it = stores_.find(name);
  if (it == stores_.end())
    fail(Fault::programming, std::string(name), "appends to a state that no block of the model declared");
  const Store& store = it->second;
  if (forward_.empty()) fail(Fault::programming, std::string(name), "append() outside begin() and end() of a forward");
  for (const Tensor* t : {&k, &v}) {
    if (t->rank() != 3 || t->size(0) < tables_.rows.numel() || t->size(1) != store.shape[0] || t->size(2) != store.shape[1] ||
        t->dtype() != store.k.dtype()) {
      fail(Fault::programming, std::string(name),
           "append: expected " + std::string(name_of(store.k.dtype())) + " [" + std::to_string(tables_.rows.numel()) +
               " or more, " + std::to_string(store.shape[0]) + ", " + std::to_string(store.shape[1]) + "], got " +
               std::string(name_of(t->dtype())) + " " + to_string(t->shape()));
    }
  }
  if (!k.is_meta()) {
    for (const auto& [source, target] : {std::pair<Tensor, Tensor>{k, store.k}, std::pair<Tensor, Tensor>{v, store.v}}) {
      const Tensor from = source.strides()[2] == 1 ? source : source.contiguous();
      from.device().backend().store_pages(static_cast<kernels::Num>(from.dtype()), tables_.rows.numel(), store.shape[0], store.shape[1],
                                          page_tokens, from.raw(), from.strides()[0], from.strides()[1], tables_.rows.data<std::int64_t>(), target.raw());
    }
  }
  return {store.k, store.v, tables_.blocks, tables_.lengths, page_tokens};
}

}  // namespace capstan
