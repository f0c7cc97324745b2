// A loop over a run of memory, a register at a time, on the lanes of simd_lanes.h. A tail is a partial load
// through the same code, so a value's result depends neither on its position nor on the length of the run.
#pragma once
#include "cpu/kernels.h"
#include "formulas/elementary.h"

#define MLPEXT_LAMBDA __attribute__((always_inline))

namespace mlpext::MLPEXT_ISA {
namespace {

// 16-bit types are float in registers.
template <class M> using LanesOf =
    Lanes<std::conditional_t<std::is_same_v<M, double>, double, float>, sizeof(M) == 2>;

// out[i] = f(in[i]...), a register at a time.
template <class M, class F, class... In> MLPEXT_INLINE void map(int64_t n, M* out, F f, const In*... in) {
  using V = LanesOf<M>;
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) store(out + i, f(load<V>(in + i)...));
  const int left = static_cast<int>(n - i);
  if (left > 0) store_partial(out + i, f(load_partial<V>(in + i, left)...), left);
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
