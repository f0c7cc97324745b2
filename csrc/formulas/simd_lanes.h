// SIMD lanes: the operations that a formula may use, on whole registers of float or double. Lanes<float> has
// 4, 8 or 16 lanes, Lanes<double> half as many.
//
// The including file sets MLPEXT_ISA (a namespace: baseline, avx2, avx512, neon) and MLPEXT_VECTOR_BYTES (16,
// 32, 64) and switches its target on: 64 means AVX-512 F/BW/VL/DQ + BMI2, 32 means AVX2 + FMA + F16C, 16 is
// portable; on 64-bit ARM it is NEON, which always has FMA. Include standard headers before switching the
// target: their inline functions must not be compiled for it, or other files may run them.
#pragma once

#include <cstdint>
#if MLPEXT_VECTOR_BYTES > 16 || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "formulas/dtype.h"

#define MLPEXT_INLINE inline __attribute__((always_inline))

namespace mlpext::MLPEXT_ISA {

#if defined(__aarch64__)
constexpr bool fused_madd = true;
constexpr int vector_registers = 32;
#else
constexpr bool fused_madd = MLPEXT_VECTOR_BYTES > 16;
constexpr int vector_registers = MLPEXT_VECTOR_BYTES == 64 ? 32 : 16;
#endif

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;

// N elements of M in a register, or in a part of one.
template <class M, int N> struct PackedOf {
  typedef M type __attribute__((vector_size(N * sizeof(M))));
};
template <class M, int N> using Packed = typename PackedOf<M, N>::type;

// Lane i of the result is lane index[i] of a and b, counted through both.
template <int... index, class P> MLPEXT_INLINE P shuffle(P a, P b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, index...);
#else  // GCC 11
  return __builtin_shuffle(a, b, decltype(a < b){index...});
#endif
}

template <class T> struct Format;
template <> struct Format<float> {
  using Int = int32_t;
  using Bits = uint32_t;
  static constexpr int mantissa = 23, exponent = 8, bias = 127;
};
template <> struct Format<double> {
  using Int = int64_t;
  using Bits = uint64_t;
  static constexpr int mantissa = 52, exponent = 11, bias = 1023;
};

#if MLPEXT_VECTOR_BYTES == 64
// The compiler's masks for intrinsics: one bit a lane.
template <int N> struct MaskOf {
  using type = __mmask16;
};
template <> struct MaskOf<8> {
  using type = __mmask8;
};
#endif

template <class T> struct Mask {
  static constexpr int size = MLPEXT_VECTOR_BYTES / sizeof(T);
#if MLPEXT_VECTOR_BYTES == 64
  typename MaskOf<size>::type bits;  // one bit a lane
#else
  Packed<typename Format<T>::Int, size> bits;  // all ones or all zeros
#endif

  friend MLPEXT_INLINE Mask operator&(Mask a, Mask b) { return {decltype(bits)(a.bits & b.bits)}; }
  friend MLPEXT_INLINE Mask operator|(Mask a, Mask b) { return {decltype(bits)(a.bits | b.bits)}; }
  friend MLPEXT_INLINE Mask operator!(Mask a) { return {decltype(bits)(~a.bits)}; }
};

