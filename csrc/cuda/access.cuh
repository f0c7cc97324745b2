// How kernels are launched and how they reach memory: included by the files that are compiled once a dtype,
// which set MLPEXT_ISA (a namespace), MLPEXT_MEMORY (the type in memory) and, for 16 bits,
// MLPEXT_APPROXIMATE.
#pragma once
#include "cuda/kernels.h"
#include "formulas/elementary.h"
#ifdef MLPEXT_APPROXIMATE
#include "formulas/approximate.h"
#endif

namespace mlpext::MLPEXT_ISA {
namespace {

using namespace cuda;
using M = MLPEXT_MEMORY;
using V = decltype(widen(M()));
using Scalar = V::Scalar;

constexpr int values = 16 / sizeof(M);  // of one access

#ifdef __CUDACC__  // elsewhere the emulator launches
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   const Arguments&... arguments) {
  kernel<<<grid, block, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

// With `bytes` of shared memory, which the kernel finds at shared_memory().
template <class... Parameters, class... Arguments>
cudaError_t launch_shared(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  kernel<<<grid, block, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}
#endif

// n neighbours go in accesses of 16 bytes, or in one of 8 or 4, at an address that is a multiple of it; fewer
// bytes one by one.
template <int bytes> using Word =
    std::conditional_t<bytes >= 16, uint4, std::conditional_t<bytes == 8, uint2, uint32_t>>;
template <class T, int n> using WordOf =
    std::conditional_t<n * sizeof(T) < 4, T, Word<static_cast<int>(n * sizeof(T))>>;

template <int n, class T> __device__ __forceinline__ void read(const T* from, T* to) {
  using W = WordOf<T, n>;
#pragma unroll
  for (int k = 0; k < int(n * sizeof(T) / sizeof(W)); ++k) {
    const W word = reinterpret_cast<const W*>(from)[k];
    memcpy(reinterpret_cast<char*>(to) + k * sizeof(W), &word, sizeof(W));
  }
}

// __stwb, the plain store as an intrinsic: the compiler would merge an assignment with the single elements
// that another branch stores.
template <int n, class T> __device__ __forceinline__ void write(const T* from, T* to) {
  using W = WordOf<T, n>;
  if constexpr (n * sizeof(T) < 4) {
#pragma unroll
    for (int k = 0; k < n; ++k) to[k] = from[k];
  } else {
#pragma unroll
    for (int k = 0; k < int(n * sizeof(T) / sizeof(W)); ++k) {
      W word;
      memcpy(&word, reinterpret_cast<const char*>(from) + k * sizeof(W), sizeof(W));
      __stwb(reinterpret_cast<W*>(to) + k, word);
    }
  }
}
template <class T, int n = values> bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(WordOf<T, n>) == 0;
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
