// SIMD lanes in memory: loads and stores of whole registers and of parts, conversions from and to 16 bits.
#pragma once
#ifdef MLPEXT_DEBUG
#include <cstdio>
#include <cstdlib>
#endif

#include "formulas/simd_lanes.h"

#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __asan_loadN(void* p, std::size_t n);
void __asan_storeN(void* p, std::size_t n);
}
#endif

namespace mlpext::MLPEXT_ISA {

// Memory: whole registers, or the first n elements (0 <= n <= size) and never a byte beyond them.

// A debug build (MLPEXT_DEBUG) stops where n is no such number. AddressSanitizer asks here for the bytes that
// are touched, because it does not watch masked instructions.
#ifdef MLPEXT_DEBUG
[[noreturn]] static void stop_at_part(int n, std::size_t size) {
  std::fprintf(stderr, "mlpext: %d elements are no part of a register of %zu\n", n, size);
  std::abort();
}
#endif
template <class P, class M, bool stores> MLPEXT_INLINE void check_part(const M* p, int n) {
#ifdef MLPEXT_DEBUG
  constexpr std::size_t size = sizeof(P) / sizeof(M);
  if (n < 0 || static_cast<std::size_t>(n) > size) stop_at_part(n, size);
#endif
#ifdef __SANITIZE_ADDRESS__
  if (n > 0 && stores) __asan_storeN(const_cast<M*>(p), n * sizeof(M));
  else if (n > 0) __asan_loadN(const_cast<M*>(p), n * sizeof(M));
#endif
  (void)p, (void)n;
}

template <class P, class M> MLPEXT_INLINE P read(const M* p) {
  P x;
  __builtin_memcpy(&x, p, sizeof(P));
  return x;
}
template <class P, class M> MLPEXT_INLINE void write(M* p, P x) { __builtin_memcpy(p, &x, sizeof(P)); }

#if MLPEXT_VECTOR_BYTES == 32
// All ones in the first n of the 4- or 8-byte elements of a register.
template <int element> MLPEXT_INLINE __m256i first(int n) {
  if constexpr (element == 4)
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  else return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

#if MLPEXT_VECTOR_BYTES == 64
// The mask of n elements, a bit for each byte, 0..64 of them: (1 << 64) - 1 would be undefined, and no bit at
// all where the instruction takes 64 for 0.
template <class M> MLPEXT_INLINE uint64_t first_bytes(int n) {
  return _bzhi_u64(~uint64_t(0), static_cast<unsigned>(n * sizeof(M)));
}
#endif

// The other elements read as 0.
template <class P, class M> MLPEXT_INLINE P read(const M* p, int n) {
  check_part<P, M, false>(p, n);
#if MLPEXT_VECTOR_BYTES == 64
  const uint64_t bytes = first_bytes<M>(n);
  if constexpr (sizeof(P) == 64) return (P)_mm512_maskz_loadu_epi8(bytes, p);
  else if constexpr (sizeof(P) == 32) return (P)_mm256_maskz_loadu_epi8(__mmask32(bytes), p);
  else if constexpr (sizeof(P) == 16) return (P)_mm_maskz_loadu_epi8(__mmask16(bytes), p);
#elif MLPEXT_VECTOR_BYTES == 32
  if constexpr (sizeof(P) == 32 && sizeof(M) == 4)
    return (P)_mm256_maskload_epi32((const int*)p, first<4>(n));
  else if constexpr (sizeof(P) == 32 && sizeof(M) == 8)
    return (P)_mm256_maskload_epi64((const long long*)p, first<8>(n));
#endif
  P x{};
  __builtin_memcpy(&x, p, n * sizeof(M));
  return x;
}
template <class P, class M> MLPEXT_INLINE void write(M* p, P x, int n) {
  check_part<P, M, true>(p, n);
#if MLPEXT_VECTOR_BYTES == 64
  const uint64_t bytes = first_bytes<M>(n);
  if constexpr (sizeof(P) == 64) return _mm512_mask_storeu_epi8(p, bytes, (__m512i)x);
  else if constexpr (sizeof(P) == 32) return _mm256_mask_storeu_epi8(p, __mmask32(bytes), (__m256i)x);
  else if constexpr (sizeof(P) == 16) return _mm_mask_storeu_epi8(p, __mmask16(bytes), (__m128i)x);
#elif MLPEXT_VECTOR_BYTES == 32
  if constexpr (sizeof(P) == 32 && sizeof(M) == 4)
    return _mm256_maskstore_epi32((int*)p, first<4>(n), (__m256i)x);
  else if constexpr (sizeof(P) == 32 && sizeof(M) == 8)
    return _mm256_maskstore_epi64((long long*)p, first<8>(n), (__m256i)x);
#endif
  __builtin_memcpy(p, &x, n * sizeof(M));
}

// 16-bit and 32-bit lanes. The compiler's own conversion goes through halves of registers: 3 to 6
// instructions.
template <int N> MLPEXT_INLINE Packed<uint32_t, N> to_32_bits(Packed<uint16_t, N> x) {
#if MLPEXT_VECTOR_BYTES == 64
  return (Packed<uint32_t, N>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#elif MLPEXT_VECTOR_BYTES == 32
  return (Packed<uint32_t, N>)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Packed<uint32_t, N>);
#endif
}
// x < 2^16
template <int N> MLPEXT_INLINE Packed<uint16_t, N> to_16_bits(Packed<uint32_t, N> x) {
#if MLPEXT_VECTOR_BYTES == 64
  return (Packed<uint16_t, N>)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
#elif MLPEXT_VECTOR_BYTES == 32
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (Packed<uint16_t, N>)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, Packed<uint16_t, N>);
#endif
}

template <int N> MLPEXT_INLINE Packed<float, N> widen_bfloat16(Packed<uint16_t, N> x) {
  return (Packed<float, N>)(to_32_bits<N>(x) << 16);
}

// Round to nearest, ties to even; a NaN stays one and becomes quiet.
template <int N> MLPEXT_INLINE Packed<uint16_t, N> narrow_bfloat16(Packed<float, N> x) {
  using U = Packed<uint32_t, N>;
  U b = (U)x, rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16, quiet = (b >> 16) | 0x40;
  return to_16_bits<N>((b & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

template <int N> MLPEXT_INLINE Packed<float, N> widen_half(Packed<uint16_t, N> x) {
#if MLPEXT_VECTOR_BYTES == 64
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)x);
#elif MLPEXT_VECTOR_BYTES == 32
  return _mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  return vcvt_f32_f16((float16x4_t)x);
#else
  using U = Packed<uint32_t, N>;
  using I = Packed<int32_t, N>;
  U h = __builtin_convertvector(x, U), e = h & 0x7c00, m = h & 0x3ff;
  U normal = ((h & 0x7fff) << 13) + (112u << 23);                             // bias 15 becomes 127
  U special = (normal + (112u << 23)) | (m != 0 ? U{} + 0x400000 : U{});      // inf, or a NaN made quiet
  U small = (U)(__builtin_convertvector((I)m, Packed<float, N>) * 0x1p-24f);  // zero and subnormals, exactly
  small = m != 0 ? small : U{};
  U y = e == 0 ? small : e == 0x7c00 ? special : normal;
  return (Packed<float, N>)(y | ((h & 0x8000) << 16));
#endif
}

template <int N> MLPEXT_INLINE Packed<uint16_t, N> narrow_half(Packed<float, N> x) {
#if MLPEXT_VECTOR_BYTES == 64
  return (Packed<uint16_t, N>)_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif MLPEXT_VECTOR_BYTES == 32
  return (Packed<uint16_t, N>)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (Packed<uint16_t, N>)vcvt_f16_f32(x);
#else
  using U = Packed<uint32_t, N>;
  U b = (U)x, sign = (b >> 16) & 0x8000;
  b &= 0x7fffffff;
  U normal = (b - (112u << 23) + 0xfff + ((b >> 13) & 1)) >> 13;  // nearest even; carries into infinity
  U small = (U)((Packed<float, N>)b + 0.5f) - 0x3f000000;         // below 2^-14: the addition rounds to 2^-24
  U special = 0x7c00 | (b > 0x7f800000 ? 0x200 | ((b >> 13) & 0x3ff) : U{});
  U y = b < (113u << 23) ? small : b >= (143u << 23) ? special : normal;
  return __builtin_convertvector(y | sign, Packed<uint16_t, N>);
#endif
}

// Load and store: memory holds M, lanes hold V.

template <class M> struct Stored {
  using type = M;
};
template <> struct Stored<BFloat16> {
  using type = uint16_t;
};
template <> struct Stored<Half> {
  using type = uint16_t;
};
template <class V, class M> using StoredLanes = Packed<typename Stored<M>::type, V::size>;

template <class V, class M> MLPEXT_INLINE V widen(StoredLanes<V, M> x) {
  if constexpr (same<M, BFloat16>) return V(widen_bfloat16<V::size>(x));
  else if constexpr (same<M, Half>) return V(widen_half<V::size>(x));
  else return V(x);
}
template <class M, class V> MLPEXT_INLINE StoredLanes<V, M> narrow(V x) {
  if constexpr (same<M, BFloat16>) return narrow_bfloat16<V::size>(x.v);
  else if constexpr (same<M, Half>) return narrow_half<V::size>(x.v);
  else return x.v;
}

template <class V, class M> MLPEXT_INLINE V load(const M* p) {
  return widen<V, M>(read<StoredLanes<V, M>>(p));
}
template <class V, class M> MLPEXT_INLINE V load_partial(const M* p, int n) {
  return widen<V, M>(read<StoredLanes<V, M>>(p, n));
}
template <class V, class M> MLPEXT_INLINE void store(M* p, V x) { write(p, narrow<M>(x)); }
template <class V, class M> MLPEXT_INLINE void store_partial(M* p, V x, int n) { write(p, narrow<M>(x), n); }

// bfloat16 in pairs: those at even places of 2 V::size elements in one register, those at odd places in
// another. To widen them is then a shift and a mask, and to narrow them a shift and a blend, where single
// registers must be permuted. A NaN here comes from 16 bits or is the processor's own: its low half is 0, and
// rounding leaves it a NaN.
template <class V> struct BFloat16Pairs {
  V even, odd;
  MLPEXT_INLINE BFloat16Pairs(V even_, V odd_) : even(even_), odd(odd_) {}
  MLPEXT_INLINE explicit BFloat16Pairs(typename V::Bits x)
      : even(from_bits<V>(x << 16)), odd(from_bits<V>(x & 0xffff0000)) {}
  static MLPEXT_INLINE auto rounded(V x) {
    const auto b = bits_of(x);
    return b + 0x7fff + ((b >> 16) & 1);
  }
  MLPEXT_INLINE typename V::Bits bits() const { return (rounded(even) >> 16) | (rounded(odd) & 0xffff0000); }
};

// Small whole numbers held in lanes, as uint8_t or int32_t in memory.
template <class I, class V> MLPEXT_INLINE Packed<I, V::size> to_index(V x) {
  auto wide = __builtin_convertvector(x.v, Packed<int32_t, V::size>);
  return __builtin_convertvector(wide, Packed<I, V::size>);
}
// The compiler would unpack bytes one by one, through general registers.
template <int N> MLPEXT_INLINE Packed<int32_t, N> to_32_bits(Packed<uint8_t, N> x) {
#if MLPEXT_VECTOR_BYTES == 64
  if constexpr (N == 16) return (Packed<int32_t, N>)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)x);
#endif
#if MLPEXT_VECTOR_BYTES >= 32
  if constexpr (N == 8) return (Packed<int32_t, N>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)x));
#endif
  return __builtin_convertvector(x, Packed<int32_t, N>);
}
template <int N> MLPEXT_INLINE Packed<int32_t, N> to_32_bits(Packed<int32_t, N> x) { return x; }
template <class V, class I> MLPEXT_INLINE V from_index(Packed<I, V::size> x) {
  return V(__builtin_convertvector(to_32_bits<V::size>(x), typename V::Register));
}

template <class V, class I> MLPEXT_INLINE V load_index(const I* p) {
  return from_index<V, I>(read<Packed<I, V::size>>(p));
}
template <class V, class I> MLPEXT_INLINE V load_index_partial(const I* p, int n) {
  return from_index<V, I>(read<Packed<I, V::size>>(p, n));
}
template <class V, class I> MLPEXT_INLINE void store_index(I* p, V x) { write(p, to_index<I>(x)); }
template <class V, class I> MLPEXT_INLINE void store_index_partial(I* p, V x, int n) {
  write(p, to_index<I>(x), n);
}

}  // namespace mlpext::MLPEXT_ISA
