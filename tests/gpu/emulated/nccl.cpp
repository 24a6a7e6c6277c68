// NCCL's calls for ranks that are threads of one process, over the emulated GPU: a call is queued on its stream, and there
// the ranks of its communicator meet, exchange addresses and copy. A rank that does not come is waited for until this one aborts.
// As in NCCL 2.28 with communicators that do not block, registering a window returns at once and ends late, in a thread.
#include "gpu/emulated/streams.h"

#include <capstan/kernels/bf16.h>
#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace capstan::emulated {
void touch_device_memory(const std::function<void()>& work);
}

namespace {

using capstan::kernels::bf16;

struct Call {
  enum Kind { all_reduce, reduce_scatter, all_gather, broadcast, send, receive } kind;
  const void* in;
  void* out;
  std::size_t count;
  ncclDataType_t type;
  ncclRedOp_t op = ncclSum;
  int other = 0;  // root or peer
};

std::size_t bytes_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    default:
      return 4;
  }
}

/// Where the ranks of one communicator meet.
struct Room {
  explicit Room(int n) : size(n), gone(static_cast<std::size_t>(n)), calls(static_cast<std::size_t>(n)) {}
  int size;
  std::mutex mutex;
  std::condition_variable changed;
  int arrived = 0;
  std::uint64_t round = 0;
  std::vector<bool> gone;  // ranks that aborted: the others do not hear of it, and wait
  bool mismatch = false;
  std::vector<const Call*> calls;
  struct Letter {
    const void* data;
    std::size_t bytes;
    bool taken = false;
  };
  std::map<std::pair<int, int>, std::vector<std::shared_ptr<Letter>>> letters;  // from, to

  bool left(int rank) const { return gone[static_cast<std::size_t>(rank)]; }
  /// False once `rank` has aborted.
  bool meet(int rank) {
    std::unique_lock lock(mutex);
    const std::uint64_t mine = round;
    if (++arrived == size && std::find(gone.begin(), gone.end(), true) == gone.end()) {
      arrived = 0, ++round;
      changed.notify_all();
      return true;
    }
    changed.wait(lock, [&] { return round != mine || left(rank); });
    return !left(rank);
  }
};

std::mutex rooms_mutex;
std::map<std::string, std::shared_ptr<Room>> rooms;
std::uint64_t next_id = 0;

template <class T>
void reduce(const std::vector<const Call*>& calls, std::size_t from, std::size_t count, ncclRedOp_t op, void* to) {
  using Sum = std::conditional_t<std::is_same_v<T, bf16>, float, T>;
  for (std::size_t i = 0; i < count; ++i) {
    Sum sum = static_cast<Sum>(static_cast<const T*>(calls[0]->in)[from + i]);
    for (std::size_t r = 1; r < calls.size(); ++r) {
      const Sum x = static_cast<Sum>(static_cast<const T*>(calls[r]->in)[from + i]);
      sum = op == ncclSum ? static_cast<Sum>(sum + x) : op == ncclMax ? std::max(sum, x) : std::min(sum, x);
    }
    static_cast<T*>(to)[i] = T(sum);
  }
}

void reduce(const std::vector<const Call*>& calls, std::size_t from, std::size_t count, ncclDataType_t type, ncclRedOp_t op,
            void* to) {
  switch (type) {
    case ncclFloat64:
      return reduce<double>(calls, from, count, op, to);
    case ncclFloat32:
      return reduce<float>(calls, from, count, op, to);
    case ncclBfloat16:
      return reduce<bf16>(calls, from, count, op, to);
    case ncclInt32:
      return reduce<std::int32_t>(calls, from, count, op, to);
    case ncclInt64:
      return reduce<std::int64_t>(calls, from, count, op, to);
    default:
      return reduce<std::uint8_t>(calls, from, count, op, to);
  }
}

