// The AVX-512 intrinsics that csrc/cpu uses, on two AVX2 registers each: the same bits, on machines without
// AVX-512. For tests alone; included before vec.h, in place of a target that has them.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define EMULATED inline __attribute__((always_inline))

namespace emulated {
namespace {

template <class Half, class Whole> EMULATED Half half_of(const Whole& x, int which) {
  Half half{};
  static_assert(2 * sizeof(Half) == sizeof(Whole) || sizeof(Whole) == 16);  // of 16 bytes: in the lower ones
  std::memcpy(&half, reinterpret_cast<const char*>(&x) + which * (sizeof(Whole) / 2), sizeof(Whole) / 2);
  return half;
}

// f of the halves of each argument, one beside the other.
template <class Whole, class Half, class F, class... In> EMULATED Whole by_halves(F f, const In&... in) {
  const auto low = f(half_of<Half>(in, 0)...), high = f(half_of<Half>(in, 1)...);
  static_assert(2 * sizeof(low) == sizeof(Whole));
  Whole whole;
  std::memcpy(&whole, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&whole) + sizeof(low), &high, sizeof(high));
  return whole;
}

template <int predicate> EMULATED __mmask16 compare(__m512 a, __m512 b) {
  auto bits = [&](int h) {
    return _mm256_movemask_ps(_mm256_cmp_ps(half_of<__m256>(a, h), half_of<__m256>(b, h), predicate));
  };
  return static_cast<__mmask16>(bits(0) | bits(1) << 8);
}
template <int predicate> EMULATED __mmask8 compare(__m512d a, __m512d b) {
  auto bits = [&](int h) {
    return _mm256_movemask_pd(_mm256_cmp_pd(half_of<__m256d>(a, h), half_of<__m256d>(b, h), predicate));
  };
  return static_cast<__mmask8>(bits(0) | bits(1) << 4);
}

template <class Vector, class Scalar> EMULATED Vector blend(unsigned mask, const Vector& a, const Vector& b) {
  Vector y = a;
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(Scalar); ++i)
    if (mask >> i & 1) y[i] = b[i];
  return y;
}

// x 2^floor(n), rounded once.
template <class Vector, class Scalar> EMULATED Vector scalef(Vector x, const Vector& n) {
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(Scalar); ++i) {
    const Scalar exponent = std::floor(n[i]);
    if (exponent != exponent) x[i] = exponent;
    else
      x[i] = std::scalbn(x[i], static_cast<int>(std::fmin(std::fmax(exponent, Scalar(-5000)), Scalar(5000))));
  }
  return x;
}

EMULATED __m128i lower_16_bits(__m256i x) {
  typedef uint16_t Shorts __attribute__((vector_size(16)));
  typedef uint32_t Ints __attribute__((vector_size(32)));
  return (__m128i) __builtin_convertvector((Ints)x, Shorts);
}
EMULATED __m128i to_half(__m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// How many of the lowest bits are set; all masks of bytes in csrc/cpu are such.
EMULATED std::size_t count_of(uint64_t mask) {
  if (mask & (mask + 1)) __builtin_trap();
  return static_cast<std::size_t>(__builtin_popcountll(mask));
}
template <class Vector> EMULATED Vector load_bytes(uint64_t mask, const void* p) {
  Vector x{};
  std::memcpy(&x, p, count_of(mask));
  return x;
}
template <class Vector> EMULATED void store_bytes(void* p, uint64_t mask, const Vector& x) {
  std::memcpy(p, &x, count_of(mask));
}

}  // namespace
}  // namespace emulated

#define BY_HALVES(whole, half, call, ...)                                                                 \
  emulated::by_halves<whole, half>([](auto... in) __attribute__((always_inline)) { return call(in...); }, \
                                   __VA_ARGS__)

#define _mm512_fmadd_ps(a, b, c) BY_HALVES(__m512, __m256, _mm256_fmadd_ps, a, b, c)
#define _mm512_fmadd_pd(a, b, c) BY_HALVES(__m512d, __m256d, _mm256_fmadd_pd, a, b, c)
#define _mm512_maskz_sqrt_ps(all, x) BY_HALVES(__m512, __m256, _mm256_sqrt_ps, x)
#define _mm512_maskz_sqrt_pd(all, x) BY_HALVES(__m512d, __m256d, _mm256_sqrt_pd, x)
#define _mm512_maskz_max_ps(all, a, b) BY_HALVES(__m512, __m256, _mm256_max_ps, a, b)
#define _mm512_maskz_max_pd(all, a, b) BY_HALVES(__m512d, __m256d, _mm256_max_pd, a, b)
#define _mm512_maskz_min_ps(all, a, b) BY_HALVES(__m512, __m256, _mm256_min_ps, a, b)
#define _mm512_maskz_min_pd(all, a, b) BY_HALVES(__m512d, __m256d, _mm256_min_pd, a, b)
#define _mm512_maskz_scalef_ps(all, x, n) (emulated::scalef<__m512, float>(x, n))
#define _mm512_maskz_scalef_pd(all, x, n) (emulated::scalef<__m512d, double>(x, n))
#define _mm512_cmp_ps_mask(a, b, predicate) (emulated::compare<(predicate)>(__m512(a), __m512(b)))
#define _mm512_cmp_pd_mask(a, b, predicate) (emulated::compare<(predicate)>(__m512d(a), __m512d(b)))
#define _mm512_mask_blend_ps(mask, a, b) (emulated::blend<__m512, float>(mask, a, b))
#define _mm512_mask_blend_pd(mask, a, b) (emulated::blend<__m512d, double>(mask, a, b))

#define _mm512_maskz_loadu_epi8(mask, p) (emulated::load_bytes<__m512i>(mask, p))
#define _mm256_maskz_loadu_epi8(mask, p) (emulated::load_bytes<__m256i>(mask, p))
#define _mm_maskz_loadu_epi8(mask, p) (emulated::load_bytes<__m128i>(mask, p))
#define _mm512_mask_storeu_epi8(p, mask, x) (emulated::store_bytes<__m512i>(p, mask, x))
#define _mm256_mask_storeu_epi8(p, mask, x) (emulated::store_bytes<__m256i>(p, mask, x))
#define _mm_mask_storeu_epi8(p, mask, x) (emulated::store_bytes<__m128i>(p, mask, x))

// Of 8 lanes each.
#define _mm512_maskz_cvtepu8_epi32(all, x) BY_HALVES(__m512i, __m128i, _mm256_cvtepu8_epi32, x)
#define _mm512_maskz_cvtepu16_epi32(all, x) BY_HALVES(__m512i, __m128i, _mm256_cvtepu16_epi32, x)
#define _mm512_maskz_cvtepi32_epi16(all, x) BY_HALVES(__m256i, __m256i, emulated::lower_16_bits, x)
#define _mm512_maskz_cvtph_ps(all, x) BY_HALVES(__m512, __m128i, _mm256_cvtph_ps, x)
#define _mm512_maskz_cvtps_ph(all, x, rounding) BY_HALVES(__m256i, __m256, emulated::to_half, __m512(x))

// The one instruction in assembly: vdpbf16ps, for machines with AVX512_BF16, which a machine that needs this
// file is not.
#define asm(...) __builtin_trap()
