// The innermost loops of a gemm, compiled once an instruction set: blocks of sums in registers, products of
// few rows, the transposes that packing needs, and what is done to the rows of a finished tile.
//
// All take untyped pointers and strides in elements, so that one table (GemmKernels, kernels.h) holds them
// for every dtype. 16-bit types are float in registers, and so are their sums.
#pragma once
#include "cpu/map.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// Two registers a, b interleaved in blocks of `block` lanes: with high = 0 the even blocks of both, a0 b0 a2
// b2 ..., with high = 1 the odd ones, a1 b1 a3 b3 .... For each lane of the result, which lane of (a, b) it
// is. Over block = 1, 2, 4, ... this transposes a square of registers, in N log2(N) shuffles.
template <int N, int block, int high> constexpr int interleaved(int i) {
  const int from_second = (i / block) & 1, source = (i / block & ~1) + high;
  return source * block + i % block + from_second * N;
}
template <int block, int high, class V> MLPEXT_INLINE V interleave(V a, V b) {
  return [&]<int... i>(std::integer_sequence<int, i...>) MLPEXT_LAMBDA {
    return V(shuffle<interleaved<V::size, block, high>(i)...>(a.v, b.v));
  }(std::make_integer_sequence<int, V::size>());
}

// rows[i] lane j <-> rows[j] lane i, for as many registers as one has lanes.
template <int block = 1, class V> MLPEXT_INLINE void transpose_square(V* rows) {
#pragma GCC unroll 16
  for (int r = 0; r < V::size; ++r) {
    if (r & block) continue;
    const V a = rows[r], b = rows[r + block];
    rows[r] = interleave<block, 0>(a, b);
    rows[r + block] = interleave<block, 1>(a, b);
  }
  if constexpr (2 * block < V::size) transpose_square<2 * block>(rows);
}

// Lane i: the sum over the lanes of rows[i]. Each step adds pairs of registers and halves their number, so
// that all the sums across take as many additions as registers, not log2(N) times as many.
template <int block = 1, class V> MLPEXT_INLINE V sum_each(V* rows) {
#pragma GCC unroll 16
  for (int r = 0; r < V::size; r += 2 * block)
    rows[r] = interleave<block, 0>(rows[r], rows[r + block]) + interleave<block, 1>(rows[r], rows[r + block]);
  if constexpr (2 * block < V::size) return sum_each<2 * block>(rows);
  else return rows[0];
}

// Every other lane of a and b, from the first (odd = 0) or the second: a0 a2 ... b0 b2 ..., which takes rows
// of two values apart.
template <int odd, class V> MLPEXT_INLINE V alternate(V a, V b) {
  return [&]<int... i>(std::integer_sequence<int, i...>) MLPEXT_LAMBDA {
    return V(shuffle<(2 * i + odd)...>(a.v, b.v));
  }(std::make_integer_sequence<int, V::size>());
}

