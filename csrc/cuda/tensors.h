// What the tensor side of the CUDA kernels shares.
#pragma once
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#include "ops/tensors.h"

namespace mlpext::cuda {

// The device of a tensor made current, and the stream that is current there.
struct DeviceStreamGuard {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;

  explicit DeviceStreamGuard(const Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream(tensor.device().index())) {}
};

// Fresh memory on the current device, without a trip through the dispatcher.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cuda(sizes, dtype, /*device=*/std::nullopt, /*memory_format=*/std::nullopt);
}
inline Tensor empty_like(const Tensor& dense) {
  return at::detail::empty_strided_cuda(dense.sizes(), dense.strides(), dense.scalar_type(),
                                        /*device=*/std::nullopt);
}

inline StridedMatrix matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// The operators on CUDA (signatures.h).
MLPEXT_FOR_EACH_OPERATOR(MLPEXT_DECLARE)

// y = f(x + bias) on a dense pair; y may be x. A bias wants x contiguous, with as many columns.
void run_forward(const Tensor& x, const OptionalTensor& bias, const Tensor& y, std::size_t index,
                 Params params);

}  // namespace mlpext::cuda
