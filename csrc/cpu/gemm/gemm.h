// The blocked product behind layers, on pointers: x W' + b forward, and the three gradients backward. What
// follows the product (activation, maxout) is given as a function that meets each tile while it is in the
// cache.
#pragma once
#include <c10/util/FunctionRef.h>

#include "cpu/kernels.h"

namespace mlpext::cpu {

// A matrix in memory, of a Dtype that goes with it; strides count elements and may be 0.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

// Whether bfloat16 is multiplied as it is, by AVX512_BF16; else it is widened to float.
bool has_pairs();

// Rows of any strides to dense rows `stride` apart.
void copy_rows(Dtype dtype, const Matrix& from, void* to, int64_t stride);

// A block of a result, on which something is to be done now.
struct OutputTile {
  int64_t row, column, rows, columns;
};
using OnTile = c10::function_ref<void(const OutputTile&)>;

// z = x w' + bias, where z (x.rows, w.rows) is dense and bias may be null. `finish` is called once on each
// tile.
void gemm_forward(Dtype dtype, const Matrix& x, const Matrix& w, const void* bias, void* z, OnTile finish);

// Some columns of a row of each piece's z, piece after piece, which the next row overwrites.
struct PiecesOfRow {
  int64_t row, column, columns;
  void* z;
};
using OnRow = c10::function_ref<void(const PiecesOfRow&)>;

// z = x w' + bias for the rows of several pieces, one piece after the other in w and bias. z itself never
// exists beyond a tile: `finish` makes of it what follows. At most max_fused_pieces.
inline constexpr int64_t max_fused_pieces = 64;
void gemm_pieces(Dtype dtype, const Matrix& x, const Matrix& w, const void* bias, int64_t pieces,
                 OnRow finish);

// Whether a product of x and w' is made by gemm_forward with dot products, in which nothing is packed.
bool by_few_rows(const Matrix& x, const Matrix& w);

// Where dz is that of maxout: dy, and which piece has won each output, dense. The other pieces' dz is 0.
struct Winners {
  Matrix dy;
  const uint8_t* index;
  int64_t pieces;
};

// dz, formed rows at a time: form(i, n, to, stride) writes rows i to i + n. Or read where it lies in memory,
// but in 16 bits, which are formed all the same.
struct PreactivationGradient {
  int64_t rows, columns;
  const Matrix* matrix;  // null: it does not lie anywhere
  c10::function_ref<void(int64_t row, int64_t rows, void* to, int64_t stride)> form;
  const Winners* winners = nullptr;
};

// dx = dz w, dw = dz' x, db = the sum of dz over its rows, each dense and each only where its pointer is not
// null; x and w are not read otherwise.
void gemm_backward(Dtype dtype, const PreactivationGradient& dz, const Matrix& x, const Matrix& w, void* dx,
                   void* dw, void* db);

// dx and dw of a maxout (maxout_gradient.cpp): one product's work each, however many pieces there are. False,
// and nothing done, where that is not served or does not pay.
bool maxout_gradient(Dtype dtype, const Winners& winners, const Matrix& x, const Matrix& w, void* dx,
                     void* dw);

}  // namespace mlpext::cpu