// The transpose of dense rows of n values, n a power of two: n log2(n) shuffles for V::size rows.
template <class M, int n>
MLPEXT_INLINE void transpose_narrow(const M* from, M* to, int64_t to_stride, int64_t rows) {
  using V = LanesOf<M>;
  for (int64_t i = 0; i < rows; i += V::size) {
    V in[n], out[n];
#pragma GCC unroll 8
    for (int r = 0; r < n; ++r) out[r] = load<V>(from + i * n + r * V::size);
#pragma GCC unroll 4
    for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 8
      for (int r = 0; r < n; ++r) in[r] = out[r];
#pragma GCC unroll 4
      for (int r = 0; r < n / 2; ++r) {
        out[r] = alternate<0>(in[2 * r], in[2 * r + 1]);
        out[n / 2 + r] = alternate<1>(in[2 * r], in[2 * r + 1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; ++r) store(to + r * to_stride + i, out[r]);
  }
}

// to[j to_stride + i] = from[i from_stride + j] for i < rows, j < columns: square by square in registers,
// with zeros where the matrix ends.
template <class M> void transpose(const void* from_, int64_t from_stride, void* to_, int64_t to_stride,
                                  int64_t rows, int64_t columns) {
  using V = LanesOf<M>;
  const M* from = static_cast<const M*>(from_);
  M* to = static_cast<M*>(to_);
  if (from_stride == columns && rows >= V::size && (columns == 2 || columns == 4 || columns == 8)) {
    const int64_t whole = rows / V::size * V::size;
    if (columns == 2) transpose_narrow<M, 2>(from, to, to_stride, whole);
    else if (columns == 4) transpose_narrow<M, 4>(from, to, to_stride, whole);
    else transpose_narrow<M, 8>(from, to, to_stride, whole);
    from += whole * columns, to += whole, rows -= whole;
  }
  if (columns <= V::size / 4) {  // a square would be mostly padding
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) to[j * to_stride + i] = from[i * from_stride + j];
    return;
  }
  V square[V::size];
  for (int64_t i = 0; i < rows; i += V::size) {
    const int high = static_cast<int>(rows - i < V::size ? rows - i : V::size);
    for (int64_t j = 0; j < columns; j += V::size) {
      const int wide = static_cast<int>(columns - j < V::size ? columns - j : V::size);
      const M* source = from + i * from_stride + j;
      M* target = to + j * to_stride + i;
#pragma GCC unroll 16
      for (int r = 0; r < V::size; ++r) {
        if (r >= high) square[r] = V(0);
        else if (wide == V::size) square[r] = load<V>(source + r * from_stride);
        else square[r] = load_partial<V>(source + r * from_stride, wide);
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int r = 0; r < V::size; ++r) {
        if (r >= wide) break;
        if (high == V::size) store(target + r * to_stride, square[r]);
        else store_partial(target + r * to_stride, square[r], high);
      }
    }
  }
}

// Calls f(start, std::integral_constant of a count) over n in steps of the counts, the largest that still
// fits first.
template <int first, int... rest, class F> MLPEXT_INLINE void in_steps(int64_t start, int64_t n, F f) {
  for (; start + first <= n; start += first) f(start, std::integral_constant<int, first>());
  if constexpr (sizeof...(rest) > 0) in_steps<rest...>(start, n, f);
}

// How a term enters a sum: as it is, or (pairs) as two bfloat16 in 32 bits that are multiplied and added in
// one instruction of AVX512_BF16, which the assembler knows whatever the target of this file.
template <bool pairs, class V> MLPEXT_INLINE V factor_of(const typename V::Scalar* a) {
  if constexpr (pairs) return from_bits<V>(typename V::Bits{} + read<uint32_t>(a));
  else return V(static_cast<double>(*a));
}
template <bool pairs, class V> MLPEXT_INLINE V add_product(V factor, V term, V sum) {
#if MLPEXT_VECTOR_BYTES == 64
  if constexpr (pairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(factor.v), "v"(term.v));
    return sum;
  }
#endif
  return madd(factor, term, sum);
}

