// What the products have in common: how they are cut for the threads, and the memory that they work in.
#pragma once
#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "cpu/kernels.h"

namespace mlpext::cpu {

// What backward forms of a gradient's rows at a time, so that memory does not grow with them.
constexpr std::size_t gradient_bytes = std::size_t(8) << 20;

// Multiply-adds that are worth a thread: 20 us of one core, twice what waking another takes.
constexpr int64_t thread_work = int64_t(1) << 21;

// Bytes of a core's L2 cache, as the system says; 1 MiB where it does not.
inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return int64_t(1) << 20;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that a thread keeps from call to call, grown to what the largest call so far has asked for.
template <int which> std::byte* scratch(std::size_t bytes) {
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<std::byte[], Free> memory;
  thread_local std::size_t size = 0;
  if (size < bytes) {
    memory.reset(), size = 0;
    memory.reset(new (std::align_val_t(64)) std::byte[bytes]);
    size = bytes;
  }
  return memory.get();
}

// Cuts (rows, columns) into one rectangle a thread, if `work` multiply-adds are enough for more than one:
// columns first, because threads that share columns each pack them. What a rectangle computes does not depend
// on the cut.
template <class Run> void in_rectangles(int64_t rows, int64_t columns, int64_t work, Run run) {
  const int64_t threads =
      work < 2 * thread_work ? 1 : std::min<int64_t>(at::get_num_threads(), work / thread_work);
  if (threads <= 1 || at::in_parallel_region()) {
    run(0, rows, 0, columns);
    return;
  }
  const bool by_columns = columns >= panel_columns * threads;
  const int64_t whole = by_columns ? columns : rows, step = by_columns ? 16 : 6;
  const int64_t share = round_up((whole + threads - 1) / threads, step);
  at::parallel_for(0, (whole + share - 1) / share, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * share, last = std::min(end * share, whole);
    if (by_columns) run(0, rows, first, last);
    else run(first, last, 0, columns);
  });
}

}  // namespace mlpext::cpu
