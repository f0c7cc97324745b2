// Products and transposes in registers, on the lanes of cpu/vec.h: all that the engine computes with, besides
// the formulas.
//
// A matrix of weights is kept with one row an input, in panels of up to `panel_vectors` vectors of columns
// (outputs): panel p is a dense (rows, width) matrix. So a row of a panel is a few whole registers, and the
// forward product, its gradients and the update run along it without a shuffle.
#pragma once
#include "formulas/simd_lanes.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// 4 vectors x 6 rows of sums fill 24 of 32 registers (AVX-512); 2 x 6 fill 12 of 16.
constexpr int panel_vectors = MLPEXT_VECTOR_BYTES == 64 ? 4 : 2;
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
template <int rows, int vectors, class T>
void tile(int64_t depth, const T* a, const T* b, T* c, const T* init, T alpha, T beta, const Strides& s) {
  using V = Lanes<T>;
  V sum[rows][vectors];
#pragma GCC unroll 12
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[m][v] = V(0);
  const int64_t a_row = s.a_row, a_depth = s.a_depth, b_row = s.b_row;
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

template <int vectors, class T, int... rows>
constexpr std::array<TileKernel<T>, most_rows> tiles_of(std::integer_sequence<int, rows...>) {
  return {(rows < tile_rows(vectors) ? tile < rows + 1 <= tile_rows(vectors) ? rows + 1 : 1, vectors,
           T >                       : nullptr)...};
}
template <class T, int... vectors>
constexpr std::array<std::array<TileKernel<T>, most_rows>, panel_vectors> all_tiles(
    std::integer_sequence<int, vectors...>) {
  return {tiles_of<vectors + 1, T>(std::make_integer_sequence<int, most_rows>())...};
}
template <class T> constexpr auto tiles = all_tiles<T>(std::make_integer_sequence<int, panel_vectors>());

// The same on any number of rows of one panel, in tiles of nearly equal heights.
template <class T> void product(int64_t rows, int64_t width, int64_t depth, const T* a, const T* b, T* c,
                                const T* init, T alpha, T beta, const Strides& s) {
  const int vectors = static_cast<int>(width / Lanes<T>::size);
  const int64_t most = tile_rows(vectors), count = (rows + most - 1) / most;
  for (int64_t t = 0, row = 0; t < count; ++t) {
    const int64_t height = (rows - row) / (count - t);
    tiles<T>[vectors - 1][height - 1](depth, a + row* s.a_row, b, c + row* s.c_row,
                                      init ? init + row* s.init_row : nullptr, alpha, beta, s);
    row += height;
  }
}

// Lanes j with bit `distance` clear from a, set from b: the others exchanged between the two.
template <int distance, class V, int... j>
MLPEXT_INLINE void exchange(V& a, V& b, std::integer_sequence<int, j...>) {
  const auto low = __builtin_shufflevector(a.v, b.v, ((j & distance) ? V::size + j - distance : j)...);
  const auto high = __builtin_shufflevector(a.v, b.v, ((j & distance) ? V::size + j : j + distance)...);
  a = V(low);
  b = V(high);
}
template <int distance, class V> MLPEXT_INLINE void exchange(V& a, V& b) {
  exchange<distance>(a, b, std::make_integer_sequence<int, V::size>());
}

// Lane j: the sum of the lanes of vector(j), for `count` vectors (a power of two), each asked for once, in
// order.
template <int count, class V, class F> MLPEXT_INLINE V sums(F vector, int64_t first) {
  if constexpr (count == 1) return vector(first);
  else {
    V a = sums<count / 2, V>(vector, first), b = sums<count / 2, V>(vector, first + count / 2);
    exchange<count / 2>(a, b);
    return a + b;
  }
}

template <int distance, class V> MLPEXT_INLINE void transpose_block(V* rows) {
  if constexpr (distance < V::size) {
#pragma GCC unroll 16
    for (int i = 0; i < V::size; ++i)
      if (!(i & distance)) exchange<distance>(rows[i], rows[i + distance]);
    transpose_block<2 * distance>(rows);
  }
}

// to[c][r] = from[r][c]
template <class T>
void transpose(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t columns) {
  using V = Lanes<T>;
  for (int64_t r = 0; r < rows; r += V::size) {
    const int height = static_cast<int>(rows - r < V::size ? rows - r : V::size);
    for (int64_t c = 0; c < columns; c += V::size) {
      const int width = static_cast<int>(columns - c < V::size ? columns - c : V::size);
      V block[V::size];
#pragma GCC unroll 16
      for (int i = 0; i < V::size; ++i) {
        const T* row = from + (r + i) * from_row + c;
        block[i] = i >= height ? V(0) : width == V::size ? load<V>(row) : load_partial<V>(row, width);
      }
      transpose_block<1>(block);
#pragma GCC unroll 16
      for (int i = 0; i < V::size; ++i) {
        T* row = to + (c + i) * to_row + r;
        if (i >= width) continue;
        if (height == V::size) store(row, block[i]);
        else store_partial(row, block[i], height);
      }
    }
  }
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
