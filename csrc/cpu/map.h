// A loop over a run of memory, a register at a time, on the lanes of simd_memory.h. A tail is a partial load
// through the same code, so a value's result depends neither on its position nor on the length of the run.
#pragma once
#include "cpu/kernels.h"
#include "formulas/elementary.h"
#include "formulas/simd_memory.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// 16-bit types are float in registers.
template <class M> using LanesOf =
    Lanes<std::conditional_t<std::is_same_v<M, double>, double, float>, sizeof(M) == 2>;

// Whether to go through memory from its end. A processor takes a load for one of an earlier store whose
// address has the same low 12 bits, and holds it back. malloc often places an output 64 bytes behind its
// input in this sense: in order, relu then takes 14 cycles a register, not 2. Between types of different
// size always upwards: rows are widened and narrowed where they lie.
template <class M, class... In> MLPEXT_INLINE bool goes_down(const M* out, const In*... in) {
  if constexpr (((sizeof(M) != sizeof(In)) || ...)) return false;
  uint64_t up = 4096, down = 4096;  // bytes from a load to the store that it is taken for
  for (const void* p : {static_cast<const void*>(in)...}) {
    const uint64_t behind = (reinterpret_cast<uintptr_t>(out) - reinterpret_cast<uintptr_t>(p)) % 4096;
    if (behind > 0) up = std::min(up, behind), down = std::min(down, 4096 - behind);
  }
  return up < down;
}

// out[i] = f(in[i]...), a register at a time, of bfloat16 two.
template <class M, class F, class... In> MLPEXT_INLINE void map(int64_t n, M* out, F f, const In*... in) {
  using V = LanesOf<M>;
  constexpr bool pairs = std::is_same_v<M, BFloat16> && (std::is_same_v<M, In> && ...);
  constexpr int size = pairs ? 2 * V::size : V::size;
  auto step = [&](int64_t i, auto... part) MLPEXT_LAMBDA {  // all of a step, or a number of elements
    if constexpr (pairs) {
      auto both = [&](auto... x) MLPEXT_LAMBDA { return BFloat16Pairs<V>(f(x.even...), f(x.odd...)); };
      write(out + i, both(BFloat16Pairs<V>(read<typename V::Bits>(in + i, part...))...).bits(), part...);
    } else {
      write(out + i, narrow<M>(f(widen<V, In>(read<StoredLanes<V, In>>(in + i, part...))...)), part...);
    }
  };
  const int64_t steps = n / size;
  const bool down = goes_down(out, in...);
  int64_t i = down ? (steps - 1) * size : 0;
  for (int64_t left = steps; left > 0; --left, i += down ? -size : size) step(i);
  if (n % size > 0) step(steps * size, static_cast<int>(n % size));
}

template <class V> struct Two {
  V first, second;
};

// first[i] and second[i] = f(in[i]...), as in map.
template <class M, class F, class... In>
MLPEXT_INLINE void map_to_two(int64_t n, M* first, M* second, F f, const In*... in) {
  using V = LanesOf<M>;
  constexpr bool pairs = std::is_same_v<M, BFloat16>;
  constexpr int size = pairs ? 2 * V::size : V::size;
  auto step = [&](int64_t i, auto... part) MLPEXT_LAMBDA {
    if constexpr (pairs) {
      auto both = [&](auto... x) MLPEXT_LAMBDA {
        const Two<V> even = f(x.even...), odd = f(x.odd...);
        write(first + i, BFloat16Pairs<V>(even.first, odd.first).bits(), part...);
        write(second + i, BFloat16Pairs<V>(even.second, odd.second).bits(), part...);
      };
      both(BFloat16Pairs<V>(read<typename V::Bits>(in + i, part...))...);
    } else {
      const Two<V> values = f(widen<V, In>(read<StoredLanes<V, In>>(in + i, part...))...);
      write(first + i, narrow<M>(values.first), part...);
      write(second + i, narrow<M>(values.second), part...);
    }
  };
  const int64_t steps = n / size;
  for (int64_t i = 0; i < steps * size; i += size) step(i);
  if (n % size > 0) step(steps * size, static_cast<int>(n % size));
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
