// The AVX-512 intrinsics that csrc/cpu uses, with the bits that the hardware gives, on AVX2, FMA and F16C:
// two registers of 32 bytes for one of 64. For tests alone, and g++ alone; included before simd_lanes.h, whose
// other operations are the compiler's own vectors.
#pragma once
#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define EMULATED inline __attribute__((always_inline))

namespace emulated {
namespace {

// Half `which` of x; of 16 bytes the half is the lower part of a register.
template <class Half, class RoundedInteger> EMULATED Half half_of(const RoundedInteger& x, int which) {
  static_assert(2 * sizeof(Half) == sizeof(RoundedInteger) || sizeof(RoundedInteger) == 16);
  Half half{};
  std::memcpy(&half, reinterpret_cast<const char*>(&x) + which * (sizeof(RoundedInteger) / 2),
              sizeof(RoundedInteger) / 2);
  return half;
}

template <class RoundedInteger, class Half> EMULATED RoundedInteger both(const Half& low, const Half& high) {
  static_assert(2 * sizeof(Half) == sizeof(RoundedInteger));
  RoundedInteger whole;
  std::memcpy(&whole, &low, sizeof(Half));
  std::memcpy(reinterpret_cast<char*>(&whole) + sizeof(Half), &high, sizeof(Half));
  return whole;
}

// f of the halves of each argument.
template <class RoundedInteger, class Half, class F, class... In>
EMULATED RoundedInteger by_halves(F f, const In&... in) {
  return both<RoundedInteger>(f(half_of<Half>(in, 0)...), f(half_of<Half>(in, 1)...));
}

template <int predicate> EMULATED __mmask16 compare(__m512 a, __m512 b) {
  auto bits = [&](int h) __attribute__((always_inline)) {
    return _mm256_movemask_ps(_mm256_cmp_ps(half_of<__m256>(a, h), half_of<__m256>(b, h), predicate));
  };
  return static_cast<__mmask16>(bits(0) | bits(1) << 8);
}
template <int predicate> EMULATED __mmask8 compare(__m512d a, __m512d b) {
  auto bits = [&](int h) __attribute__((always_inline)) {
    return _mm256_movemask_pd(_mm256_cmp_pd(half_of<__m256d>(a, h), half_of<__m256d>(b, h), predicate));
  };
  return static_cast<__mmask8>(bits(0) | bits(1) << 4);
}

// Lane i is number index[i] % (lanes of all tables) of the tables, one after the other.
template <class... Tables> EMULATED __m512 look_up(__m512i index, Tables... tables) {
  const __m512 table[] = {tables...};
  int at[16];
  float numbers[16 * sizeof...(tables)], y[16];
  std::memcpy(at, &index, sizeof(at));
  std::memcpy(numbers, table, sizeof(numbers));
  for (int i = 0; i < 16; ++i) y[i] = numbers[at[i] & (16 * sizeof...(tables) - 1)];
  __m512 found;
  std::memcpy(&found, y, sizeof(found));
  return found;
}

// b where a bit of the mask is set, else a.
EMULATED __m512 blend(__mmask16 mask, __m512 a, __m512 b) {
  auto half = [&](int h) __attribute__((always_inline)) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask >> 8 * h), bit), bit);
    return _mm256_blendv_ps(half_of<__m256>(a, h), half_of<__m256>(b, h), _mm256_castsi256_ps(set));
  };
  return both<__m512>(half(0), half(1));
}
EMULATED __m512d blend(__mmask8 mask, __m512d a, __m512d b) {
  auto half = [&](int h) __attribute__((always_inline)) {
    const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(mask >> 4 * h), bit), bit);
    return _mm256_blendv_pd(half_of<__m256d>(a, h), half_of<__m256d>(b, h), _mm256_castsi256_pd(set));
  };
  return both<__m512d>(half(0), half(1));
}

// x 2^floor(n), rounded once, with the special cases of the manual's table for VSCALEF.
template <class T> T scalef(T x, T n) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const T indefinite = -std::numeric_limits<T>::quiet_NaN();
  if (x != x) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const bool quiet = std::bit_cast<Bits>(x) & Bits(1) << (std::numeric_limits<T>::digits - 2);
    return quiet && n == infinity ? infinity : quiet && n == -infinity ? 0 : x + x;
  }
  if (n != n) return n + n;
  if (n == infinity) return x == 0 ? indefinite : std::copysign(infinity, x);
  if (n == -infinity) return x == infinity || x == -infinity ? indefinite : std::copysign(T(0), x);
  // Beyond 5000 every finite x but 0 overflows or vanishes.
  return std::scalbn(x, static_cast<int>(std::fmin(std::fmax(std::floor(n), T(-5000)), T(5000))));
}
template <class Vector> Vector scalef_lanes(const Vector& x, const Vector& n) {
  Vector y{};
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(x[0]); ++i) y[i] = scalef(x[i], n[i]);
  return y;
}

