// The dtypes that have kernels, on every device. No torch header.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace mlpext {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum Dtype : std::size_t { float64, float32, bfloat16, float16, dtype_count };
template <class Function> using PerDtype = std::array<Function, dtype_count>;

}  // namespace mlpext
