// The loops as a table of pointers, one table for each instruction set: what the tensor side calls, and all
// that it knows of lanes. No torch header is included here or in the loops, so that each of them compiles in
// seconds and no inline function of torch is compiled for one instruction set and linked for all.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "cpu/epoch/job.h"
#include "formulas/activations.h"
#include "formulas/dtype.h"

namespace mlpext::cpu {

// y[i] = f(x[i]); y may be x.
using Forward = void (*)(const double* params, const void* x, void* y, int64_t n);
// grad_input[i] = grad_output[i] f'(saved[i]); any two may be the same.
using Backward = void (*)(const double* params, const void* grad_output, const void* saved, void* grad_input,
                          int64_t n);

// y[i] = f(gate[i]) value[i].
using Gated = void (*)(const double* params, const void* gate, const void* value, void* y, int64_t n);
// of_gate[i] = grad_output[i] value[i] f'(gate[i]) and of_value[i] = grad_output[i] f(gate[i]).
using GatedBackward = void (*)(const double* params, const void* grad_output, const void* gate,
                               const void* value, void* of_gate, void* of_value, int64_t n);

// As Forward and Backward, over rows that lie `stride` elements apart.
using ForwardRows = void (*)(const double* params, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                             int64_t rows, int64_t n);
using BackwardRows = void (*)(const double* params, const void* grad_output, int64_t grad_output_stride,
                              const void* saved, int64_t saved_stride, void* grad_input,
                              int64_t grad_input_stride, int64_t rows, int64_t n);

struct ActivationKernels {
  PerDtype<Forward> forward;
  PerDtype<Backward> backward;
  PerDtype<Backward> backward_from_output;  // null where y does not determine f'
  PerDtype<ForwardRows> forward_rows;
  PerDtype<BackwardRows> backward_rows;
  PerDtype<BackwardRows> backward_rows_from_output;
  PerDtype<Gated> gated;
  PerDtype<GatedBackward> gated_backward;
};

// y[i] = max over k of x[k stride + i], and index[i] the first k that reaches it (index may be null). A NaN
// wins.
using MaxoutForward = void (*)(const void* x, void* y, void* index, int64_t pieces, int64_t stride,
                               int64_t n);
// grad_input[k stride + i] = grad_output[i] where index[i] = k, else 0.
using MaxoutBackward = void (*)(const void* grad_output, const void* index, void* grad_input, int64_t pieces,
                                int64_t stride, int64_t n);

// The innermost loops of a gemm, C = A B (gemm/microkernels.h). Strides count elements. The sums of 16-bit
// types are float.
using CopyRows = void (*)(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                          int64_t columns);
inline constexpr int64_t strip_rows = 6;      // of A: those whose sums fill the registers
inline constexpr int64_t strip_columns = 16;  // of B
inline constexpr int64_t panel_columns = 64;  // of B, packed: four registers of AVX-512

struct GemmKernels {
  PerDtype<CopyRows> transpose;  // to[j, i] = from[i, j]
  // y[i, j] = bias[j] + dot product of x[i] and w[j]; bias may be null.
  using GemmFewRows = void (*)(const void* x, int64_t x_stride, const void* w, int64_t w_stride,
                               const void* bias, void* y, int64_t y_stride, int64_t rows, int64_t columns,
                               int64_t depth);
  PerDtype<GemmFewRows> few_rows;
  // c[i] = start[i] + sum over t of a[i a_row + t a_term] b[t], where c, start and b are rows; start may be
  // null, for 0, or c. For float and double.
  // a may also be packed in strips of strip_rows rows, `a_strip` apart: row i is row i % strip_rows of strip
  // i / strip_rows. As it lies, a_strip is strip_rows a_row. So may the columns of b, in strips of
  // strip_columns; as they lie, b_strip is strip_columns.
  using GemmBlock = void (*)(const void* a, int64_t a_row, int64_t a_term, int64_t a_strip, const void* b,
                             int64_t b_stride, int64_t b_strip, const void* start, int64_t start_stride,
                             void* c, int64_t c_stride, int64_t rows, int64_t columns, int64_t terms);
  PerDtype<GemmBlock> block;
  int64_t columns_at_once;  // of b, that a block takes where there are as many: a panel, or a strip
  // For dx of a maxout, whose gradient g[i, t] belongs to the winning piece index[i, t] alone, in float and
  // double: c[i, :] = (or, with `add`, +=) sum over t of factors[i, t] b[t, index[i, t], :], where the rows
  // of b lie `b_term` apart by t and `b_piece` by index.
  using GemmByIndex = void (*)(const void* factors, int64_t factor_stride, const uint8_t* index,
                               int64_t index_stride, const void* b, int64_t b_term, int64_t b_piece, void* c,
                               int64_t c_stride, int64_t rows, int64_t columns, int64_t terms, bool add);
  PerDtype<GemmByIndex> by_index;
  // For dw of a maxout: c[i, :] = (+=) sum over the bits t set in chosen[i] of factors[i, t] b[t, :].
  using GemmByBitmask = void (*)(const void* factors, int64_t factor_stride, const uint64_t* chosen,
                                 const void* b, int64_t b_stride, void* c, int64_t c_stride, int64_t rows,
                                 int64_t columns, bool add);
  PerDtype<GemmByBitmask> by_bitmask;
  // Both for bfloat16, two terms at a time: a and b of gemm_block are pairs, its sums float. For machines
  // with AVX512_BF16 only, and null where no table serves such.
  GemmFewRows few_rows_pairs;
  GemmBlock block_pairs;
  // to[j] = the pair of a[j] and b[j], of 16 bits each; b may be null, for 0.
  void (*zip)(const void* a, const void* b, void* to, int64_t n);
  // sums[j] += sum over the rows of x[i, j].
  PerDtype<void (*)(const void* x, int64_t x_stride, void* sums, int64_t rows, int64_t columns)> add_rows;
  PerDtype<CopyRows> widen, narrow;  // to and from the type that sums are
};

struct Kernels {
  std::string_view isa;
  std::array<ActivationKernels, activation_count> activations;
  // By width of the index: [0] one byte, [1] int32.
  std::array<PerDtype<MaxoutForward>, 2> maxout_forward;
  std::array<PerDtype<MaxoutBackward>, 2> maxout_backward;
  GemmKernels gemm;
  // float64 and float32.
  std::array<TrainEpoch, 2> train;
  std::array<DropoutMask, 2> dropout_mask;
};

// The table in use: the best that this machine runs, or the one that the environment variable MLPEXT_CPU_ISA
// names.
const Kernels& kernels();

// The instruction sets compiled in that this machine runs, worst first.
std::vector<std::string_view> available_isas();

}  // namespace mlpext::cpu
