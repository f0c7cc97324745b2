// The lane operations that a formula may use, on one number at a time: for CUDA's kernels, and for the same
// kernels compiled as plain C++ by the emulator in tests/. simd_lanes.h has the same for registers, so that
// elementary.h and activations.h serve both.
//
// The including file sets MLPEXT_ISA, its namespace. float and double round every step as the CPU's AVX2 and
// AVX-512 do (-fmad=false), so results have the same bits. With MLPEXT_APPROXIMATE, for numbers stored in 16
// bits, division is the hardware's approximation, and approximate.h follows.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "formulas/dtype.h"

#ifdef __CUDACC__
#define MLPEXT_INLINE __host__ __device__ __forceinline__
#else
#define MLPEXT_INLINE inline __attribute__((always_inline))
#endif

namespace mlpext::MLPEXT_ISA {

constexpr bool fused_madd = true;

template <class T> struct Format;
template <> struct Format<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, exponent = 8, bias = 127;
};
template <> struct Format<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, exponent = 11, bias = 1023;
};

template <class T> struct Mask {
  bool bits;

  friend MLPEXT_INLINE Mask operator&(Mask a, Mask b) { return {a.bits && b.bits}; }
  friend MLPEXT_INLINE Mask operator|(Mask a, Mask b) { return {a.bits || b.bits}; }
  friend MLPEXT_INLINE Mask operator!(Mask a) { return {!a.bits}; }
};

template <class To, class From> MLPEXT_INLINE To reinterpret(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

MLPEXT_INLINE double divide(double a, double b) { return a / b; }
MLPEXT_INLINE float divide(float a, float b) {
#if defined(MLPEXT_APPROXIMATE) && defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

template <class T> struct Lanes {
  static constexpr bool low_precision = false;  // as in simd_lanes.h
  static constexpr int size = 1;
  using Scalar = T;
  using Bits = typename Format<T>::Bits;
  T v;

  Lanes() = default;
  template <class Number> MLPEXT_INLINE explicit Lanes(Number x) : v(static_cast<T>(x)) {}

  friend MLPEXT_INLINE Lanes operator+(Lanes a, Lanes b) { return Lanes(a.v + b.v); }
  friend MLPEXT_INLINE Lanes operator-(Lanes a, Lanes b) { return Lanes(a.v - b.v); }
  friend MLPEXT_INLINE Lanes operator*(Lanes a, Lanes b) { return Lanes(a.v * b.v); }
  friend MLPEXT_INLINE Lanes operator/(Lanes a, Lanes b) { return Lanes(divide(a.v, b.v)); }
  friend MLPEXT_INLINE Lanes operator-(Lanes a) { return Lanes(-a.v); }
  friend MLPEXT_INLINE Mask<T> operator<(Lanes a, Lanes b) { return {a.v < b.v}; }
  friend MLPEXT_INLINE Mask<T> operator<=(Lanes a, Lanes b) { return {a.v <= b.v}; }
  friend MLPEXT_INLINE Mask<T> operator==(Lanes a, Lanes b) { return {a.v == b.v}; }
  friend MLPEXT_INLINE Mask<T> operator!=(Lanes a, Lanes b) { return {a.v != b.v}; }
  friend MLPEXT_INLINE Mask<T> operator>(Lanes a, Lanes b) { return {a.v > b.v}; }
  friend MLPEXT_INLINE Mask<T> operator>=(Lanes a, Lanes b) { return {a.v >= b.v}; }
};

template <class T> MLPEXT_INLINE typename Lanes<T>::Bits bits_of(Lanes<T> x) {
  return reinterpret<typename Lanes<T>::Bits>(x.v);
}
template <class V> MLPEXT_INLINE V from_bits(typename V::Bits x) {
  return V(reinterpret<typename V::Scalar>(x));
}
template <class T> constexpr typename Format<T>::Bits sign_bit = typename Format<T>::Bits(1)
                                                                 << (8 * sizeof(T) - 1);

template <class T> MLPEXT_INLINE Lanes<T> select(Mask<T> mask, Lanes<T> a, Lanes<T> b) {
  return mask.bits ? a : b;
}

// Not inlined: the reduction of a large argument is ten times the rest of sin.
#ifdef __CUDACC__
#define MLPEXT_RARE static __host__ __device__ __noinline__
#else
#define MLPEXT_RARE inline
#endif
MLPEXT_RARE double library_sin(double x) { return ::sin(x); }
MLPEXT_RARE double library_cos(double x) { return ::cos(x); }

// y, but f(x) where x > limit or -x > limit.
template <class T, class F> MLPEXT_INLINE Lanes<T> patch_lanes(T limit, Lanes<T> x, Lanes<T> y, F f) {
  return x.v > limit || -x.v > limit ? Lanes<T>(f(x.v)) : y;
}

template <class T> MLPEXT_INLINE Lanes<T> abs(Lanes<T> x) {
  return from_bits<Lanes<T>>(bits_of(x) & ~sign_bit<T>);
}

template <class T> MLPEXT_INLINE Lanes<T> minus_abs(Lanes<T> x) {
  return from_bits<Lanes<T>>(bits_of(x) | sign_bit<T>);
}

// Magnitude of x, sign of y.
template <class T> MLPEXT_INLINE Lanes<T> copysign(Lanes<T> x, Lanes<T> y) {
  return from_bits<Lanes<T>>((bits_of(x) & ~sign_bit<T>) | (bits_of(y) & sign_bit<T>));
}

// a * b + c, rounded once.
template <class T> MLPEXT_INLINE Lanes<T> madd(Lanes<T> a, Lanes<T> b, Lanes<T> c) {
  if constexpr (sizeof(T) == 4) return Lanes<T>(::fmaf(a.v, b.v, c.v));
  else return Lanes<T>(::fma(a.v, b.v, c.v));
}

template <class T> MLPEXT_INLINE Lanes<T> sqrt(Lanes<T> x) {
  if constexpr (sizeof(T) == 4) return Lanes<T>(::sqrtf(x.v));
  else return Lanes<T>(::sqrt(x.v));
}

// max(x, lo) and min(x, hi); a NaN x passes.
template <class T> MLPEXT_INLINE Lanes<T> at_least(Lanes<T> x, Lanes<T> lo) { return select(lo > x, lo, x); }
template <class T> MLPEXT_INLINE Lanes<T> at_most(Lanes<T> x, Lanes<T> hi) { return select(hi < x, hi, x); }

// Between memory and registers. Rounding is to nearest, ties to even; a NaN stays one.

MLPEXT_INLINE Lanes<double> widen(double x) { return Lanes<double>(x); }
MLPEXT_INLINE Lanes<float> widen(float x) { return Lanes<float>(x); }
MLPEXT_INLINE Lanes<float> widen(BFloat16 x) { return from_bits<Lanes<float>>(uint32_t(x.bits) << 16); }
MLPEXT_INLINE Lanes<float> widen(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return Lanes<float>(y);
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000)
    return from_bits<Lanes<float>>(sign | magnitude | 0x7f800000);  // infinity or NaN
  return from_bits<Lanes<float>>(sign | reinterpret<uint32_t>(reinterpret<float>(magnitude) * 0x1p112f));
#endif
}

MLPEXT_INLINE double narrow(Lanes<double> x, double) { return x.v; }
MLPEXT_INLINE float narrow(Lanes<float> x, float) { return x.v; }
MLPEXT_INLINE BFloat16 narrow(Lanes<float> x, BFloat16) {
#ifdef __CUDA_ARCH__
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x.v));
  return y;
