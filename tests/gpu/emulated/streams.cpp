// Streams and events. The stream of kernels does everything at once, when it is asked; streams with a priority, those of
// communication, run behind the caller's back and a little late: who forgets to wait for one reads what is not there yet.
#include "gpu/emulated/streams.h"
#include "gpu/emulated/graphs.h"

#include <cuda_runtime.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace capstan::emulated {

namespace {

struct Stream {
  Stream() : worker([this] { work(); }) {}
  ~Stream() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
    }
    changed.notify_all();
    worker.join();
  }
  void add(std::function<void()> one) {
    const std::lock_guard lock(mutex);
    queue.push_back(std::move(one));
    changed.notify_all();
  }
  void drain() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return queue.empty() && !busy; });
  }
  void work() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return stop || !queue.empty(); });
      if (queue.empty()) return;
      const auto one = std::move(queue.front());
      queue.pop_front();
      busy = true;
      lock.unlock();
      one();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  bool busy = false, stop = false;
  std::thread worker;  // last: it uses the others
};

/// What an event was last recorded for.
struct Point {
  std::mutex mutex;
  std::condition_variable changed;
  bool reached = false;
  void reach() {
    const std::lock_guard lock(mutex);
    reached = true;
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return reached; });
  }
  bool is_reached() {
    const std::lock_guard lock(mutex);
    return reached;
  }
};
struct Event {
  std::mutex mutex;
  std::shared_ptr<Point> point;
  // Of a record: its point is another one at each replay.
  std::shared_ptr<std::shared_ptr<Point>> recorded;
  unsigned long long record = 0;
  Seen seen;
};

Stream* of(cudaStream_t s) { return reinterpret_cast<Stream*>(s); }
Event& of(cudaEvent_t e) { return *reinterpret_cast<Event*>(e); }
std::shared_ptr<Point> point_of(cudaEvent_t e) {
  Event& event = of(e);
  const std::lock_guard lock(event.mutex);
  return event.point;
}

}  // namespace

void enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr) {
    if (note(work)) return;
    return work();
  }
  auto later = [stream, work = std::move(work)] {
    of(stream)->add([work] {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      work();
    });
  };
  if (Capture* c = capture(); c != nullptr && c->has(stream)) return c->add(stream, std::move(later));
  later();
}

bool enqueue_collective(cudaStream_t stream, std::function<void()> work) {
  Capture* c = capture();
  if (c == nullptr || !c->has(stream)) return enqueue(stream, std::move(work)), true;
  if (c->collectives > 0 && c->streams[stream][c->collective] < c->collectives) return false;
  enqueue(stream, std::move(work));
  c->collective = stream, c->collectives = c->streams[stream][stream];
  return true;
}

}  // namespace capstan::emulated

using namespace capstan::emulated;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return *s = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  return *s = reinterpret_cast<cudaStream_t>(new Stream), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return delete of(s), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (s == nullptr) return waited();
  of(s)->drain();
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  const auto wait = [s](const std::shared_ptr<Point>& point) {
    if (s == nullptr)
      point->wait();
    else
      of(s)->add([point] { point->wait(); });
  };
  Capture* c = capture();
  if (const auto recorded = of(e).recorded) {
    if (c == nullptr || of(e).record != c->id) return cudaErrorStreamCaptureIsolation;
    Seen& seen = c->streams[s];  // from here on part of the record
    for (const auto& [stream, count] : of(e).seen) seen[stream] = std::max(seen[stream], count);
    c->add(s, [wait, recorded] { wait(*recorded); });
    return cudaSuccess;
  }
  const auto point = point_of(e);
  if (point != nullptr && c != nullptr && c->has(s)) return c->broken = true, cudaErrorStreamCaptureIsolation;
  if (point != nullptr) wait(point);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return *e = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete &of(e), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  const auto reach = [s](const std::shared_ptr<Point>& point) {
    if (s == nullptr)
      point->reach();
    else
      of(s)->add([point] { point->reach(); });
  };
  Event& event = of(e);
  const std::lock_guard lock(event.mutex);
  if (Capture* c = capture(); c != nullptr && c->has(s)) {
    const auto recorded = std::make_shared<std::shared_ptr<Point>>();
    event.point.reset(), event.recorded = recorded, event.record = c->id, event.seen = c->streams[s];
    c->work.push_back([reach, recorded] { reach(*recorded = std::make_shared<Point>()); });
    return cudaSuccess;
  }
  event.recorded.reset();
  event.point = std::make_shared<Point>();
  reach(event.point);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
  if (of(e).recorded) return cudaErrorCapturedEvent;
  const auto point = point_of(e);
  return point == nullptr || point->is_reached() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  if (of(e).recorded) return cudaErrorCapturedEvent;
  if (const auto point = point_of(e)) point->wait();
  return waited();
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = elapsed(), cudaSuccess; }

// The stream of kernels runs in the thread that asks: it cannot wait for what that thread does next.
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t, void*) { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s) {
  enqueue(s, [=] { cudaMemcpy(to, from, bytes, kind); });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t s) {
  enqueue(s, [=] { cudaMemset(p, value, bytes); });
  return cudaSuccess;
}
}
