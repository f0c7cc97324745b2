#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

namespace at::detail {
inline Tensor empty_cuda(IntArrayRef sizes, ScalarType dtype, std::optional<Device>,
                         std::optional<MemoryFormat>) {
  return at::empty(sizes, dtype);
}
inline Tensor empty_strided_cuda(IntArrayRef sizes, IntArrayRef strides, ScalarType dtype,
                                 std::optional<Device>) {
  return at::empty_strided(sizes, strides, dtype);
}
}  // namespace at::detail