// `low_precision`: the results go to 16 bits, where the last two of a float's digits do not show; functions
// may then leave out what makes those right.
template <class T, bool low_precision_ = false> struct Lanes {
  static constexpr bool low_precision = low_precision_;
  static constexpr int size = MLPEXT_VECTOR_BYTES / sizeof(T);
  using Scalar = T;
  using Register = Packed<T, size>;
  using Bits = Packed<typename Format<T>::Bits, size>;
  Register v;

  Lanes() = default;
  MLPEXT_INLINE explicit Lanes(double x) : v(T(x) - Register{}) {}  // x - 0, not x + 0, which would lose -0
  MLPEXT_INLINE explicit Lanes(Register x) : v(x) {}

  friend MLPEXT_INLINE Lanes operator+(Lanes a, Lanes b) { return Lanes(a.v + b.v); }
  friend MLPEXT_INLINE Lanes operator-(Lanes a, Lanes b) { return Lanes(a.v - b.v); }
  friend MLPEXT_INLINE Lanes operator*(Lanes a, Lanes b) { return Lanes(a.v * b.v); }
  friend MLPEXT_INLINE Lanes operator/(Lanes a, Lanes b) { return Lanes(a.v / b.v); }
  friend MLPEXT_INLINE Lanes operator-(Lanes a) { return Lanes(-a.v); }

#if MLPEXT_VECTOR_BYTES == 64
  template <int predicate> static MLPEXT_INLINE Mask<T> compare(Lanes a, Lanes b) {
    if constexpr (size == 16) return {_mm512_cmp_ps_mask(a.v, b.v, predicate)};
    else return {_mm512_cmp_pd_mask(a.v, b.v, predicate)};
  }
  friend MLPEXT_INLINE Mask<T> operator<(Lanes a, Lanes b) { return compare<_CMP_LT_OS>(a, b); }
  friend MLPEXT_INLINE Mask<T> operator<=(Lanes a, Lanes b) { return compare<_CMP_LE_OS>(a, b); }
  friend MLPEXT_INLINE Mask<T> operator==(Lanes a, Lanes b) { return compare<_CMP_EQ_OQ>(a, b); }
  friend MLPEXT_INLINE Mask<T> operator!=(Lanes a, Lanes b) { return compare<_CMP_NEQ_UQ>(a, b); }
#else
  friend MLPEXT_INLINE Mask<T> operator<(Lanes a, Lanes b) { return {a.v < b.v}; }
  friend MLPEXT_INLINE Mask<T> operator<=(Lanes a, Lanes b) { return {a.v <= b.v}; }
  friend MLPEXT_INLINE Mask<T> operator==(Lanes a, Lanes b) { return {a.v == b.v}; }
  friend MLPEXT_INLINE Mask<T> operator!=(Lanes a, Lanes b) { return {a.v != b.v}; }
#endif
  friend MLPEXT_INLINE Mask<T> operator>(Lanes a, Lanes b) { return b < a; }
  friend MLPEXT_INLINE Mask<T> operator>=(Lanes a, Lanes b) { return b <= a; }
};

template <class T, bool low_precision> MLPEXT_INLINE auto bits_of(Lanes<T, low_precision> x) {
  return (typename Lanes<T>::Bits)x.v;
}
template <class V> MLPEXT_INLINE V from_bits(typename V::Bits x) { return V((typename V::Register)x); }
template <class T> constexpr typename Format<T>::Bits sign_bit = typename Format<T>::Bits(1)
                                                                 << (8 * sizeof(T) - 1);

template <class T, bool low_precision>
MLPEXT_INLINE Lanes<T, low_precision> select(Mask<T> mask, Lanes<T, low_precision> a,
                                             Lanes<T, low_precision> b) {
#if MLPEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(_mm512_mask_blend_ps(mask.bits, b.v, a.v));
  else return Lanes<T, low_precision>(_mm512_mask_blend_pd(mask.bits, b.v, a.v));
#else
  return Lanes<T, low_precision>(mask.bits ? a.v : b.v);
#endif
}

template <class T> MLPEXT_INLINE bool any(Mask<T> mask) {
#if MLPEXT_VECTOR_BYTES == 64
  return mask.bits != 0;
#elif MLPEXT_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i)mask.bits) != 0;
#else
  auto words = (Packed<uint64_t, 2>)mask.bits;
  return (words[0] | words[1]) != 0;
#endif
}

MLPEXT_INLINE double library_sin(double x) { return __builtin_sin(x); }
MLPEXT_INLINE double library_cos(double x) { return __builtin_cos(x); }

// y, but f(x) in the lanes where x > limit or -x > limit: for what is rare, a lane at a time.
template <class T, bool low_precision, class F>
MLPEXT_INLINE Lanes<T, low_precision> patch_lanes(T limit, Lanes<T, low_precision> x,
                                                  Lanes<T, low_precision> y, F f) {
  if (any((x > Lanes<T, low_precision>(limit)) | (-x > Lanes<T, low_precision>(limit)))) {
    for (int i = 0; i < Lanes<T>::size; ++i)
      if (x.v[i] > limit || -x.v[i] > limit) y.v[i] = f(x.v[i]);
  }
  return y;
}

