// Which calls torch's own operators serve, because they are the faster ones on this CPU. mlpext/_choices.py
// sets that when the package is imported, from what was measured on CPUs of this kind. A choice depends on
// the operator, its dtype and its shape alone, so that results repeat bit by bit.
#pragma once
#include <cstdint>
#include <span>

#include "formulas/dtype.h"

namespace mlpext::cpu {

enum class Pass { forward, backward };
enum class Product { forward, dx, dw };

// Sizes count by the nearest power of 4: cell c is 4^c, the last one also all that is larger.
inline constexpr int64_t value_cells = 16, side_cells = 8;

// One pass of the activation of that index over n values.
bool torch_serves(Pass pass, std::size_t activation, Dtype dtype, int64_t n);
// One product of a linear layer: x W' + b, dz W or dz' x.
bool torch_serves(Product product, Dtype dtype, int64_t rows, int64_t in_features, int64_t out_features);

// Leaves these cells to torch, and no others; of a product (rows side_cells + in) side_cells + out, in cells.
void leave_to_torch(Pass pass, std::size_t activation, Dtype dtype, std::span<const int64_t> cells);
void leave_to_torch(Product product, Dtype dtype, std::span<const int64_t> cells);

}  // namespace mlpext::cpu
