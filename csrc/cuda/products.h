// What the products with epilogues share, cuBLASLt's and CUTLASS's.
#pragma once
#include <algorithm>
#include <optional>

#include "kernels.h"

namespace mlpext::cuda {

// Of a linear layer on rows.
struct Sizes {
  int device;
  Dtype dtype;
  int64_t rows, in_features, out_features;
};

constexpr int64_t alignment = 16;  // of every address, in bytes: one access of the widest loads
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % alignment == 0; }

// A matrix as it lies in memory, by rows or by columns.
struct Operand {
  bool transposed;
  int64_t ld;
};
inline std::optional<Operand> operand(Matrix matrix, int64_t rows, int64_t columns) {
  // The stride of a dimension of one means nothing.
  const int64_t across = columns == 1 ? 1 : matrix.column_stride, down = rows == 1 ? 1 : matrix.row_stride;
  if (across == 1 && (rows == 1 || down >= columns)) return Operand{false, std::max(columns, down)};
  if (down == 1 && (columns == 1 || across >= rows)) return Operand{true, std::max(rows, across)};
  return std::nullopt;
}

}  // namespace mlpext::cuda