EMULATED __m128i lower_16_bits(__m256i x) {
  const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08));
}
EMULATED __m128i to_half(__m256 x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// How many of the lowest bits are set; every mask of bytes in csrc/cpu is of that kind.
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

// The zero-masked forms are used with all lanes, only because g++ 12 warns of the plain ones.
#define BY_HALVES(RoundedInteger, Half, call, ...) \
  emulated::by_halves<RoundedInteger, Half>(       \
      [](auto... in) __attribute__((always_inline)) { return call(in...); }, __VA_ARGS__)

#define _mm512_fmadd_ps(a, b, c) BY_HALVES(__m512, __m256, _mm256_fmadd_ps, a, b, c)
#define _mm512_fmadd_pd(a, b, c) BY_HALVES(__m512d, __m256d, _mm256_fmadd_pd, a, b, c)
#define _mm512_maskz_sqrt_ps(all, x) BY_HALVES(__m512, __m256, _mm256_sqrt_ps, x)
#define _mm512_maskz_sqrt_pd(all, x) BY_HALVES(__m512d, __m256d, _mm256_sqrt_pd, x)
#define _mm512_maskz_max_ps(all, a, b) BY_HALVES(__m512, __m256, _mm256_max_ps, a, b)
#define _mm512_maskz_max_pd(all, a, b) BY_HALVES(__m512d, __m256d, _mm256_max_pd, a, b)
#define _mm512_maskz_min_ps(all, a, b) BY_HALVES(__m512, __m256, _mm256_min_ps, a, b)
#define _mm512_maskz_min_pd(all, a, b) BY_HALVES(__m512d, __m256d, _mm256_min_pd, a, b)
#define _mm512_mul_epu32(a, b) BY_HALVES(__m512i, __m256i, _mm256_mul_epu32, a, b)
#define _mm512_load_ps(p) (*reinterpret_cast<const __m512*>(p))
#define _mm512_maskz_permutexvar_ps(all, index, table) emulated::look_up(index, table)
#define _mm512_maskz_permutex2var_ps(all, low, index, high) emulated::look_up(index, low, high)
#define _mm512_maskz_scalef_ps(all, x, n) emulated::scalef_lanes<__m512>(x, n)
#define _mm512_maskz_scalef_pd(all, x, n) emulated::scalef_lanes<__m512d>(x, n)
#undef _mm512_cmp_ps_mask
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_ps_mask(a, b, predicate) (emulated::compare<(predicate)>(__m512(a), __m512(b)))
#define _mm512_cmp_pd_mask(a, b, predicate) (emulated::compare<(predicate)>(__m512d(a), __m512d(b)))
#define _mm512_mask_blend_ps(mask, a, b) emulated::blend(__mmask16(mask), __m512(a), __m512(b))
#define _mm512_mask_blend_pd(mask, a, b) emulated::blend(__mmask8(mask), __m512d(a), __m512d(b))

#define _mm512_maskz_loadu_epi8(mask, p) emulated::load_bytes<__m512i>(mask, p)
#define _mm256_maskz_loadu_epi8(mask, p) emulated::load_bytes<__m256i>(mask, p)
#define _mm_maskz_loadu_epi8(mask, p) emulated::load_bytes<__m128i>(mask, p)
#define _mm512_mask_storeu_epi8(p, mask, x) emulated::store_bytes<__m512i>(p, mask, x)
#define _mm256_mask_storeu_epi8(p, mask, x) emulated::store_bytes<__m256i>(p, mask, x)
#define _mm_mask_storeu_epi8(p, mask, x) emulated::store_bytes<__m128i>(p, mask, x)

#define _mm512_maskz_cvtepu8_epi32(all, x) BY_HALVES(__m512i, __m128i, _mm256_cvtepu8_epi32, x)
#define _mm512_maskz_cvtepu16_epi32(all, x) BY_HALVES(__m512i, __m128i, _mm256_cvtepu16_epi32, x)
#define _mm512_maskz_cvtepi32_epi16(all, x) BY_HALVES(__m256i, __m256i, emulated::lower_16_bits, x)
#undef _mm512_maskz_cvtph_ps
#undef _mm512_maskz_cvtps_ph
#define _mm512_maskz_cvtph_ps(all, x) BY_HALVES(__m512, __m128i, _mm256_cvtph_ps, x)
#define _mm512_maskz_cvtps_ph(all, x, rounding) BY_HALVES(__m256i, __m256, emulated::to_half, __m512(x))
