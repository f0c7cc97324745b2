// f(z1) z2 on runs of memory: what a gated layer does between its products, and `gated` by itself. The runs
// are gone over two or three times, so they should stay in the L1 cache.
#pragma once
#include "cpu/kernels.h"

namespace mlpext::cpu {

struct Gate {
  Dtype dtype;
  const ActivationKernels& activation;
  const double* params;

  // y = f(z1) z2
  void forward(const void* z1, const void* z2, void* y, int64_t n) const {
    activation.forward[dtype](params, z1, y, n);
    kernels().multiply[dtype](y, z2, y, n);
  }
  // dz1 = g z2 f'(z1) and dz2 = g f(z1), each where it is not null.
  void backward(const void* g, const void* z1, const void* z2, void* dz1, void* dz2, int64_t n) const {
    if (dz2) forward(z1, g, dz2, n);
    if (!dz1) return;
    kernels().multiply[dtype](g, z2, dz1, n);
    activation.backward[dtype](params, dz1, z1, dz1, n);
  }
};

}  // namespace mlpext::cpu