// y[i, j] = bias[j] + the dot product of row i of x and row j of w: a register of sums at a time, for `rows`
// rows of x and as many columns as fill it (16 sums of float on AVX-512: 4 rows and 4 columns, say). Each sum
// is a register of partial sums along k until the end, where sum_each adds all of them across at once.
template <class M, bool pairs, int rows>
MLPEXT_INLINE void few_rows_block(const M* x, int64_t x_stride, const M* w, int64_t w_stride, const M* bias,
                                  M* y, int64_t y_stride, int64_t columns, int64_t depth) {
  using V = LanesOf<M>;
  constexpr int wide = V::size / rows;
  for (int64_t j = 0; j < columns; j += wide) {
    const int count = static_cast<int>(columns - j < wide ? columns - j : wide);
    V sums[V::size];
    const M* row[wide];  // past the last column: that one again
#pragma GCC unroll 16
    for (int c = 0; c < wide; ++c) row[c] = w + (j + (c < count ? c : count - 1)) * w_stride;
#pragma GCC unroll 16
    for (int s = 0; s < V::size; ++s) sums[s] = V(0);
    auto add = [&](auto load_some) MLPEXT_LAMBDA {
      if constexpr (wide > 1) {
        V in[rows];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) in[r] = load_some(x + r * x_stride);
#pragma GCC unroll 16
        for (int c = 0; c < wide; ++c) {
          const V weight = load_some(row[c]);
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r)
            sums[r * wide + c] = add_product<pairs>(in[r], weight, sums[r * wide + c]);
        }
      } else {  // rows come from memory: with all of them in registers the sums would not fit
        const V weight = load_some(row[0]);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
          sums[r] = add_product<pairs>(load_some(x + r * x_stride), weight, sums[r]);
      }
    };
    constexpr int terms = pairs ? 2 * V::size : V::size;  // in a register
    int64_t k = 0;
    for (; k + terms <= depth; k += terms)
      add([&](const M* p) MLPEXT_LAMBDA {
        if constexpr (pairs) return V(read<typename V::Register>(p + k));
        else return load<V>(p + k);
      });
    const int left = static_cast<int>(depth - k);
    if (left > 0)
      add([&](const M* p) MLPEXT_LAMBDA {
        if constexpr (pairs) return V(read<typename V::Register>(p + k, left));
        else return load_partial<V>(p + k, left);
      });

    typename V::Scalar sum[V::size];
    store(sum, sum_each(sums));
    auto finish = [&](int r, auto load_some, auto store_some) MLPEXT_LAMBDA {
      V z = load_some(sum + r * wide);
      if (bias) z = z + load_some(bias + j);
      store_some(y + r * y_stride + j, z);
    };
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      if (wide == V::size && count == V::size)
        finish(
            r, [](auto* p) MLPEXT_LAMBDA { return load<V>(p); },
            [](M* p, V z) MLPEXT_LAMBDA { store(p, z); });
      else
        finish(
            r, [&](auto* p) MLPEXT_LAMBDA { return load_partial<V>(p, count); },
            [&](M* p, V z) MLPEXT_LAMBDA { store_partial(p, z, count); });
    }
  }
}

template <class M, bool pairs = false>
void gemm_few_rows(const void* x, int64_t x_stride, const void* w, int64_t w_stride, const void* bias,
                   void* y, int64_t y_stride, int64_t rows, int64_t columns, int64_t depth) {
  using V = LanesOf<M>;
  auto run = [&]<int count>(int64_t i, std::integral_constant<int, count>) MLPEXT_LAMBDA {
    few_rows_block<M, pairs, count>(static_cast<const M*>(x) + i * x_stride, x_stride,
                                    static_cast<const M*>(w), w_stride, static_cast<const M*>(bias),
                                    static_cast<M*>(y) + i * y_stride, y_stride, columns, depth);
  };
  // As many rows as make use of every sum: with 4 rows at a time one column would leave 3 of 4 unused, two
  // columns half of them.
  if (columns == 1) in_steps<V::size, 1>(0, rows, run);
  else if constexpr (V::size < 4) in_steps<2, 1>(0, rows, run);
  else if (columns == 2) in_steps<(V::size > 8 ? V::size / 2 : 4), 4, 2, 1>(0, rows, run);
  else in_steps<4, 2, 1>(0, rows, run);
}

