// What csrc/cuda needs of CUDA, on the CPU. The threads of a block are fibers that change at barriers; under
// TSan, which must see who meets whom in shared memory without a barrier between, they are threads of the
// operating system. Blocks run one after another.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks take turns
#define __syncthreads() emulator::synchronize()

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

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  return cudaSuccess;
}
using std::min;

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}
constexpr const char* divergence = "not every thread of the block reaches __syncthreads";

inline uint64_t only_last = ~uint64_t(0);  // how many of a grid's blocks run

inline dim3 place(uint64_t i, dim3 size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

#ifdef __SANITIZE_THREAD__

inline std::mutex mutex;
inline std::condition_variable changed;
inline unsigned waiting = 0, turn = 0;
inline bool at_the_end;  // of the block is where those who wait are

inline void synchronize(bool end = false) {
  std::unique_lock lock(mutex);
  if (waiting > 0 && end != at_the_end) fail(divergence);
  at_the_end = end;
  if (++waiting == blockDim.x * blockDim.y * blockDim.z) {
    waiting = 0;
    ++turn;
    changed.notify_all();
  } else {
    changed.wait(lock, [mine = turn] { return turn != mine; });
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
        synchronize(/*end=*/true);
      }
    });
  }
  for (std::thread& thread : team) thread.join();
}

#else

struct Fiber {
  static constexpr std::size_t stack_size = 256 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_size]};
  bool done;
};
inline ucontext_t scheduler;
inline Fiber* current;
inline std::function<void()> kernel_call;

inline void synchronize() { swapcontext(&current->context, &scheduler); }

inline void enter() {
  kernel_call();
  current->done = true;
}

template <class Run> void run_blocks(uint64_t first, uint64_t last, unsigned threads, Run run) {
  kernel_call = run;
  std::vector<Fiber> fibers(threads);
  for (uint64_t b = first; b < last; ++b) {
    blockIdx = place(b, gridDim);
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::stack_size;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, enter, 0);
    }
    for (unsigned done = 0; done < threads;) {
      done = 0;
      for (unsigned t = 0; t < threads; ++t) {
        current = &fibers[t];
        threadIdx = place(t, blockDim);
        if (!current->done) swapcontext(&scheduler, &current->context);
        done += current->done;
      }
      if (done > 0 && done < threads) fail(divergence);
    }
  }
}

#endif

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
  emulator::run_blocks(blocks - std::min(blocks, emulator::only_last), blocks, threads,
                       [=] { kernel(arguments...); });
  return cudaSuccess;
}
