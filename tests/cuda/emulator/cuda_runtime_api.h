// What csrc/cuda needs of CUDA, on the CPU. The threads of a block are fibers that change at barriers, of the
// block or of a warp; under TSan, which must see who meets whom in shared memory without a barrier between,
// they are threads of the operating system. Blocks run one after another.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks take turns
#define __syncthreads() emulator::wait_at(emulator::block_barrier)
#define __syncwarp() \
  emulator::wait_at(emulator::warp_barriers[emulator::thread_index() / emulator::warp_size])

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
using std::min;

// Those of an H100.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 227 << 10;
  return cudaSuccess;
}

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}
constexpr const char* divergence =
    "not every thread of the block reaches __syncthreads, or not every lane of a warp what they do together";

inline uint64_t only_last = ~uint64_t(0);  // how many of a grid's blocks run

inline dim3 place(uint64_t i, dim3 size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

constexpr unsigned most_threads = 1024, warp_size = 32;

struct Barrier {
  unsigned expected = 0, waiting = 0, turn = 0;
#ifdef __SANITIZE_THREAD__
  std::mutex mutex;
  std::condition_variable changed;
  bool at_the_end;  // of the block is where those who wait are
#endif
};
inline Barrier block_barrier, warp_barriers[most_threads / warp_size];

inline unsigned thread_index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

#ifdef __SANITIZE_THREAD__

// How often the calling thread has called of_warp.
inline unsigned& warp_calls() {
  static thread_local unsigned calls;
  return calls;
}

inline void wait_at(Barrier& barrier, bool end = false) {
  std::unique_lock lock(barrier.mutex);
  if (barrier.waiting > 0 && end != barrier.at_the_end) fail(divergence);
  barrier.at_the_end = end;
  if (++barrier.waiting == barrier.expected) {
    barrier.waiting = 0;
    ++barrier.turn;
    barrier.changed.notify_all();
  } else {
    barrier.changed.wait(lock, [&, mine = barrier.turn] { return barrier.turn != mine; });
  }
}

template <class Run> void run_blocks(uint64_t first, uint64_t last, unsigned threads, Run run) {
  std::vector<std::thread> team;
  for (unsigned t = 0; t < threads; ++t) {
    team.emplace_back([=] {
      threadIdx = place(t, blockDim);
      for (uint64_t b = first; b < last; ++b) {
        blockIdx = place(b, gridDim);
        run();
        wait_at(block_barrier, /*end=*/true);
      }
    });
  }
  for (std::thread& thread : team) thread.join();
}

#else

using Jump = void* [5];
struct Fiber {
  static constexpr std::size_t stack_size = 256 << 10;
  ucontext_t context;  // of its start
  Jump jump;           // to where it waits
  std::unique_ptr<char[]> stack{new char[stack_size]};
  const Barrier* barrier;  // at which it waits, since this turn of it
  unsigned turn, warp_calls;
  bool started, done;

  bool waits() const { return barrier && barrier->turn == turn; }
};
inline Jump scheduler;
inline Fiber* current;
inline std::function<void()> kernel_call;
inline unsigned& warp_calls() { return current->warp_calls; }

// The compiler's own jumps: those of the C library and swapcontext would ask the system for signal masks.
inline void to_scheduler() { __builtin_longjmp(scheduler, 1); }
inline void wait_at(Barrier& barrier) {
  if (++barrier.waiting == barrier.expected) {
    barrier.waiting = 0;
    ++barrier.turn;
    return;
  }
  current->barrier = &barrier, current->turn = barrier.turn;
  if (__builtin_setjmp(current->jump) == 0) to_scheduler();
}

inline void enter() {
  kernel_call();
  current->done = true;
  to_scheduler();
}

inline void go_on(Fiber& fiber) {
  if (!std::exchange(fiber.started, true)) setcontext(&fiber.context);
  __builtin_longjmp(fiber.jump, 1);
}
inline void run_until_it_waits(Fiber& fiber) {
  if (__builtin_setjmp(scheduler) == 0) go_on(fiber);
}

template <class Run> void run_blocks(uint64_t first, uint64_t last, unsigned threads, Run run) {
  kernel_call = run;
  std::vector<Fiber> fibers(threads);
  for (uint64_t b = first; b < last; ++b) {
    blockIdx = place(b, gridDim);
    for (Fiber& fiber : fibers) {
      fiber.barrier = nullptr, fiber.warp_calls = 0, fiber.started = fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::stack_size;
      makecontext(&fiber.context, enter, 0);
    }
    for (unsigned done = 0; done < threads;) {
      bool stuck = true;
      for (unsigned t = 0; t < threads; ++t) {
        current = &fibers[t];
        if (current->done || current->waits()) continue;
        threadIdx = place(t, blockDim);
        stuck = false;
        run_until_it_waits(*current);
        done += current->done;
      }
      if (stuck) fail(divergence);
    }
  }
}

#endif

inline const void* what_warps_do[2][most_threads];

// What every lane of the calling warp gives, by lane, until their next call.
template <class T> const T* of_warp(const T& mine) {
  static T given[2][most_threads / warp_size][warp_size];
  const unsigned thread = thread_index(), warp = thread / warp_size, turn = warp_calls()++ % 2;
  given[turn][warp][thread % warp_size] = mine;
  what_warps_do[turn][thread] = given;
  wait_at(warp_barriers[warp]);
  if (what_warps_do[turn][warp * warp_size] != given) fail(divergence);
  return given[turn][warp];
}

// As cp.async: what a thread copies is there when it has waited for it, and not before.
struct Copy {
  const uint4* from;
  uint4* to;
};
inline std::vector<Copy> copies[most_threads];
inline void copy_later(const void* from, void* to) {
  copies[thread_index()].push_back({static_cast<const uint4*>(from), static_cast<uint4*>(to)});
}
inline void copies_done() {
  for (const Copy& copy : copies[thread_index()]) *copy.to = *copy.from;
  copies[thread_index()].clear();
}

inline char* shared_memory = nullptr;

}  // namespace emulator

template <class T> void __stwb(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) emulator::fail("misaligned address");
  *to = value;
}

template <class... Parameters, class... Arguments> cudaError_t launch(void (*kernel)(Parameters...),
                                                                      dim3 grid, dim3 block, cudaStream_t,
                                                                      const Arguments&... arguments) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const unsigned threads = block.x * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535)
    emulator::fail("a launch that CUDA refuses");
  gridDim = grid, blockDim = block;
  emulator::block_barrier.expected = threads;
  for (unsigned t = 0; t < threads; t += emulator::warp_size)
    emulator::warp_barriers[t / emulator::warp_size].expected = min(emulator::warp_size, threads - t);
  emulator::run_blocks(blocks - std::min(blocks, emulator::only_last), blocks, threads,
                       [=] { kernel(arguments...); });
  return cudaSuccess;
}

// Shared memory is an allocation that ends where it ends, filled with what is NaN in every dtype.
template <class Kernel, class... Arguments> cudaError_t launch_shared(Kernel* kernel, dim3 grid, dim3 block,
                                                                      std::size_t bytes, cudaStream_t stream,
                                                                      const Arguments&... arguments) {
  if (bytes > 227 << 10) emulator::fail("a launch that CUDA refuses");
  const std::unique_ptr<char, decltype(&std::free)> memory{static_cast<char*>(std::malloc(bytes)),
                                                           &std::free};
  std::memset(memory.get(), 0xff, bytes);
  emulator::shared_memory = memory.get();
  return launch(kernel, grid, block, stream, arguments...);
}
inline char* shared_memory() { return emulator::shared_memory; }
