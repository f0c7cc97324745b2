// Products of a linear layer with an activation, or its derivative, in CUTLASS's epilogue. They are for
// sm_90 and lie in a module of their own, mlpext._cutlass, which hands them over as a table. No torch header:
// device pointers, sizes and a stream. Matrices are row-major by their strides; outputs are contiguous.
#pragma once
#include "products.h"

namespace mlpext::cuda::ct {

constexpr int tile = 128;   // rows and columns of a product that a block makes at a time
constexpr int strips = 4;   // of a tile's rows, one a warp
constexpr int longest = 2;  // list of parameters

struct Activation {
  int index;
  double params[longest];
};

// d = a b and its epilogue, as the kernels have it. ld: from row to row, in elements.
struct Product {
  int64_t rows, depth, columns, lda, ldb;
  Activation f;
  const void *a, *b;  // (rows, depth); a weight: forward (columns, depth), in backward (depth, columns)
  const void* bias;   // forward: (columns), or null
  void *d, *aux;      // (rows, columns); aux takes z, or is null; in backward f' comes from it
  float* sums;        // backward: of d down the rows of each strip, (sum_rows, sum_columns); or null
};
constexpr int64_t sum_rows(int64_t rows) { return ceil_div(rows, tile) * strips; }
constexpr int64_t sum_columns(int64_t columns) { return ceil_div(columns, tile) * tile; }

using Launch = cudaError_t (*)(const Product& product, cudaStream_t stream);
struct Table {
  std::array<Launch, 2> forward, input_gradient;  // bfloat16, float16
};

// A product that has been found to be served, and its kernel.
struct Call {
  Launch launch;
  Product product;
};

// Each is empty where the kernels do not serve: a dtype of more than 16 bits, sizes of layers that are no
// multiples of 8, no rows, strides that are no multiples of 8 or not by rows, an address that is no multiple
// of 16 bytes, another GPU.
//
// y = f(x w' + bias), and z if that is not null.
std::optional<Call> forward(const Table& table, const Sizes& sizes, const Activation& f, Matrix x, Matrix w,
                            const void* bias, void* y, void* z);
// dx = (dz w) f', and its sums if those are not null: f, kept and the sums belong to the layer below, and
// kept is what layers in 16 bits keep: y where f' comes from it and y is not too coarse, else z. w is
// (out_features, in_features), dx (rows, in_features).
std::optional<Call> input_gradient(const Table& table, const Sizes& sizes, const Activation& f, Matrix dz,
                                   Matrix w, const void* kept, void* dx, float* sums);

}  // namespace mlpext::cuda::ct
