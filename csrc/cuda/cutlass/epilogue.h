// What the epilogues compute, in float: compiled for the GPU, and as plain C++ by tests. The activation is
// found at run time, by five branches that are the same for all threads, so that there is one kernel for all
// of them. The including file sets MLPEXT_ISA, a namespace.
#pragma once
#include "../../activation_info.h"
#include "../../scalar_math.h"
#include "../cutlass.h"

namespace mlpext::MLPEXT_ISA {

using cuda::ct::Activation;

// y[i] = f(z[i])
template <int n, class Array> MLPEXT_INLINE Array forward(const Activation& f, const Array& z) {
  Array y;
  with_activation(f.index, f.params, [&](auto a) {
#pragma unroll
    for (int i = 0; i < n; ++i) y[i] = a.forward(widen(z[i])).v;
  });
  return y;
}

// dz[i] = dy[i] f', f' from what a layer in 16 bits keeps for it: y where that is exact enough, else z.
template <int n, class Array>
MLPEXT_INLINE Array backward(const Activation& f, const Array& dy, const Array& kept) {
  Array dz;
  with_activation(f.index, f.params, [&]<class A>(A a) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const auto from = widen(kept[i]), g = widen(dy[i]);
      if constexpr (HasDerivativeFromOutput<A> && !A::coarse_in_half)
        dz[i] = chain<A>(g, a.derivative_from_output(from)).v;
      else dz[i] = chain<A>(g, a.derivative(from)).v;
    }
  });
  return dz;
}

}  // namespace mlpext::MLPEXT_ISA
