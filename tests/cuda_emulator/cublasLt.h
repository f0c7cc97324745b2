// What csrc/cuda/cublaslt.cpp needs of cuBLASLt, on the CPU and by NVIDIA's documentation: one product at a
// time, naively, in column-major order. A call that the documentation forbids is refused with its status, or
// ends the process where the library would go wrong in silence.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"

enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
using cudaDataType = cudaDataType_t;
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasStatus_t {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
inline const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE" : "another status";
}

enum cublasLtEpilogue_t {
  CUBLASLT_EPILOGUE_DEFAULT = 1,
  CUBLASLT_EPILOGUE_RELU = 2,
  CUBLASLT_EPILOGUE_BIAS = 4,
  CUBLASLT_EPILOGUE_RELU_BIAS = 2 | 4,
  CUBLASLT_EPILOGUE_RELU_AUX = 2 | 128,
  CUBLASLT_EPILOGUE_RELU_AUX_BIAS = 2 | 4 | 128,
  CUBLASLT_EPILOGUE_DRELU = 8 | 128,
  CUBLASLT_EPILOGUE_DRELU_BGRAD = 8 | 16 | 128,
  CUBLASLT_EPILOGUE_GELU = 32,
  CUBLASLT_EPILOGUE_GELU_BIAS = 32 | 4,
  CUBLASLT_EPILOGUE_GELU_AUX = 32 | 128,
  CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 32 | 4 | 128,
  CUBLASLT_EPILOGUE_DGELU = 64 | 128,
  CUBLASLT_EPILOGUE_DGELU_BGRAD = 64 | 16 | 128,
  CUBLASLT_EPILOGUE_BGRADA = 256,
  CUBLASLT_EPILOGUE_BGRADB = 512,
};
enum cublasLtReductionScheme_t : uint32_t { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

using cublasLtHandle_t = int*;
struct cublasLtMatmulAlgo_t {
  uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
  cublasStatus_t state;
};

// ---- descriptors

struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType type;
  int64_t rows, columns, ld;
};
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType type,
                                               uint64_t rows, uint64_t columns, int64_t ld) {
  *layout = {type, int64_t(rows), int64_t(columns), ld};
  return ld >= layout->rows ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

struct cublasLtMatmulDescOpaque_t {
  cublasOperation_t a, b;
  cublasLtEpilogue_t epilogue;
  void *bias, *aux;
  int64_t ld_aux;
};
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_TRANSB = 4,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
};
inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t desc, cublasComputeType_t compute,
                                             cudaDataType_t scale) {
  *desc = {CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, 0};
  return compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS
                                                              : CUBLAS_STATUS_INVALID_VALUE;
}
template <class T> cublasStatus_t assign(T& attribute, const void* value, size_t size) {
  if (size != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&attribute, value, size);
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, size_t size) {
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return assign(desc->a, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSB: return assign(desc->b, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return assign(desc->epilogue, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return assign(desc->bias, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return assign(desc->aux, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return assign(desc->ld_aux, value, size);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

struct cublasLtMatmulPreferenceOpaque_t {
  uint64_t workspace;
  uint32_t reduction, alignment[4];
};
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};
inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t preference) {
  *preference = {0, 7, {256, 256, 256, 256}};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void* value, size_t size) {
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return assign(preference->workspace, value, size);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return assign(preference->reduction, value, size);
    default:
      return assign(preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value,
                    size);
  }
}

// ---- the library

namespace emulator {

inline std::atomic<int> handles = 0, heuristics = 0;
inline std::atomic<int> refused = 0;  // an epilogue that has no algorithm
constexpr size_t workspace_size = 1000;

// An algorithm knows what it was chosen for, and how its operands must be aligned.
struct Chosen {
  int64_t m, n, k;
  uint64_t others;        // everything else in the descriptors, mixed
  uint32_t alignment[6];  // of A, B, C, D, bias and aux
  bool operator==(const Chosen&) const = default;
};

struct Problem {
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, c, d;

  bool has(int bits) const { return desc->epilogue & bits; }
  bool has_bias() const { return has(4 | 16 | 256 | 512); }
  bool has_aux() const { return has(128); }

  cublasStatus_t check() const {
    const auto op = [](cublasLtMatrixLayout_t layout, cublasOperation_t transpose) {
      return transpose ? std::pair(layout->columns, layout->rows) : std::pair(layout->rows, layout->columns);
    };
    const auto [m, k] = op(a, desc->a);
    const auto [k2, n] = op(b, desc->b);
    const bool shapes = k == k2 && d->rows == m && d->columns == n && c->rows == m && c->columns == n;
    const bool types = a->type == b->type && a->type == c->type && a->type == d->type;
    if (!shapes || !types || (a->type != CUDA_R_16F && a->type != CUDA_R_16BF))
      return CUBLAS_STATUS_INVALID_VALUE;
    if (has_bias() && !desc->bias) return CUBLAS_STATUS_INVALID_VALUE;
    if (has_aux() && (!desc->aux || desc->ld_aux < m || desc->ld_aux % (has(2 | 8) ? 128 : 8) != 0))
      return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
  }

  Chosen chosen() const {
    uint64_t others = 0;
    for (int64_t word : {int64_t(a->type), int64_t(desc->a), int64_t(desc->b), int64_t(desc->epilogue), a->ld,
                         b->ld, c->ld, d->ld, has_aux() ? desc->ld_aux : 0})
      others = others * 1000003 + uint64_t(word);
    return {d->rows, d->columns, desc->a ? a->rows : a->columns, others, {}};
  }
};

inline uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return address ? std::min<uintptr_t>(256, address & -address) : 256;
}

struct Values {  // a matrix, read and written as double
  cudaDataType type;
  char* data;
  int64_t ld;

  double get(int64_t i, int64_t j) const {
    uint16_t bits;
    std::memcpy(&bits, data + 2 * (i + j * ld), 2);
    if (type == CUDA_R_16F) {
      _Float16 value;
      std::memcpy(&value, &bits, 2);
      return value;
    }
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  void put(int64_t i, int64_t j, double wide) const {
    uint16_t bits;
    if (type == CUDA_R_16F) {
      const auto value = static_cast<_Float16>(wide);
      std::memcpy(&bits, &value, 2);
    } else {
      const auto value = static_cast<float>(wide);
      uint32_t word;
      std::memcpy(&word, &value, 4);
      bits = std::isnan(value) ? 0x7fc0 : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
    }
    std::memcpy(data + 2 * (i + j * ld), &bits, 2);
  }
};

inline double gelu_factor(double z) {  // gelu(z) / z
  return 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
}
inline double gelu_slope(double z) {
  const double t = 2 * gelu_factor(z) - 1;
  return gelu_factor(z) + 0.5 * z * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * z * z);
}

}  // namespace emulator

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = new int(++emulator::handles);
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int requested,
                                                     cublasLtMatmulHeuristicResult_t* results, int* found) {
  ++emulator::heuristics;
  *found = 0;
  auto mode = cudaStreamCaptureModeGlobal;  // it may allocate
  cudaThreadExchangeStreamCaptureMode(&mode);
  const auto before = mode;
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (before != cudaStreamCaptureModeRelaxed)
    emulator::fail("an allocation that would end a graph's capture");
  const emulator::Problem problem{desc, a, b, c, d};
  const cublasStatus_t status = problem.check();
  if (status != CUBLAS_STATUS_SUCCESS || requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
  if (desc->epilogue == emulator::refused) return CUBLAS_STATUS_NOT_SUPPORTED;
  emulator::Chosen chosen = problem.chosen();
  std::copy(preference->alignment, preference->alignment + 4, chosen.alignment);
  chosen.alignment[4] = problem.has_bias() ? emulator::alignment_of(desc->bias) : 1;
  chosen.alignment[5] = problem.has_aux() ? emulator::alignment_of(desc->aux) : 1;
  static_assert(sizeof(chosen) <= sizeof(cublasLtMatmulAlgo_t));
  results[0] = {{}, std::min<size_t>(emulator::workspace_size, preference->workspace), CUBLAS_STATUS_SUCCESS};
  std::memcpy(&results[0].algo, &chosen, sizeof(chosen));
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha,
                                     const void* A, cublasLtMatrixLayout_t a, const void* B,
                                     cublasLtMatrixLayout_t b, const void* beta, const void* C,
                                     cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                                     const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                                     size_t workspace_bytes, cudaStream_t) {
  const emulator::Problem problem{desc, a, b, c, d};
  emulator::Chosen chosen, asked = problem.chosen();
  std::memcpy(&chosen, algorithm, sizeof(chosen));
  std::copy(chosen.alignment, chosen.alignment + 6, asked.alignment);
  if (problem.check() != CUBLAS_STATUS_SUCCESS || !(chosen == asked)) return CUBLAS_STATUS_INVALID_VALUE;
  const void* operands[] = {A, B, C, D, desc->bias, desc->aux};
  for (int i = 0; i < 6; ++i)
    if (emulator::alignment_of(operands[i]) < chosen.alignment[i])
      emulator::fail("an operand is not aligned as the algorithm was told");
  if (workspace_bytes < emulator::workspace_size) return CUBLAS_STATUS_INVALID_VALUE;
  std::memset(workspace, 0xa5, workspace_bytes);

  const float scale = *static_cast<const float*>(alpha), old = *static_cast<const float*>(beta);
  const auto values = [](const void* data, cublasLtMatrixLayout_t layout) {
    return emulator::Values{layout->type, static_cast<char*>(const_cast<void*>(data)), layout->ld};
  };
  const auto av = values(A, a), bv = values(B, b), cv = values(C, c), dv = values(D, d);
  const auto at = [](const emulator::Values& v, cublasOperation_t op, int64_t i, int64_t j) {
    return op ? v.get(j, i) : v.get(i, j);
  };
  const int64_t m = chosen.m, n = chosen.n, k = chosen.k;
  const emulator::Values bias{d->type, static_cast<char*>(desc->bias), 0},
      aux{d->type, static_cast<char*>(desc->aux), desc->ld_aux};
  const auto byte = [&](int64_t i, int64_t j) -> char& { return aux.data[(i + j * aux.ld) / 8]; };
  std::vector<double> sums(std::max(m, n));
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      double z = 0;
      for (int64_t l = 0; l < k; ++l) z += at(av, desc->a, i, l) * at(bv, desc->b, l, j);
      z = scale * z + (old != 0 ? old * cv.get(i, j) : 0);
      if (problem.has(4)) z += bias.get(i, 0);
      if (problem.has(2)) {
        const char bit = char(1 << i % 8);
        if (problem.has_aux()) byte(i, j) = z > 0 ? char(byte(i, j) | bit) : char(byte(i, j) & ~bit);
        z = z < 0 ? 0 : z;
      } else if (problem.has(32)) {
        if (problem.has_aux()) aux.put(i, j, z);
        z *= emulator::gelu_factor(z);
      } else if (problem.has(8)) {
        z = byte(i, j) >> i % 8 & 1 ? z : 0;
      } else if (problem.has(64)) {
        z *= emulator::gelu_slope(aux.get(i, j));
      }
      if (problem.has(16)) sums[i] += z;
      dv.put(i, j, z);
    }
  }
  if (problem.has(256))
    for (int64_t l = 0; l < k; ++l)
      for (int64_t i = 0; i < m; ++i) sums[i] += at(av, desc->a, i, l);
  if (problem.has(512))
    for (int64_t l = 0; l < k; ++l)
      for (int64_t j = 0; j < n; ++j) sums[j] += at(bv, desc->b, l, j);
  if (problem.has(16 | 256 | 512))
    for (int64_t i = 0; i < (problem.has(512) ? n : m); ++i) bias.put(i, 0, sums[i]);
  return CUBLAS_STATUS_SUCCESS;
}
