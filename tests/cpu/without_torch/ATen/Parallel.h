// What csrc/cpu/gemm needs of torch, on one thread, for programs that no torch is linked to.
#pragma once
#include <cstdint>

namespace at {
inline int get_num_threads() { return 1; }
inline bool in_parallel_region() { return false; }
template <class Run> void parallel_for(int64_t begin, int64_t end, int64_t, Run run) {
  if (begin < end) run(begin, end);
}
}  // namespace at