template <class T, bool low_precision> MLPEXT_INLINE Lanes<T, low_precision> abs(Lanes<T, low_precision> x) {
  return from_bits<Lanes<T, low_precision>>(bits_of(x) & ~sign_bit<T>);
}

template <class T, bool low_precision>
MLPEXT_INLINE Lanes<T, low_precision> minus_abs(Lanes<T, low_precision> x) {  // one instruction
  return from_bits<Lanes<T, low_precision>>(bits_of(x) | sign_bit<T>);
}

// Magnitude of x, sign of y.
template <class T, bool low_precision>
MLPEXT_INLINE Lanes<T, low_precision> copysign(Lanes<T, low_precision> x, Lanes<T, low_precision> y) {
  return from_bits<Lanes<T, low_precision>>((bits_of(x) & ~sign_bit<T>) | (bits_of(y) & sign_bit<T>));
}

// a * b + c, rounded once where the instruction set can.
template <class T, bool low_precision> MLPEXT_INLINE Lanes<T, low_precision> madd(Lanes<T, low_precision> a,
                                                                                  Lanes<T, low_precision> b,
                                                                                  Lanes<T, low_precision> c) {
#if MLPEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(_mm512_fmadd_ps(a.v, b.v, c.v));
  else return Lanes<T, low_precision>(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif MLPEXT_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(_mm256_fmadd_ps(a.v, b.v, c.v));
  else return Lanes<T, low_precision>(_mm256_fmadd_pd(a.v, b.v, c.v));
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(vfmaq_f32(c.v, a.v, b.v));
  else return Lanes<T, low_precision>(vfmaq_f64(c.v, a.v, b.v));
#else
  return a * b + c;
#endif
}

template <class T, bool low_precision> MLPEXT_INLINE Lanes<T, low_precision> sqrt(Lanes<T, low_precision> x) {
#if MLPEXT_VECTOR_BYTES == 64
  // The zero-masked form: the plain one starts from an undefined register, which g++ 12 warns of.
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(_mm512_maskz_sqrt_ps(0xffff, x.v));
  else return Lanes<T, low_precision>(_mm512_maskz_sqrt_pd(0xff, x.v));
#elif MLPEXT_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(_mm256_sqrt_ps(x.v));
  else return Lanes<T, low_precision>(_mm256_sqrt_pd(x.v));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(_mm_sqrt_ps(x.v));
  else return Lanes<T, low_precision>(_mm_sqrt_pd(x.v));
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(vsqrtq_f32(x.v));
  else return Lanes<T, low_precision>(vsqrtq_f64(x.v));
#else
  for (int i = 0; i < Lanes<T, low_precision>::size; ++i)
    x.v[i] = T(__builtin_sqrt(x.v[i]));  // float by way of double rounds the same
  return x;
#endif
}

// max(x, lo) and min(x, hi); a NaN x passes. The instruction returns its second operand when either is NaN.
template <class T, bool low_precision>
MLPEXT_INLINE Lanes<T, low_precision> at_least(Lanes<T, low_precision> x, Lanes<T, low_precision> lo) {
#if MLPEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(_mm512_maskz_max_ps(0xffff, lo.v, x.v));
  else return Lanes<T, low_precision>(_mm512_maskz_max_pd(0xff, lo.v, x.v));
#else
  return select(lo > x, lo, x);
#endif
}
template <class T, bool low_precision>
MLPEXT_INLINE Lanes<T, low_precision> at_most(Lanes<T, low_precision> x, Lanes<T, low_precision> hi) {
#if MLPEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return Lanes<T, low_precision>(_mm512_maskz_min_ps(0xffff, hi.v, x.v));
  else return Lanes<T, low_precision>(_mm512_maskz_min_pd(0xff, hi.v, x.v));
#else
  return select(hi < x, hi, x);
#endif
}

}  // namespace mlpext::MLPEXT_ISA
