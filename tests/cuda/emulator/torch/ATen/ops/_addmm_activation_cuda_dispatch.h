#pragma once
#include <ATen/ops/_addmm_activation.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/gelu.h>

namespace at::cuda {
// As torch's on CUDA, which differs from that on the CPU: gelu is tanh's approximation, and where there is
// nothing to multiply the bias comes back without the activation.
inline Tensor _addmm_activation(const Tensor& bias, const Tensor& x, const Tensor& weight, const Scalar& beta,
                                const Scalar& alpha, bool use_gelu) {
  if (x.size(1) == 0) return bias.expand({x.size(0), weight.size(1)}).clone(at::MemoryFormat::Contiguous);
  return use_gelu ? at::gelu(at::addmm(bias, x, weight, beta, alpha), "tanh")
                  : at::_addmm_activation(bias, x, weight, beta, alpha, use_gelu);
}
}  // namespace at::cuda
