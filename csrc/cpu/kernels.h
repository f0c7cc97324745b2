// The loops as a table of pointers, one table an instruction set. No torch header is included here or in the
// loops.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "../activations.h"

namespace mlpext::cpu {

enum Dtype : std::size_t { float64, float32, bfloat16, float16, dtype_count };
template <class Function> using PerDtype = std::array<Function, dtype_count>;

// y[i] = f(x[i]); y may be x.
using Forward = void (*)(const double* params, const void* x, void* y, int64_t n);
// grad_input[i] = grad_output[i] f'(saved[i]); any two may be the same.
using Backward = void (*)(const double* params, const void* grad_output, const void* saved, void* grad_input,
                          int64_t n);

struct ActivationKernels {
  PerDtype<Forward> forward;
  PerDtype<Backward> backward;
  PerDtype<Backward> backward_from_output;  // null where y does not determine f'
};

// y[i] = max over k of x[k stride + i], and index[i] the first k that reaches it (index may be null). A NaN
// wins.
using MaxoutForward = void (*)(const void* x, void* y, void* index, int64_t pieces, int64_t stride,
                               int64_t n);
// grad_input[k stride + i] = grad_output[i] where index[i] = k, else 0.
using MaxoutBackward = void (*)(const void* grad_output, const void* index, void* grad_input, int64_t pieces,
                                int64_t stride, int64_t n);

struct Kernels {
  std::string_view isa;
  std::array<ActivationKernels, activation_count> activations;
  // By width of the index: [0] one byte, [1] int32.
  std::array<PerDtype<MaxoutForward>, 2> maxout_forward;
  std::array<PerDtype<MaxoutBackward>, 2> maxout_backward;
};

// The table in use: the best that this machine runs, or the one that the environment variable MLPEXT_CPU_ISA
// names.
const Kernels& kernels();

// The instruction sets compiled in that this machine runs, worst first.
std::vector<std::string_view> available_isas();

}  // namespace mlpext::cpu
