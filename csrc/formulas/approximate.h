// Faster float versions of some elementary functions, for numbers stored in 16 bits on a GPU: overloads that
// win over elementary.h's templates. They are a few units in the last of float's 24 bits off; at 2^28
// bfloat16 values memory leaves time for 40 instructions a value, and the accurate gelu alone has 90.
#pragma once
#include "formulas/elementary.h"

namespace mlpext::MLPEXT_ISA {

// Arguments up to 100 lose |x| 2^-24 of the result.

MLPEXT_INLINE Lanes<float> exp(Lanes<float> x) {
  const float u = x.v * static_cast<float>(log2e);
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(u));
  return Lanes<float>(y);
#else
  return Lanes<float>(::exp2f(u));
#endif
}
MLPEXT_INLINE Lanes<float> exp(Lanes<float> x, Lanes<float> c) { return c * exp(x); }

MLPEXT_INLINE Lanes<float> expm1(Lanes<float> x) {
  const Lanes<float> y =
      select(abs(x) < Lanes<float>(0.41), expm1_reduced<true>(x), exp(x) - Lanes<float>(1));
  return copysign(y, x);
}
MLPEXT_INLINE Lanes<float> expm1(Lanes<float> x, Lanes<float> c) { return c * expm1(x); }

MLPEXT_INLINE Lanes<float> one_minus_tanh(Lanes<float> t) {
  return Lanes<float>(2) / (exp(t + t) + Lanes<float>(1));
}
MLPEXT_INLINE Lanes<float> over_one_plus(Lanes<float> n, Lanes<float> e) { return n / (Lanes<float>(1) + e); }
template <class Constant> MLPEXT_INLINE Lanes<float> odd_cubic(Lanes<float> x, Constant a, Constant b) {
  return x * madd(Lanes<float>(b.hi), x * x, Lanes<float>(a.hi));
}
MLPEXT_INLINE Lanes<float> two_part_product(Lanes<float> x, double c) { return Lanes<float>(c) * x; }

MLPEXT_INLINE Lanes<float> normal_pdf(Lanes<float> x) {
  return Lanes<float>(0.3989422804014327) * exp(Lanes<float>(-0.5) * x * x);
}
// With t = |x|: Phi(-t) = e^(-t^2/2) u q(u), u = 1 / (t + 3.25), q of degree 5 to 2^-17.8 of the result. The
// library's erfcf has twice the instructions.
MLPEXT_INLINE Lanes<float> normal_cdf(Lanes<float> x) {
  const Lanes<float> t = abs(x), u = Lanes<float>(1) / (t + Lanes<float>(3.25));
  const Lanes<float> q = horner(u, 0.399731858, 1.25490962, 4.67920514, 0.820665449, 68.794971, -88.6150417);
  const Lanes<float> tail = u * q * exp(Lanes<float>(-0.5) * t * t);
  return select(x > Lanes<float>(0), Lanes<float>(1) - tail, tail);
}
MLPEXT_INLINE Lanes<float> times_normal_cdf(Lanes<float> x) {
  return at_least(x, Lanes<float>(-1000)) * normal_cdf(x);
}

}  // namespace mlpext::MLPEXT_ISA
