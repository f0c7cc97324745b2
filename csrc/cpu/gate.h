// f(z1) z2 on runs of memory: what a gated layer does between its products, and `gated` by itself.
#pragma once
#include "cpu/kernels.h"

namespace mlpext::cpu {

struct Gate {
  Dtype dtype;
  const ActivationKernels& activation;
  const double* params;

  // y = f(z1) z2
  void forward(const void* z1, const void* z2, void* y, int64_t n) const {
    activation.gated[dtype](params, z1, z2, y, n);
  }
  // dz1 = g z2 f'(z1) and dz2 = g f(z1)
  void backward(const void* g, const void* z1, const void* z2, void* dz1, void* dz2, int64_t n) const {
    activation.gated_backward[dtype](params, g, z1, z2, dz1, dz2, n);
  }
};

}  // namespace mlpext::cpu
