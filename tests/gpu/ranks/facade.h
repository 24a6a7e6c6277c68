// defines: make_facade(): a world of GPUs that takes host memory, so that the collectives' own tests run on it.
#pragma once
#include "comm/communicator.h"

#include <capstan/device.h>
#include <capstan/tensor.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace capstan::testing {

/// Each call goes on copies on the GPU, and what it leaves there comes back when it is waited for. A block that lies in the
/// other buffer lies there on the GPU too.
class Facade final : public Communicator {
 public:
  Facade(std::shared_ptr<Communicator> inner, std::shared_ptr<Device> device)
      : Communicator(inner->name(), inner->ranks(), inner->rank()), inner_(std::move(inner)), device_(std::move(device)) {}

  Handle all_reduce(void* data, std::int64_t count, DType dtype, Reduction op) override {
    const Tensor t = up(data, count, dtype);
    return back(inner_->all_reduce(t.raw(), count, dtype, op), {{data, t}}, {});
  }
  Handle reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction op) override {
    const Tensor i = up(in, count * size(), dtype), o = inside(out, in, i) ? Tensor() : up(out, count, dtype);
    void* to =
        o.defined() ? o.raw() : static_cast<char*>(i.raw()) + (static_cast<char*>(out) - static_cast<const char*>(in));
    Handle h = inner_->reduce_scatter(i.raw(), to, count, dtype, op);
    return o.defined() ? back(std::move(h), {{out, o}}, {i})
                       : back(std::move(h), {{out, i.narrow(0, rank() * count, count)}}, {i});
  }
  Handle all_gather(const void* in, void* out, std::int64_t count, DType dtype) override {
    const Tensor o = up(out, count * size(), dtype), i = inside(in, out, o) ? Tensor() : up(in, count, dtype);
    const void* from =
        i.defined() ? i.raw() : static_cast<char*>(o.raw()) + (static_cast<const char*>(in) - static_cast<char*>(out));
    return back(inner_->all_gather(from, o.raw(), count, dtype), {{out, o}}, {i});
  }
  Handle all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) override {
    const Tensor i = up(in, counts[static_cast<std::size_t>(rank())], dtype), o = up(out, sum(counts), dtype);
    return back(inner_->all_gather_v(i.raw(), o.raw(), counts, dtype), {{out, o}}, {i});
  }
  Handle all_to_all(const void* in, void* out, std::int64_t count, DType dtype) override {
    const Tensor i = up(in, count * size(), dtype), o = up(out, count * size(), dtype);
    return back(inner_->all_to_all(i.raw(), o.raw(), count, dtype), {{out, o}}, {i});
  }
  Handle all_to_all_v(const void* in, std::span<const std::int64_t> send, void* out, std::span<const std::int64_t> receive,
                      DType dtype) override {
    const Tensor i = up(in, sum(send), dtype), o = up(out, sum(receive), dtype);
    return back(inner_->all_to_all_v(i.raw(), send, o.raw(), receive, dtype), {{out, o}}, {i});
  }
  Handle broadcast(void* data, std::int64_t count, DType dtype, int root) override {
    const Tensor t = up(data, count, dtype);
    return back(inner_->broadcast(t.raw(), count, dtype, root), {{data, t}}, {});
  }
  Handle send(const void* data, std::int64_t count, DType dtype, int to) override {
    const Tensor t = up(data, count, dtype);
    return back(inner_->send(t.raw(), count, dtype, to), {}, {t});
  }
  Handle receive(void* data, std::int64_t count, DType dtype, int from) override {
    const Tensor t = up(data, count, dtype);
    return back(inner_->receive(t.raw(), count, dtype, from), {{data, t}}, {});
  }
  void barrier() override { inner_->barrier(); }

 private:
  using Results = std::vector<std::pair<void*, Tensor>>;
  struct Operation final : Handle::Operation {
    Handle handle;
    Results results;
    std::vector<Tensor> kept;
    void wait() override {
      handle.wait();
      for (auto& [host, t] : results) t.copy_to_host(host, t.bytes());
    }
    bool done() override { return handle.done(); }
  };
  static std::int64_t sum(std::span<const std::int64_t> counts) {
    return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  }
  static bool inside(const void* p, const void* base, const Tensor& t) {
    return p >= base && p < static_cast<const char*>(base) + t.bytes();
  }
  Tensor up(const void* host, std::int64_t count, DType dtype) const {
    const Tensor t = Tensor::empty(Dims{count}, dtype, *device_);
    t.copy_from_host(host, t.bytes());
    return t;
  }
  static Handle back(Handle handle, Results results, std::vector<Tensor> kept) {
    auto o = std::make_shared<Operation>();
    o->handle = std::move(handle), o->results = std::move(results), o->kept = std::move(kept);
    return Handle(std::move(o));
  }
  std::shared_ptr<Communicator> inner_;
  std::shared_ptr<Device> device_;
};

class FacadeWorld final : public World {
 public:
  FacadeWorld(std::shared_ptr<World> inner, std::shared_ptr<Device> device)
      : inner_(std::move(inner)), device_(std::move(device)) {}
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  int local_rank() const override { return inner_->local_rank(); }
  int local_size() const override { return inner_->local_size(); }
  std::string_view backend() const override { return inner_->backend(); }
  std::shared_ptr<Communicator> make(std::string name, std::vector<int> ranks) override {
    return std::make_shared<Facade>(inner_->make(std::move(name), std::move(ranks)), device_);
  }
  void at(std::int64_t step, std::string_view doing) override { inner_->at(step, doing); }
  bool fail_job(const std::string& message) noexcept override { return inner_->fail_job(message); }
  void end_failed(int exit_code) override { inner_->end_failed(exit_code); }
  double timeout() const override { return inner_->timeout(); }

 private:
  std::shared_ptr<World> inner_;
  std::shared_ptr<Device> device_;
};

}  // namespace capstan::testing
