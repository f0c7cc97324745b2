// Loads and stores of parts of registers (formulas/simd_memory.h) against memcpy, of every n in 0..size, on one
// instruction set: MLPEXT_VECTOR_BYTES says which. Buffers end where a page ends behind which nothing may be
// touched, so that a byte too many is a crash. With an argument, a store of that many floats, which
// MLPEXT_DEBUG stops where they are no part of a register.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "cpu/prelude.h"

#if MLPEXT_VECTOR_BYTES == 64 && defined(MLPEXT_EMULATED_AVX512)
#pragma GCC target("avx2,fma,f16c,bmi2")
#pragma GCC diagnostic ignored "-Wpsabi"
#include "avx512_emulator/intrinsics.h"
#elif MLPEXT_VECTOR_BYTES == 64
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")
#elif MLPEXT_VECTOR_BYTES == 32
#pragma GCC target("avx2,fma,f16c")
#endif

#define MLPEXT_ISA words
#include "formulas/simd_memory.h"

using namespace mlpext;
using namespace mlpext::words;

namespace {

constexpr int most = 256;  // bytes of a buffer
int faults = 0;

// The last `most` bytes before, or the first behind, a page that is closed.
struct Edge {
  char *low, *high;
  Edge() {
    const std::size_t page = 1 << 16;
    char* all = static_cast<char*>(mmap(nullptr, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (all == MAP_FAILED || mprotect(all + page, page, PROT_READ | PROT_WRITE) != 0) std::abort();
    low = all + page;
    high = all + 2 * page;
  }
};
const Edge edge;

void expect(bool right, const char* what, const char* type, int n) {
  if (right) return;
  std::printf("%s of %d of %s\n", what, n, type);
  ++faults;
}

// Element i as memory may hold it: a number, small and whole where it is an index.
template <class M> M element(int i) {
  if constexpr (sizeof(M) == 1 || std::is_integral_v<M>) return static_cast<M>(i + 3);
  else if constexpr (sizeof(M) == 2) return M{static_cast<uint16_t>(0x3c01 + 37 * i)};
  else return static_cast<M>(1.5 + i);
}

// A copy of what the buffers at the edge hold, with n bytes of `from` in their place.
struct Memory {
  char low[most], high[most];
  Memory() {
    std::memcpy(low, edge.low, most);
    std::memcpy(high, edge.high - most, most);
  }
  void put(const char* at, const void* from, std::size_t n) {
    std::memcpy(at < edge.low + most ? low + (at - edge.low) : high + most - (edge.high - at), from, n);
  }
  bool operator==(const Memory&) const = default;
};

// `load_some(p, n)` and `store_some(p, x, n)` against `load_all(p)` and `store_all(p, x)`.
template <class V, class M, class LoadSome, class LoadAll, class StoreSome, class StoreAll>
void check(const char* type, LoadSome load_some, LoadAll load_all, StoreSome store_some, StoreAll store_all) {
  M all[V::size], stored[V::size];
  for (int i = 0; i < V::size; ++i) all[i] = element<M>(i);
  store_all(stored, load_all(all));
  for (int count = 0; count <= V::size; ++count) {
    volatile int hidden = count;  // from the compiler
    const int n = hidden;
    const std::size_t bytes = n * sizeof(M);
    M some[V::size] = {};
    std::memcpy(some, all, bytes);
    const V expected = load_all(some);
    for (char* at : {edge.high - bytes, edge.low, edge.low + 64 + sizeof(M)}) {
      M* p = reinterpret_cast<M*>(at);
      std::memset(edge.low, 0xa5, most);
      std::memset(edge.high - most, 0xa5, most);
      Memory after;
      after.put(at, stored, bytes);
      store_some(p, load_all(all), n);
      expect(Memory() == after, "store", type, n);

      std::memcpy(at, all, bytes);
      const V read = load_some(p, n);
      expect(std::memcmp(&read, &expected, sizeof(V)) == 0, "load", type, n);
    }
  }
}

template <class V, class M> void check_numbers(const char* type) {
  check<V, M>(
      type, [](const M* p, int n) { return load_partial<V>(p, n); }, [](const M* p) { return load<V>(p); },
      [](M* p, V x, int n) { store_partial(p, x, n); }, [](M* p, V x) { store(p, x); });
}
template <class V, class I> void check_indices(const char* type) {
  check<V, I>(
      type, [](const I* p, int n) { return load_index_partial<V>(p, n); },
      [](const I* p) { return load_index<V>(p); }, [](I* p, V x, int n) { store_index_partial(p, x, n); },
      [](I* p, V x) { store_index(p, x); });
}

}  // namespace

int main(int arguments, char** argument) {
#if MLPEXT_VECTOR_BYTES == 64 && !defined(MLPEXT_EMULATED_AVX512)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 77;
#elif MLPEXT_VECTOR_BYTES > 16
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
      !__builtin_cpu_supports("bmi2"))
    return 77;
#endif
  if (arguments > 1) {
    float memory[2 * Lanes<float>::size] = {};
    store_partial(memory, Lanes<float>(1), std::atoi(argument[1]));
    return 0;
  }
  check_numbers<Lanes<double>, double>("double");
  check_numbers<Lanes<float>, float>("float");
  check_numbers<Lanes<float>, BFloat16>("bfloat16");
  check_numbers<Lanes<float>, Half>("half");
  check_indices<Lanes<double>, uint8_t>("uint8 and double");
  check_indices<Lanes<double>, int32_t>("int32 and double");
  check_indices<Lanes<float>, uint8_t>("uint8 and float");
  check_indices<Lanes<float>, int32_t>("int32 and float");
  return faults != 0;
}
