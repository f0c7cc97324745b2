#pragma once
#include <c10/util/Exception.h>
#define C10_CUDA_CHECK(...) TORCH_CHECK((__VA_ARGS__) == cudaSuccess)