void together(Room& room, int rank, const Call& call) {
  const auto me = static_cast<std::size_t>(rank);
  const std::size_t block = call.count * bytes_of(call.type), n = static_cast<std::size_t>(room.size);
  room.calls[me] = &call;
  if (!room.meet(rank)) return;
  for (const Call* other : room.calls)
    if (other->kind != call.kind || other->count != call.count || other->type != call.type) room.mismatch = true;
  std::vector<char> result(call.kind == Call::all_gather ? n * block : block);
  capstan::emulated::touch_device_memory([&] {
    switch (call.kind) {
      case Call::all_reduce:
        return reduce(room.calls, 0, call.count, call.type, call.op, result.data());
      case Call::reduce_scatter:
        return reduce(room.calls, me * call.count, call.count, call.type, call.op, result.data());
      case Call::all_gather:
        for (std::size_t r = 0; r < n; ++r) std::memcpy(result.data() + r * block, room.calls[r]->in, block);
        return;
      default:
        std::memcpy(result.data(), room.calls[static_cast<std::size_t>(call.other)]->in, block);
    }
  });
  if (!room.meet(rank)) return;  // everyone has read
  capstan::emulated::touch_device_memory([&] { std::memcpy(call.out, result.data(), result.size()); });
  room.meet(rank);
}

/// Calls of one group start together: no send waits for a receive of the same group.
void run(Room& room, int rank, const std::vector<Call>& calls) {
  std::vector<std::shared_ptr<Room::Letter>> sent;
  for (const Call& c : calls)
    if (c.kind == Call::send) {
      sent.push_back(std::make_shared<Room::Letter>(Room::Letter{c.in, c.count * bytes_of(c.type)}));
      const std::lock_guard lock(room.mutex);
      room.letters[{rank, c.other}].push_back(sent.back());
      room.changed.notify_all();
    }
  for (const Call& c : calls) {
    if (c.kind == Call::send) continue;
    if (c.kind != Call::receive) {
      together(room, rank, c);
      continue;
    }
    std::unique_lock lock(room.mutex);
    auto& box = room.letters[{c.other, rank}];
    room.changed.wait(lock, [&] { return !box.empty() || room.left(rank); });
    if (room.left(rank)) return;
    const auto letter = box.front();
    box.erase(box.begin());
    lock.unlock();
    if (letter->bytes != c.count * bytes_of(c.type))
      room.mismatch = true;
    else
      capstan::emulated::touch_device_memory([&] { std::memcpy(c.out, letter->data, letter->bytes); });
    lock.lock();
    letter->taken = true;
    room.changed.notify_all();
  }
  std::unique_lock lock(room.mutex);
  room.changed.wait(
      lock, [&] { return room.left(rank) || std::all_of(sent.begin(), sent.end(), [](const auto& s) { return s->taken; }); });
}

}  // namespace

struct ncclComm {
  ncclComm(std::shared_ptr<Room> r, int n) : room(std::move(r)), rank(n) {}
  ~ncclComm() { if (worker.joinable()) worker.join(); }
  std::shared_ptr<Room> room;
  int rank;
  void* buffers = nullptr;
  std::atomic<bool> busy{false};
  std::thread worker;
  std::multiset<void*> registered;
  std::shared_ptr<int> calls = std::make_shared<int>();  // records hold it too
};

