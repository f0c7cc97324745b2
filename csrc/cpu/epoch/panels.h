// How an epoch keeps its weights, and the product that runs on them.
//
// A weight is kept transposed, W' (in_features, out_features), cut into panels of up to `panel_vectors`
// registers of columns: panel p is a dense (in_features, width) matrix. So a row of a panel is a few whole
// registers, and the forward product, both gradients and the update run along it without a shuffle.
#pragma once
#include "cpu/gemm/microkernels.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// 4 vectors x 6 rows of sums fill 24 of 32 registers (AVX-512, NEON); 2 x 6 fill 12 of 16.
constexpr int panel_vectors = vector_registers == 32 ? 4 : 2;
template <class T> constexpr int64_t panel_width = panel_vectors * Lanes<T>::size;
// SampleRows of a tile of so many vectors. Narrow tiles need more rows to hide the latency of madd: 8 in
// flight.
constexpr int tile_rows(int vectors) {
  return vectors == 1 ? 12 : vectors == 2 && panel_vectors > 2 ? 10 : 6;
}
constexpr int most_rows = 12;

template <class T> MLPEXT_INLINE Lanes<T> broadcast(T x) {
  return Lanes<T>(typename Lanes<T>::Register(x - typename Lanes<T>::Register{}));
}

template <class T> constexpr int64_t padded(int64_t n) {
  return (n + Lanes<T>::size - 1) / Lanes<T>::size * Lanes<T>::size;
}

template <class T> struct Panels {
  T* data;
  int64_t rows, columns;  // columns: a multiple of the lanes

  int64_t count() const { return (columns + panel_width<T> - 1) / panel_width<T>; }
  int64_t width(int64_t p) const {
    const int64_t left = columns - p * panel_width<T>;
    return left < panel_width<T> ? left : panel_width<T>;
  }
  T* panel(int64_t p) const { return data + p * panel_width<T> * rows; }
  T* at(int64_t row, int64_t column) const {
    const int64_t p = column / panel_width<T>;
    return panel(p) + row * width(p) + column % panel_width<T>;
  }
};

// How the operands of a product lie: element (m, k) of A at a[m a_row + k a_depth]; rows of the others.
struct Strides {
  int64_t a_row, a_depth, b_row, c_row, init_row;
};

// C = beta init + alpha A B on a tile in registers; init may be C, or null for 0.
template <int rows, int vectors, class T> void panel_tile(int64_t depth, const T* a, const T* b, T* c,
                                                          const T* init, T alpha, T beta, const Strides& s) {
  using V = Lanes<T>;
  V sum[rows][vectors];
#pragma GCC unroll 12
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[m][v] = V(0);
  const int64_t a_row = s.a_row, a_depth = s.a_depth, b_row = s.b_row;
  // Asked for at the end only, it would be waited for, from the L3 cache where W is large. A short sum cannot
  // hide that.
  if (init && depth > 8) {
#pragma GCC unroll 12
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) __builtin_prefetch(init + m * s.init_row + v * V::size, 1);
  }
  for (int64_t k = 0; k < depth; ++k, a += a_depth, b += b_row) {
    V row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[v] = load<V>(b + v * V::size);
#pragma GCC unroll 12
    for (int m = 0; m < rows; ++m) {
      const V x = broadcast(a[m * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[m][v] = madd(x, row[v], sum[m][v]);
    }
  }
  const V scale = broadcast(alpha), old_scale = broadcast(beta);
#pragma GCC unroll 12
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      V y = scale * sum[m][v];
      if (init) y = madd(old_scale, load<V>(init + m * s.init_row + v * V::size), y);
      store(c + m * s.c_row + v * V::size, y);
    }
  }
}

template <class T>
using TileKernel = void (*)(int64_t, const T*, const T*, T*, const T*, T, T, const Strides&);

// For 1 to tile_rows(vectors) rows; null beyond.
template <int vectors, class T, int... above>
constexpr std::array<TileKernel<T>, most_rows> tiles_of(std::integer_sequence<int, above...>) {
  constexpr int most = tile_rows(vectors);
  return {(above < most ? panel_tile<(above < most ? above + 1 : 1), vectors, T> : nullptr)...};
}
template <class T, int... vectors>
constexpr std::array<std::array<TileKernel<T>, most_rows>, panel_vectors> all_tiles(
    std::integer_sequence<int, vectors...>) {
  return {tiles_of<vectors + 1, T>(std::make_integer_sequence<int, most_rows>())...};
}
template <class T> constexpr auto tiles = all_tiles<T>(std::make_integer_sequence<int, panel_vectors>());

// The same on any number of rows of one panel, in tiles of nearly equal heights.
template <class T> void panel_gemm(int64_t rows, int64_t width, int64_t depth, const T* a, const T* b, T* c,
                                   const T* init, T alpha, T beta, const Strides& s) {
  const int vectors = static_cast<int>(width / Lanes<T>::size);
  const int64_t most = tile_rows(vectors), count = (rows + most - 1) / most;
  for (int64_t t = 0, row = 0; t < count; ++t) {
    const int64_t height = (rows - row) / (count - t);
    const TileKernel<T> kernel = tiles<T>[vectors - 1][height - 1];
    kernel(depth, a + row * s.a_row, b, c + row * s.c_row, init ? init + row * s.init_row : nullptr, alpha,
           beta, s);
    row += height;
  }
}

// Lane j: the sum of the lanes of vector(j), for `count` vectors (a power of two), each asked for once, in
// order.
template <int count, class V, class F> MLPEXT_INLINE V sums(F vector, int64_t first) {
  if constexpr (count == 1) return vector(first);
  else {
    const V a = sums<count / 2, V>(vector, first), b = sums<count / 2, V>(vector, first + count / 2);
    return interleave<count / 2, 0>(a, b) + interleave<count / 2, 1>(a, b);
  }
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
