// The kernels as a table of launchers, one table a dtype. No torch header is included here or in the kernels.
// Pointers are device pointers; a launcher returns what cudaGetLastError says after its launches, all of them
// on the given stream.
#pragma once
#include <cuda_runtime_api.h>

#include "formulas/activations.h"
#include "formulas/dtype.h"

namespace mlpext::cuda {

constexpr int threads = 256;  // of a block
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where element i of an operand lies, if not at i: sizes from the fastest dimension on, strides in elements,
// those of the output first.
struct Layout {
  static constexpr int max_dims = 12;
  int dims = 0;  // 0: every operand is one run of memory
  int64_t sizes[max_dims];
  int64_t strides[3][max_dims];
};

// output[i] = f(x[i] + bias[i % columns]), or g[i] f'(x[i]) with inputs {g, x}. output may be an input.
struct Elementwise {
  int64_t n;
  void* output;
  const void* inputs[2];
  const void* bias;  // may be null
  int64_t columns;
  Layout layout;
};
using LaunchElementwise = cudaError_t (*)(const double* params, const Elementwise& job, cudaStream_t stream);

// A matrix by its strides in elements.
struct StridedMatrix {
  const void* data;
  int64_t row_stride, column_stride;
};

// The gradient of what entered an activation or a maxout, and its sums down the columns, in one pass over a
// (rows, columns) matrix:
//   dz[i, p columns + j] = g[i, j] f'(saved[i, j])                     of an activation; pieces is 1
//   dz[i, p columns + j] = g[i, j] where saved[i, j] is p, else 0      of maxout: saved is the index
// db is summed in float (float64: in double), in an order that depends on the shape alone.
struct RowsJob {
  int64_t rows, columns, pieces;
  StridedMatrix g, saved;
  void* dz;       // (rows, pieces columns), contiguous
  void* db;       // (pieces columns)
  void* partial;  // (RowTiles::chunks, pieces columns) sums; unused for one chunk
};
using LaunchRows = cudaError_t (*)(const double* params, const RowsJob& job, cudaStream_t stream);

// How a block of threads covers a matrix for RowsJob: `across` threads, 16 bytes each, by `deep` rows at a
// time; one block for each of `tiles` of columns and `chunks` of rows. 512 blocks fill an H100; that a chunk
// has four rows a thread or more keeps the sums of db small beside the matrix.
struct RowTiles {
  int across = 1, deep;
  int64_t tiles, chunk_rows, chunks;

  RowTiles(int value_size, int64_t rows, int64_t columns) {
    const int values = 16 / value_size;
    while (across < 32 && across * values < columns) across *= 2;
    deep = threads / across;
    tiles = ceil_div(columns, across * values);
    chunk_rows = ceil_div(rows, tiles < 512 ? 512 / tiles : 1);
    if (chunk_rows < 4 * deep) chunk_rows = 4 * deep;
    chunks = ceil_div(rows, chunk_rows);
  }
};

// Bytes of a sum: float, of float64 double.
constexpr int sum_size(int value_size) { return value_size == 8 ? 8 : 4; }

// db[j] = the sum over the rows of `partial` of column j, those sums being sum_size wide.
struct Sums {
  int64_t rows, columns, row_stride;
  const void* partial;
  void* db;
};

struct ActivationKernels {
  LaunchElementwise forward, backward,
      backward_from_output;  // the last is null where y does not determine f'
  LaunchRows backward_rows, backward_rows_from_output;
};

// Maxout of (outer, pieces, inner) into (outer, inner): y is the largest, index the first piece that reaches
// it (uint8_t up to 256 pieces, else int32_t; may be null). A NaN wins.
struct Maxout {
  int64_t outer, pieces, inner;
  const void* x;
  void* y;
  void* index;
};
// dx[o, k, i] = g[o, i] where index[o, i] = k, else 0.
struct MaxoutBackward {
  int64_t outer, pieces, inner;
  const void* g;
  const void* index;
  void* dx;
};

struct Kernels {
  std::array<ActivationKernels, activation_count> activations;
  // By width of the index: [0] one byte, [1] int32.
  std::array<cudaError_t (*)(const Maxout& job, cudaStream_t stream), 2> maxout_forward;
  std::array<cudaError_t (*)(const MaxoutBackward& job, cudaStream_t stream), 2> maxout_backward;
  std::array<LaunchRows, 2> maxout_rows;
  cudaError_t (*add_sums)(const Sums& job, cudaStream_t stream);
};

extern const Kernels float64_kernels, float32_kernels, bfloat16_kernels, float16_kernels;
inline const Kernels& kernels(Dtype dtype) {
  const Kernels* const tables[] = {&float64_kernels, &float32_kernels, &bfloat16_kernels, &float16_kernels};
  return *tables[dtype];
}

}  // namespace mlpext::cuda
