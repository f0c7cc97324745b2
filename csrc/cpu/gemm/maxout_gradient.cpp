// Backward of linear + maxout. One piece of each output has a gradient, so dz is one part in `pieces` of its
// size: instead of a product with the zeros, each gradient is multiplied with the one row that it belongs to.
// Such a row serves one sum, so every multiply-add loads from the L1 cache, where `gemm_terms`
// (microkernels.h) meets the rows a slab at a time: 0.65 of the peak, on 1 / pieces of the work.
#include <algorithm>

#include "cpu/gemm/blocking.h"
#include "cpu/gemm/gemm.h"

namespace mlpext::cpu {
namespace {

constexpr int64_t slab_rows = 64;       // 32 KiB, the L1 cache
constexpr int64_t row_bytes = 512;      // of a slab: eight registers of AVX-512
constexpr int64_t input_rows = 256;     // of dx, which meet one packing of a slab
constexpr int64_t weight_rows = 1024;   // of dw: the same
constexpr int64_t few_uses = 48;        // of a slab, below which it is read where it lies
constexpr int64_t least_features = 96;  // times pieces, below which the product with zeros is as fast

template <Dtype dtype> struct MaxoutGradient : Winners {
  using T = std::conditional_t<dtype == float64, double, float>;
  static constexpr int64_t slab_columns = row_bytes / sizeof(T);

  const GemmKernels& kernel;

  explicit MaxoutGradient(const Winners& winners) : Winners(winners), kernel(kernels().gemm) {}

  // dx[i] = the sum over j of dy[i, j] w[winner, j].
  void input(const Matrix& w, T* dx) const {
    in_rectangles(dy.rows, w.columns, dy.rows * dy.columns * w.columns,
                  [&](int64_t i, int64_t end, int64_t first_column, int64_t last_column) {
                    const int64_t most = std::clamp<int64_t>(gradient_bytes / term_bytes(), 1, input_rows);
                    for (; i < end; i += most)
                      input(w, dx, i, std::min(most, end - i), first_column, last_column);
                  });
  }

  // dw[p, j] = the sum of dy[i, j] x[i] over the rows i that piece p has won: they are found as bits, a
  // slab's in a word, beside dy in columns.
  void weight(const Matrix& x, T* dw) const {
    const int64_t slabs = (dy.rows + slab_rows - 1) / slab_rows;
    const int64_t outputs = dy.columns, factors_bytes = outputs * slab_rows * sizeof(T),
                  bytes = factors_bytes + pieces * outputs * sizeof(uint64_t);
    const int64_t most = std::clamp<int64_t>(gradient_bytes / bytes, 1, slabs);
    std::byte* const space = scratch<1>(most * bytes);
    T* const factors = reinterpret_cast<T*>(space);
    auto* const chosen = reinterpret_cast<uint64_t*>(space + most * factors_bytes);
    for (int64_t first = 0; first < slabs; first += most) {
      const int64_t count = std::min(most, slabs - first);
      at::parallel_for(0, count, 1 + 32768 / (slab_rows * outputs), [&](int64_t slab, int64_t end) {
        for (; slab < end; ++slab)
          choose((first + slab) * slab_rows, factors + slab * outputs * slab_rows,
                 chosen + slab * pieces * outputs);
      });
      in_rectangles(outputs, x.columns, count * slab_rows * outputs * x.columns,
                    [&](int64_t j, int64_t end, int64_t first_column, int64_t last_column) {
                      const int64_t step = std::max<int64_t>(1, weight_rows / pieces);
                      for (; j < end; j += step)
                        weight(x, dw, first, count, factors, chosen, j, std::min(step, end - j), first_column,
                               last_column);
                    });
    }
  }

 private:
  static const T* at(const Matrix& m, int64_t i, int64_t j) {
    return static_cast<const T*>(m.data) + i * m.row_stride + j;
  }

  // Of a row of dy and the winners in it.
  int64_t term_bytes() const { return dy.columns * (sizeof(T) + 1); }

  // Some rows and columns of dx.
  void input(const Matrix& w, T* dx, int64_t i, int64_t rows, int64_t first_column,
             int64_t last_column) const {
    const int64_t outputs = dy.columns, step = std::max<int64_t>(1, slab_rows / pieces);
    T* const slab = reinterpret_cast<T*>(scratch<0>(pieces * step * row_bytes));
    // dy and winners, a slab's next to each other: in rows that are pages apart they would share a few lines
    // of the cache.
    T* const factors = reinterpret_cast<T*>(scratch<1>(rows * term_bytes()));
    auto* const winners = reinterpret_cast<uint8_t*>(factors + rows * outputs);
    for (int64_t j = 0; j < outputs; j += step) {
      const int64_t terms = std::min(step, outputs - j);
      kernel.widen[dtype](at(dy, i, j), dy.row_stride, factors + j * rows, terms, rows, terms);
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(index + (i + r) * outputs + j, terms, winners + j * rows + r * terms);
    }
    for (int64_t c = first_column; c < last_column; c += slab_columns) {
      const int64_t width = std::min(slab_columns, last_column - c);
      for (int64_t j = 0; j < outputs; j += step) {
        const int64_t terms = std::min(step, outputs - j);
        const T* b = at(w, j, c);
        int64_t term = w.row_stride, piece = outputs * w.row_stride;
        if (rows >= few_uses) {
          for (int64_t p = 0; p < pieces; ++p)
            kernel.widen[dtype](b + p * piece, term, slab + p * terms * slab_columns, slab_columns, terms,
                                width);
          b = slab, term = slab_columns, piece = terms * slab_columns;
        }
        kernel.by_index[dtype](factors + j * rows, terms, winners + j * rows, terms, b, term, piece,
                               dx + i * w.columns + c, w.columns, rows, width, terms, /*add=*/j > 0);
      }
    }
  }

  // The rows of a slab: dy transposed, and for each piece and output those that it has won.
  void choose(int64_t row, T* factors, uint64_t* chosen) const {
    const int64_t outputs = dy.columns, rows = std::min(slab_rows, dy.rows - row);
    kernel.transpose[dtype](at(dy, row, 0), dy.row_stride, factors, slab_rows, rows, outputs);
    std::fill_n(chosen, pieces * outputs, 0);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* winner = index + (row + r) * outputs;
      for (int64_t j = 0; j < outputs; ++j) chosen[winner[j] * outputs + j] |= uint64_t(1) << r;
    }
  }

