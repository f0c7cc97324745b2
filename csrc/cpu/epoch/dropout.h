// The masks of dropout, compiled once an instruction set.
//
// Their numbers come of a counter, not of a state: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", 2011) makes four words of 32 bits of a counter of four words and a key
// of two. Here the key is the run's seed, and the counter (sample in the epoch's order, epoch, layer, j / 4),
// whose word j % 4 is unit j's. So a mask depends neither on the order in which rows are taken, nor on chunks
// or threads, and every engine can have the same.
#pragma once
#include "cpu/map.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// Several counters at once, that of unit j and the three after it in a lane. A word is the lower half of 64
// bits: what the products leave in the upper is ignored.
struct Philox {
  static constexpr int size = MLPEXT_VECTOR_BYTES / 8, words = 4 * size;
  using Lane = Packed<uint64_t, size>;

  static MLPEXT_INLINE Lane product(const Lane& a, uint32_t b) {  // of the lower halves
#if MLPEXT_VECTOR_BYTES == 64
    return (Lane)_mm512_mul_epu32((__m512i)a, (__m512i)(Lane{} + b));
#elif MLPEXT_VECTOR_BYTES == 32
    return (Lane)_mm256_mul_epu32((__m256i)a, (__m256i)(Lane{} + b));
#elif defined(__SSE2__)
    return (Lane)_mm_mul_epu32((__m128i)a, (__m128i)(Lane{} + b));
#elif defined(__aarch64__)
    return (Lane)vmull_u32(vmovn_u64(a), vdup_n_u32(b));
#else
    return (a & 0xffffffff) * b;
#endif
  }

  // to[4 i + k] = word k that stands for counter i.
  static MLPEXT_INLINE void generate(const Lane (&counter)[4], uint64_t seed, uint32_t* to) {
    Lane c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
      const Lane even = product(c0, 0xD2511F53), odd = product(c2, 0xCD9E8D57);
      c0 = (odd >> 32) ^ c1 ^ key0;
      c1 = odd;
      c2 = (even >> 32) ^ c3 ^ key1;
      c3 = even;
    }
    const Lane first = (c0 & 0xffffffff) | c1 << 32, second = (c2 & 0xffffffff) | c3 << 32;
    [&]<int... i>(std::integer_sequence<int, i...>) MLPEXT_LAMBDA {  // lane by lane in turn
      write(to, shuffle<(i / 2 + i % 2 * size)...>(first, second));
      write(to + words / 2, shuffle<(size / 2 + i / 2 + i % 2 * size)...>(first, second));
    }(std::make_integer_sequence<int, size>());
  }
};

template <class T> void dropout_mask(const cpu::Dropout& dropout, int64_t first, int64_t rows, int64_t units,
                                     int64_t stride, void* mask_) {
  const auto threshold = static_cast<uint32_t>(dropout.p * 0x1p32);  // a unit is dropped where u is below it
  const T kept = static_cast<T>(1 / (1 - dropout.p));
  Philox::Lane numbers;
  for (int i = 0; i < Philox::size; ++i) numbers[i] = i;
  for (int64_t r = 0; r < rows; ++r) {
    T* mask = static_cast<T*>(mask_) + r * stride;
    for (int64_t j = 0; j < units; j += Philox::words) {
      alignas(64) uint32_t u[Philox::words];
      alignas(64) T m[Philox::words];
      const Philox::Lane zero{}, counter[] = {zero + static_cast<uint64_t>(first + r), zero + dropout.epoch,
                                              zero + dropout.layer, numbers + static_cast<uint64_t>(j / 4)};
      Philox::generate(counter, dropout.seed, u);
      for (int i = 0; i < Philox::words; ++i) m[i] = u[i] < threshold ? T(0) : kept;
      std::memcpy(mask + j, m, (units - j < Philox::words ? units - j : Philox::words) * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