namespace {

struct Group {
  int depth = 0;
  ncclComm* comm = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<Call> calls;
};
thread_local Group group;

ncclResult_t submit(ncclComm* comm, cudaStream_t stream, std::vector<Call> calls) {
  const bool ordered = capstan::emulated::enqueue_collective(stream, [room = comm->room, rank = comm->rank, calls = std::move(calls), held = comm->calls] {
    run(*room, rank, calls);
  });
  return ordered ? ncclSuccess : ncclInvalidUsage;
}

std::mutex registered_mutex;
std::multiset<void*> registered;  // with communicators that live

/// Ends behind the caller's back, after `milliseconds`; until then the communicator takes no other call.
void late(ncclComm* comm, int milliseconds, std::function<void()> work) {
  if (comm->worker.joinable()) comm->worker.join();
  comm->busy = true;
  comm->worker = std::thread([comm, milliseconds, work = std::move(work)] {
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    work();
    comm->busy = false;
  });
}
void note_registered(ncclComm* comm, void* p) {
  const std::lock_guard lock(registered_mutex);
  comm->registered.insert(p), registered.insert(p);
}
ncclResult_t forget_registered(ncclComm* comm, void* p) {
  const std::lock_guard lock(registered_mutex);
  const auto mine = comm->registered.find(p);
  if (mine == comm->registered.end()) return ncclInvalidUsage;
  comm->registered.erase(mine), registered.erase(registered.find(p));
  return ncclSuccess;
}
/// As NCCL's, it lasts until no record has calls of the communicator any more; here, not for ever.
void end(ncclComm* comm) {
  for (int i = 0; comm->calls.use_count() > 1; ++i) {
    if (i == 10000) std::fprintf(stderr, "a communicator is ended before the records that it is part of\n"), std::abort();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (comm->worker.joinable()) comm->worker.join();
  while (!comm->registered.empty()) forget_registered(comm, *comm->registered.begin());
  cudaFree(comm->buffers);
  delete comm;
}

ncclResult_t ask(ncclComm* comm, cudaStream_t stream, Call call) {
  if (comm->busy) return ncclInvalidArgument;
  if (group.depth == 0) return submit(comm, stream, {call});
  if (group.comm != nullptr && group.comm != comm) return ncclInvalidUsage;
  group.comm = comm, group.stream = stream;
  group.calls.push_back(call);
  return ncclSuccess;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const std::lock_guard lock(rooms_mutex);
  std::memset(id, 0, sizeof *id);
  ++next_id;
  std::memcpy(id->internal, &next_id, sizeof next_id);
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
  const std::lock_guard lock(rooms_mutex);
  auto& room = rooms[std::string(id.internal, sizeof next_id)];
  if (!room) room = std::make_shared<Room>(ranks);
  *comm = new ncclComm(room, rank);
  cudaMalloc(&(*comm)->buffers, std::size_t{1} << 20);
  return ncclInProgress;
}
ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm->busy) return ncclInvalidArgument;
  return late(comm, 2, [] {}), ncclInProgress;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return comm->busy ? ncclInvalidArgument : (end(comm), ncclSuccess); }
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  {
    const std::lock_guard lock(comm->room->mutex);
    comm->room->gone[static_cast<std::size_t>(comm->rank)] = true;
    comm->room->changed.notify_all();
  }
  return end(comm), ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  if (comm->busy) return *error = ncclInProgress, ncclSuccess;
  const std::lock_guard lock(comm->room->mutex);
  return *error = comm->room->mismatch ? ncclRemoteError : ncclSuccess, ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t code) {
  return code == ncclInvalidArgument ? "invalid argument: the call before has not ended" : "an emulated failure";
}
const char* ncclGetLastError(ncclComm_t comm) { return comm->room->mismatch ? "the ranks' calls differ" : ""; }
ncclResult_t ncclMemAlloc(void** p, size_t bytes) {
  return cudaMalloc(p, bytes) == cudaSuccess ? ncclSuccess : ncclSystemError;
}
ncclResult_t ncclMemFree(void* p) {
  const std::lock_guard lock(registered_mutex);
  if (registered.contains(p)) std::fprintf(stderr, "memory is freed that a communicator has registered\n"), std::abort();
  return cudaFree(p) == cudaSuccess ? ncclSuccess : ncclInvalidArgument;
}
ncclResult_t ncclCommWindowRegister(ncclComm_t comm, void* p, size_t, ncclWindow_t* window, int) {
  if (comm->busy) return ncclInvalidArgument;
  late(comm, 30, [=] { note_registered(comm, *window = static_cast<ncclWindow_t>(p)); });
  return ncclSuccess;
}
ncclResult_t ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t window) { return forget_registered(comm, window); }
ncclResult_t ncclCommRegister(const ncclComm_t comm, void* p, size_t, void** handle) {
  if (comm->busy) return ncclInvalidArgument;
  return note_registered(comm, *handle = p), ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t comm, void* handle) { return forget_registered(comm, handle); }
ncclResult_t ncclGroupStart() { return ++group.depth, ncclSuccess; }
ncclResult_t ncclGroupEnd() {
  if (--group.depth > 0 || group.comm == nullptr) return ncclSuccess;
  return submit(std::exchange(group.comm, nullptr), group.stream, std::exchange(group.calls, {}));
}
ncclResult_t ncclAllReduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream) {
  return ask(comm, stream, {Call::all_reduce, in, out, count, type, op});
}
ncclResult_t ncclReduceScatter(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                               cudaStream_t stream) {
  return ask(comm, stream, {Call::reduce_scatter, in, out, count, type, op});
}
ncclResult_t ncclAllGather(const void* in, void* out, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return ask(comm, stream, {Call::all_gather, in, out, count, type});
}
ncclResult_t ncclBroadcast(const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return ask(comm, stream, {Call::broadcast, in, out, count, type, ncclSum, root});
}
ncclResult_t ncclSend(const void* in, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return ask(comm, stream, {Call::send, in, nullptr, count, type, ncclSum, peer});
}
ncclResult_t ncclRecv(void* out, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return ask(comm, stream, {Call::receive, nullptr, out, count, type, ncclSum, peer});
}
}
