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

// A counter a lane, each word in the lower half of 64 bits: what products leave in the upper is ignored.
struct Philox {
  static constexpr int size = MLPEXT_VECTOR_BYTES / 8;
  using Words = Packed<uint64_t, size>;

  static MLPEXT_INLINE Words product(Words a, uint32_t b) {  // of the lower halves
#if MLPEXT_VECTOR_BYTES == 64
    return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)(Words{} + b));
#elif MLPEXT_VECTOR_BYTES == 32
    return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)(Words{} + b));
#elif defined(__SSE2__)
    return (Words)_mm_mul_epu32((__m128i)a, (__m128i)(Words{} + b));
#else
    return (a & 0xffffffff) * b;
#endif
  }

  // The counter becomes the four words that it stands for.
  static MLPEXT_INLINE void ten_rounds(Words (&counter)[4], uint64_t seed) {
    uint32_t key[] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Words even = product(counter[0], 0xD2511F53), odd = product(counter[2], 0xCD9E8D57);
      counter[0] = (odd >> 32) ^ counter[1] ^ key[0];
      counter[1] = odd;
      counter[2] = (even >> 32) ^ counter[3] ^ key[1];
      counter[3] = even;
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
  }
};

template <class T> void dropout_mask(const cpu::Dropout& dropout, int64_t first, int64_t rows, int64_t units,
                                     int64_t stride, void* mask_) {
  using Words = Philox::Words;
  constexpr int64_t at_once = 4 * Philox::size;
  const auto threshold = static_cast<uint32_t>(dropout.p * 0x1p32);  // its units are dropped: u below it
  const T kept = static_cast<T>(1 / (1 - dropout.p));
  Words lanes;
  for (int i = 0; i < Philox::size; ++i) lanes[i] = i;
  for (int64_t r = 0; r < rows; ++r) {
    T* mask = static_cast<T*>(mask_) + r * stride;
    for (int64_t j = 0; j < units; j += at_once) {
      Words u[4] = {Words{} + static_cast<uint64_t>(first + r), Words{} + dropout.epoch,
                    Words{} + dropout.layer, lanes + static_cast<uint64_t>(j / 4)};
      Philox::ten_rounds(u, dropout.seed);
      const int64_t n = units - j < at_once ? units - j : at_once;
      for (int64_t i = 0; i < n; ++i)
        mask[j + i] = static_cast<uint32_t>(u[i % 4][i / 4]) < threshold ? T(0) : kept;
    }
  }
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
