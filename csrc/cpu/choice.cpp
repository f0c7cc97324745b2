#include "cpu/choice.h"

#include <algorithm>
#include <bit>
#include <bitset>

#include "formulas/activations.h"

namespace mlpext::cpu {
namespace {

std::array<std::array<PerDtype<std::bitset<value_cells>>, activation_count>, 2> passes;
std::array<PerDtype<std::bitset<side_cells * side_cells * side_cells>>, 3> products;

int64_t cell(int64_t n, int64_t cells) {
  return std::min<int64_t>(std::bit_width(static_cast<uint64_t>(n)) / 2, cells - 1);
}

template <class Cells> void set(Cells& all, std::span<const int64_t> cells) {
  all.reset();
  for (const int64_t each : cells) all.set(each);
}

}  // namespace

bool torch_serves(Pass pass, std::size_t activation, Dtype dtype, int64_t n) {
  return passes[static_cast<std::size_t>(pass)][activation][dtype][cell(n, value_cells)];
}

bool torch_serves(Product product, Dtype dtype, int64_t rows, int64_t in_features, int64_t out_features) {
  const auto side = [](int64_t n) { return cell(n, side_cells); };
  return products[static_cast<std::size_t>(product)][dtype]
                 [(side(rows) * side_cells + side(in_features)) * side_cells + side(out_features)];
}

void leave_to_torch(Pass pass, std::size_t activation, Dtype dtype, std::span<const int64_t> cells) {
  set(passes.at(static_cast<std::size_t>(pass)).at(activation).at(dtype), cells);
}

void leave_to_torch(Product product, Dtype dtype, std::span<const int64_t> cells) {
  set(products.at(static_cast<std::size_t>(product)).at(dtype), cells);
}

}  // namespace mlpext::cpu
