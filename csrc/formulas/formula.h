// What the formulas of activations.h and losses.h are written in, and what activations have in common.
//
// V is a plain float or double on a GPU (scalar_lanes.h), a register of them on a CPU (simd_lanes.h). A
// formula uses only the lane operations that every V has: + - * /, comparisons, select, abs, minus_abs, sqrt,
// madd(a, b, c) = a b + c, at_least and at_most (a NaN passes), exp(x), exp(x, c) = c e^x, expm1(x),
// expm1(x, c), log1p, tanh, tanhshrink, sin, cos, times_normal_cdf and its slope, odd_cubic, two_part_product
// (elementary.h). There is no `if`: with select(condition, a, b) a NaN takes the same side in every lane, at
// every length, on every machine.
//
// The struct of an activation has
//
//   name, params                what users call it, and its parameters with their defaults; they are double
//                               members in the same order
//   forward(x)                  y = f(x)
//   derivative(x)               f'(x)
//   derivative_from_output(y)   f'(x) from y = f(x), where y determines it
//
// and, where they differ from those of `Formula`, the traits below. An argument is bounded, as in at_least(x,
// -1000), where a limit at infinity would otherwise be computed as inf * 0; at the bound the other factor has
// underflowed to 0.
#pragma once
#include <array>
#include <cstddef>
#include <string_view>

#if defined(__CUDACC__)
#define MLPEXT_FORMULA __host__ __device__ __forceinline__
#else
#define MLPEXT_FORMULA __attribute__((always_inline)) inline
#endif
#define MLPEXT_LAMBDA __attribute__((always_inline))

namespace mlpext {

struct Param {
  std::string_view name;
  double value;  // default
};

struct TwoParts {  // a constant with more digits than a double
  double hi, lo;
};

struct Formula {
  static constexpr std::array<Param, 0> params{};
  // A bare module keeps y for backward, as torch's does, not x.
  static constexpr bool keeps_output = false;
  // In float16 and bfloat16 y has too few digits for derivative_from_output: near -alpha, for elu.
  static constexpr bool output_too_coarse_in_16bit = false;
  // f'(x) = 0 makes the gradient 0 even where the one that comes in is infinite or NaN, as in torch.
  static constexpr bool zero_slope_masks_gradient = false;
  // torch compares x with parameters that are rounded to its dtype.
  static constexpr bool rounds_params = false;
  // False: torch's operators take these parameters, as they do all that are not finite numbers.
  MLPEXT_FORMULA constexpr bool has_kernel() const { return true; }
  // False: with these parameters y does not determine f'(x); most often f is not monotone then.
  MLPEXT_FORMULA constexpr bool output_suffices() const { return true; }
};

}  // namespace mlpext
