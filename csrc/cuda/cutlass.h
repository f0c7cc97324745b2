// Products of a linear layer with an activation, or its derivative, in CUTLASS's epilogue: for sm_90, in a
// module of its own, mlpext._cutlass, that hands its launchers over as a table. No torch header: device
// pointers, sizes and a stream.
#pragma once
#include <optional>

#include "kernels.h"

namespace mlpext::cuda::ct {

constexpr int tile = 128;  // rows and columns of a product that a block makes at a time
constexpr int strips = 4;  // of a tile's rows

// d = a b and its epilogue, row-major; ld is from row to row, in elements, and columns lie side by side.
struct Product {
  int64_t rows, depth, columns, lda, ldb;
  const void *a, *b;    // (rows, depth); b as the weight lies: forward (columns, depth), else (depth, columns)
  const void* bias;     // forward: one a column, or null
  void* d;              // (rows, columns), dense
  void* aux;            // as d. forward: takes z, or is null; else what f' comes from
  float* sums;          // of d over the rows of a strip: (strips of all tiles, sums_width); or null
  std::size_t activation;
  double params[2];
};
constexpr int64_t sums_width(int64_t columns) { return ceil_div(columns, tile) * tile; }

// bfloat16, float16.
using Launch = cudaError_t (*)(const Product& product, cudaStream_t stream);
struct Table {
  std::array<Launch, 2> forward, input_gradient;
};

}  // namespace mlpext::cuda::ct
