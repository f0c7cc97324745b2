// In this folder: what csrc/cuda/*.cpp needs of a torch with CUDA, on CPU tensors
// (tests/cuda/test_cuda_tensors_emulated.py).
#pragma once
#include <c10/core/Device.h>

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
  ~CUDAGuard() {}
};
}  // namespace c10::cuda