// c[i, :] = start[i, :] + sum over t of a[i, t] b[t, :], with all sums of the block (rows x registers) in
// registers: of each term it loads `registers` of b, and broadcasts each a[i, t] once. `start` may be null,
// for 0, or c.
template <bool pairs, int rows, int registers, class T, class Load, class Store>
MLPEXT_INLINE void gemm_tile(const T* a, int64_t a_row, int64_t a_term, const T* b, int64_t b_stride,
                             const T* start, int64_t start_stride, T* c, int64_t c_stride, int64_t terms,
                             Load load_some, Store store_some) {
  using V = Lanes<T>;
  V sums[rows][registers];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < registers; ++v) sums[r][v] = V(0);
  for (int64_t t = 0; t < terms; ++t, a += a_term, b += b_stride) {
    V in[registers];
#pragma GCC unroll 4
    for (int v = 0; v < registers; ++v) in[v] = load_some(b + v * V::size);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const V factor = factor_of<pairs, V>(a + r * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < registers; ++v) sums[r][v] = add_product<pairs>(factor, in[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < registers; ++v) {
      if (start) sums[r][v] = sums[r][v] + load_some(start + r * start_stride + v * V::size);
      store_some(c + r * c_stride + v * V::size, sums[r][v]);
    }
}

// c = start + a b for a block: columns in steps of four registers (two on AVX2), within each the rows in
// strips of 6. 6 x 4 sums, 4 registers of b and a factor fill the 32 registers of AVX-512 and NEON, 6 x 2 the
// 16 of the others; so many independent sums hide the four cycles that a multiply-add takes. What is left of
// rows and columns takes smaller tiles and partial loads; b is never read beyond its columns.
template <class T, bool pairs = false>
void gemm_block(const void* a_, int64_t a_row, int64_t a_term, int64_t a_strip, const void* b_,
                int64_t b_stride, int64_t b_strip, const void* start_, int64_t start_stride, void* c_,
                int64_t c_stride, int64_t rows, int64_t columns, int64_t terms) {
  using V = Lanes<T>;
  const T* a = static_cast<const T*>(a_);
  const T* b = static_cast<const T*>(b_);
  const T* start = static_cast<const T*>(start_);
  T* c = static_cast<T*>(c_);
  auto block = [&](int64_t j, auto registers, auto load_some, auto store_some) MLPEXT_LAMBDA {
    const T* const columns_of_b = b + j / cpu::strip_columns * b_strip + j % cpu::strip_columns;
    in_steps<6, 5, 4, 3, 2, 1>(
        0, rows, [&]<int count>(int64_t i, std::integral_constant<int, count>) MLPEXT_LAMBDA {
          gemm_tile<pairs, count, registers>(a + i / cpu::strip_rows * a_strip + i % cpu::strip_rows * a_row,
                                             a_row, a_term, columns_of_b, b_stride,
                                             start ? start + i * start_stride + j : nullptr, start_stride,
                                             c + i * c_stride + j, c_stride, terms, load_some, store_some);
        });
  };
  auto whole = [&]<int registers>(int64_t j, std::integral_constant<int, registers>) MLPEXT_LAMBDA {
    block(
        j * V::size, std::integral_constant<int, registers>(),
        [](const T* p) MLPEXT_LAMBDA { return load<V>(p); }, [](T* p, V x) MLPEXT_LAMBDA { store(p, x); });
  };
  if constexpr (vector_registers == 32) in_steps<4, 2, 1>(0, columns / V::size, whole);
  else in_steps<2, 1>(0, columns / V::size, whole);
  const int left = static_cast<int>(columns % V::size);
  if (left > 0)
    block(
        columns - left, std::integral_constant<int, 1>(),
        [&](const T* p) MLPEXT_LAMBDA { return load_partial<V>(p, left); },
        [&](T* p, V x) MLPEXT_LAMBDA { store_partial(p, x, left); });
}

// For each row i: c[i, column:] (+)= sum over t of factor_t * row_t[column:], for so many registers of
// columns. `terms(i, column, add)` enumerates the pairs by calling add(&factor_t, row_t + column).
template <class T, int registers, class Terms, class Load, class Store>
MLPEXT_INLINE void gemm_terms_block(T* c, int64_t c_stride, int64_t rows, int64_t column, bool add,
                                    Terms terms, Load load_some, Store store_some) {
  using V = Lanes<T>;
  for (int64_t i = 0; i < rows; ++i) {
    V sums[registers];
#pragma GCC unroll 8
    for (int v = 0; v < registers; ++v) sums[v] = V(0);
    terms(i, column, [&](const T* factor, const T* row) MLPEXT_LAMBDA {
      const V f = factor_of<false, V>(factor);
#pragma GCC unroll 8
      for (int v = 0; v < registers; ++v) sums[v] = madd(f, load_some(row + v * V::size), sums[v]);
    });
    T* const to = c + i * c_stride + column;
#pragma GCC unroll 8
    for (int v = 0; v < registers; ++v) {
      if (add) sums[v] = load_some(to + v * V::size) + sums[v];
      store_some(to + v * V::size, sums[v]);
    }
  }
}

// The same for all columns of c, eight registers at a time: no row of b serves two rows of c, so each
// multiply-add loads its own, and eight chains of sums hide their latency.
template <class T, class Terms>
MLPEXT_INLINE void gemm_terms(T* c, int64_t c_stride, int64_t rows, int64_t columns, bool add, Terms terms) {
  using V = Lanes<T>;
  auto whole = [&]<int registers>(int64_t j, std::integral_constant<int, registers>) MLPEXT_LAMBDA {
    gemm_terms_block<T, registers>(
        c, c_stride, rows, j * V::size, add, terms, [](const T* p) MLPEXT_LAMBDA { return load<V>(p); },
        [](T* p, V x) MLPEXT_LAMBDA { store(p, x); });
  };
  in_steps<8, 4, 2, 1>(0, columns / V::size, whole);
  const int left = static_cast<int>(columns % V::size);
  if (left > 0)
    gemm_terms_block<T, 1>(
        c, c_stride, rows, columns - left, add, terms,
        [&](const T* p) MLPEXT_LAMBDA { return load_partial<V>(p, left); },
        [&](T* p, V x) MLPEXT_LAMBDA { store_partial(p, x, left); });
}

template <class T> void gemm_by_index(const void* factors_, int64_t factor_stride, const uint8_t* index,
                                      int64_t index_stride, const void* b_, int64_t b_term, int64_t b_piece,
                                      void* c, int64_t c_stride, int64_t rows, int64_t columns, int64_t terms,
                                      bool add) {
  const T* factors = static_cast<const T*>(factors_);
  const T* b = static_cast<const T*>(b_);
  gemm_terms<T>(static_cast<T*>(c), c_stride, rows, columns, add,
                [&](int64_t i, int64_t column, auto add_term) MLPEXT_LAMBDA {
                  const T* const factor = factors + i * factor_stride;
                  const uint8_t* winner = index + i * index_stride;
                  const T* row = b + column;
                  for (int64_t t = 0; t < terms; ++t, row += b_term)
                    add_term(factor + t, row + winner[t] * b_piece);
                });
}

template <class T> void gemm_by_bitmask(const void* factors_, int64_t factor_stride, const uint64_t* chosen,
                                        const void* b_, int64_t b_stride, void* c, int64_t c_stride,
                                        int64_t rows, int64_t columns, bool add) {
  const T* factors = static_cast<const T*>(factors_);
  const T* b = static_cast<const T*>(b_);
  gemm_terms<T>(static_cast<T*>(c), c_stride, rows, columns, add,
                [&](int64_t i, int64_t column, auto add_term) MLPEXT_LAMBDA {
                  for (uint64_t left = chosen[i]; left != 0; left &= left - 1) {
                    const int t = __builtin_ctzll(left);
                    add_term(factors + i * factor_stride + t, b + column + t * b_stride);
                  }
                });
}

// sums[j] += the sum over rows of x[i, j], a register of columns at a time: db of a few rows of dz.
template <class M>
void add_rows(const void* x_, int64_t x_stride, void* sums_, int64_t rows, int64_t columns) {
  using V = LanesOf<M>;
  const M* x = static_cast<const M*>(x_);
  auto* sums = static_cast<typename V::Scalar*>(sums_);
  auto column = [&](int64_t j, auto load_some, auto store_some) MLPEXT_LAMBDA {
    V sum(0);
    for (int64_t i = 0; i < rows; ++i) sum = sum + load_some(x + i * x_stride + j);
    store_some(sums + j, load_some(sums + j) + sum);
  };
  int64_t j = 0;
  for (; j + V::size <= columns; j += V::size)
    column(
        j, [](auto* p) MLPEXT_LAMBDA { return load<V>(p); }, [](auto* p, V x) MLPEXT_LAMBDA { store(p, x); });
  const int left = static_cast<int>(columns - j);
  if (left > 0)
    column(
        j, [&](auto* p) MLPEXT_LAMBDA { return load_partial<V>(p, left); },
        [&](auto* p, V x) MLPEXT_LAMBDA { store_partial(p, x, left); });
}

// Rows of M to and from the float (or double) that sums are kept in.
template <class M>
void widen_rows(const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t rows, int64_t columns) {
  using Scalar = typename LanesOf<M>::Scalar;
  for (int64_t i = 0; i < rows; ++i)
    map(
        columns, static_cast<Scalar*>(y) + i * y_stride, [](auto v) MLPEXT_LAMBDA { return v; },
        static_cast<const M*>(x) + i * x_stride);
}
template <class M>
void narrow_rows(const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t rows, int64_t columns) {
  using Scalar = typename LanesOf<M>::Scalar;
  for (int64_t i = 0; i < rows; ++i)
    map(
        columns, static_cast<M*>(y) + i * y_stride, [](auto v) MLPEXT_LAMBDA { return v; },
        static_cast<const Scalar*>(x) + i * x_stride);
}

// Rows of 32 bits, of two rows of 16: to[j] = (a[j], b[j]), two terms for AVX512_BF16's dot product. b may be
// null, for 0.
inline void zip(const void* a_, const void* b_, void* to_, int64_t n) {
  constexpr int size = Lanes<float>::size;
  using Wide = Packed<uint32_t, size>;
  using Narrow = Packed<uint16_t, size>;
  const auto* a = static_cast<const uint16_t*>(a_);
  const auto* b = static_cast<const uint16_t*>(b_);
  auto* to = static_cast<uint32_t*>(to_);
  auto both = [&](Narrow low, Narrow high) MLPEXT_LAMBDA {
    return __builtin_convertvector(low, Wide) | __builtin_convertvector(high, Wide) << 16;
  };
  int64_t j = 0;
  for (; j + size <= n; j += size)
    write(to + j, both(read<Narrow>(a + j), b ? read<Narrow>(b + j) : Narrow{}));
  const int left = static_cast<int>(n - j);
  if (left > 0)
    write(to + j, both(read<Narrow>(a + j, left), b ? read<Narrow>(b + j, left) : Narrow{}), left);
}

template <class... M> constexpr cpu::GemmKernels gemm_kernels() {
  return {{transpose<M>...},
          {gemm_few_rows<M>...},
          {gemm_block<double>, gemm_block<float>, nullptr, nullptr},
          MLPEXT_VECTOR_BYTES == 64 ? cpu::panel_columns : cpu::strip_columns,
          {gemm_by_index<double>, gemm_by_index<float>, nullptr, nullptr},
          {gemm_by_bitmask<double>, gemm_by_bitmask<float>, nullptr, nullptr},
#if MLPEXT_VECTOR_BYTES == 64 && !defined(MLPEXT_EMULATED_AVX512)
          gemm_few_rows<BFloat16, true>,
          gemm_block<float, true>,
#else
          nullptr,
          nullptr,
#endif
          zip,
          {add_rows<M>...},
          {widen_rows<M>...},
          {narrow_rows<M>...}};
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