#else
  const uint32_t b = bits_of(x), nearest = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(bits_of(abs(x)) > 0x7f800000 ? 0x7fff : nearest)};
#endif
}
MLPEXT_INLINE Half narrow(Lanes<float> x, Half) {
#ifdef __CUDA_ARCH__
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x.v));
  return y;
#else
  const uint32_t b = bits_of(abs(x)), sign = bits_of(x) >> 16 & 0x8000;
  uint32_t y = (b - (112u << 23) + 0xfff + (b >> 13 & 1)) >> 13;             // carries into infinity
  if (b < 113u << 23) y = bits_of(abs(x) + Lanes<float>(0.5)) - 0x3f000000;  // subnormal: steps of 2^-24
  if (b >= 143u << 23) y = b > 0x7f800000 ? 0x7fff : 0x7c00;
  return {static_cast<uint16_t>(y | sign)};
#endif
}
// x as memory holds it.
template <class M, class V> MLPEXT_INLINE M narrow(V x) { return narrow(x, M()); }

// Two at once: one instruction on sm_80 and later.
template <class M, class V> MLPEXT_INLINE void narrow_pair(V x, V y, M* to) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(M) == 2) {
    uint32_t pair;
    if constexpr (std::is_same_v<M, Half>)
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y.v), "f"(x.v));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y.v), "f"(x.v));
    to[0].bits = static_cast<uint16_t>(pair);
    to[1].bits = static_cast<uint16_t>(pair >> 16);
    return;
  }
#endif
  to[0] = narrow<M>(x);
  to[1] = narrow<M>(y);
}

}  // namespace mlpext::MLPEXT_ISA
