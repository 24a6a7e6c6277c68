// defines: CudaQueue: kernels::Queue over a context's stream.
#pragma once
#include <kernels/cuda/context.h>

#include <map>
#include <memory>
#include <vector>

namespace capstan::kernels::cuda {

/// The kernels behind it (reduce.cu).
void measure(Context& ctx, std::span<const Piece> gradient, const double* losses, std::int64_t count, GatePart* part);
void decide(Context& ctx, const GatePart* parts, std::int64_t ranks, double clip, Gate* gate);

class CudaQueue final : public Queue {
 public:
  explicit CudaQueue(Context& ctx);
  ~CudaQueue() override;
  void measure(std::span<const Piece> gradient, const double* losses, std::int64_t count, GatePart* part) override;
  void decide(const GatePart* parts, std::int64_t ranks, double clip, Gate* gate) override;
  void obey(const Gate* gate) override { ctx_.gate = gate; }
  void open_gate(Gate* gate) override;
  std::int64_t post(const void* from, std::int64_t bytes) override;
  void collect(std::int64_t ticket, void* host_to, std::int64_t bytes) override;
  std::int64_t mark() override;
  double seconds(std::int64_t begin, std::int64_t end) override;
  void hold(double seconds) override;
  void release() override;
  void begin_record(std::uint64_t step) override;
  std::int64_t end_record() override;
  void cancel_record() noexcept override { ctx_.cancel_record(); }
  void begin_rehearsal(std::int64_t record) override;
  void end_rehearsal() override { ctx_.end_rehearsal(); }
  void cancel_rehearsal() noexcept override { ctx_.cancel_rehearsal(); }
  void replay(std::int64_t record, std::uint64_t step) override;
  void forget_record(std::int64_t record) noexcept override;
  std::int64_t record_bytes() const override { return ctx_.record_bytes(); }
  std::string tune_products(const std::string& file) override;

 private:
  struct Slot { cudaEvent_t done = nullptr; std::int64_t ticket = -1; };
  struct Recorded {
    cudaGraphExec_t graph;
    std::uint64_t step;
    Context::Noted noted;
  };
  Recorded& recorded(std::int64_t record);
  struct Hold;
  Context& ctx_;
  std::vector<std::unique_ptr<Hold>> holds_;
  char* posted_ = nullptr;  // pinned: post_slots times post_bytes and a fault
  std::vector<Slot> slots_;
  std::int64_t next_ticket_ = 0, next_mark_ = 0, next_record_ = 0;
  std::map<std::int64_t, cudaEvent_t> marks_;
  std::map<std::int64_t, Recorded> records_;
};

}  // namespace capstan::kernels::cuda