  // What some slabs add to some outputs and columns of dw.
  void weight(const Matrix& x, T* dw, int64_t first, int64_t count, const T* factors, const uint64_t* chosen,
              int64_t j, int64_t some, int64_t first_column, int64_t last_column) const {
    const int64_t outputs = dy.columns;
    T* const packed = reinterpret_cast<T*>(scratch<0>(slab_rows * row_bytes));
    for (int64_t c = first_column; c < last_column; c += slab_columns) {
      const int64_t width = std::min(slab_columns, last_column - c);
      for (int64_t slab = 0; slab < count; ++slab) {
        const int64_t row = (first + slab) * slab_rows;
        const T* b = at(x, row, c);
        int64_t stride = x.row_stride;
        if (some >= few_uses) {
          kernel.widen[dtype](b, stride, packed, slab_columns, std::min(slab_rows, dy.rows - row), width);
          b = packed, stride = slab_columns;
        }
        for (int64_t p = 0; p < pieces; ++p)
          kernel.by_bitmask[dtype](factors + (slab * outputs + j) * slab_rows, slab_rows,
                                   chosen + (slab * pieces + p) * outputs + j, b, stride,
                                   dw + (p * outputs + j) * x.columns + c, x.columns, some, width,
                                   /*add=*/row > 0);
      }
    }
  }
};

template <Dtype dtype>
void run(const Winners& winners, const Matrix& x, const Matrix& w, void* dx, void* dw) {
  const MaxoutGradient<dtype> gradient{winners};
  using T = typename MaxoutGradient<dtype>::T;
  if (dx) gradient.input(w, static_cast<T*>(dx));
  if (dw) gradient.weight(x, static_cast<T*>(dw));
}

bool pays(Dtype dtype, const Winners& winners, const Matrix& x, const Matrix& w, bool with_dx, bool with_dw) {
  const Matrix& dy = winners.dy;
  const int64_t features = with_dx ? w.columns : x.columns;
  const auto all_known = [&] {  // an index beyond the pieces means no gradient, and has no row to go with
    uint8_t most = 0;
    for (int64_t i = 0; i < dy.rows * dy.columns; ++i) most = std::max(most, winners.index[i]);
    return most < winners.pieces;
  };
  return (with_dx || with_dw) && dy.rows > 0 && dy.columns > 0 && (dtype == float64 || dtype == float32) &&
         winners.pieces > 1 && winners.pieces * features >= least_features && dy.column_stride == 1 &&
         (!with_dx || w.column_stride == 1) && (!with_dw || x.column_stride == 1) && all_known();
}

}  // namespace

bool maxout_gradient(Dtype dtype, const Winners& winners, const Matrix& x, const Matrix& w, void* dx,
                     void* dw) {
  if (!pays(dtype, winners, x, w, dx, dw)) return false;
  (dtype == float64 ? run<float64> : run<float32>)(winners, x, w, dx, dw);
  return true;
}

}  // namespace mlpext::cpu
