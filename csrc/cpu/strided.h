// Elementwise loops over any layout: torch's TensorIterator, for its order and its output strides, and
// buffers that stay in the L1 cache.
#pragma once
#include <ATen/TensorIterator.h>

#include <array>
#include <cstring>

#include "cpu/tensors.h"

namespace mlpext::cpu {

// 4 KiB for each operand: three of them and the stack around share the 32 KiB of an L1 cache.
constexpr int64_t buffer_elements = 512;
using Buffer = std::array<std::byte, buffer_elements * sizeof(double)>;

// memcpy, because elements of a view of bytes may lie at any address.
template <class Element>
void copy_strided(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_stride, static_cast<const char*>(from) + i * from_stride,
                sizeof(Element));
}

inline void copy_strided(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t n,
                         int64_t element_size) {
  switch (element_size) {
    case 2: return copy_strided<uint16_t>(to, to_stride, from, from_stride, n);
    case 4: return copy_strided<uint32_t>(to, to_stride, from, from_stride, n);
    default: return copy_strided<uint64_t>(to, to_stride, from, from_stride, n);
  }
}

// Runs kernel(operands, n) over the iterator's outputs and then its inputs, as pointers to n elements side by
// side.
template <std::size_t outputs, std::size_t inputs, class Kernel>
void iterate(at::TensorIterator& iterator, Kernel kernel) {
  constexpr std::size_t operands = outputs + inputs;
  const int64_t size = iterator.element_size(0);
  iterator.for_each(
      [&](char** data, const int64_t* strides, int64_t n) {
        const bool contiguous =
            std::all_of(strides, strides + operands, [&](int64_t stride) { return stride == size; });
        if (contiguous) {
          kernel(data, n);
          return;
        }
        alignas(64) std::array<Buffer, operands> buffers;
        for (int64_t start = 0; start < n; start += buffer_elements) {
          const int64_t count = std::min(buffer_elements, n - start);
          std::array<char*, operands> run;
          for (std::size_t i = 0; i < operands; ++i) {
            run[i] = reinterpret_cast<char*>(buffers[i].data());
            if (i >= outputs)
              copy_strided(run[i], size, data[i] + start * strides[i], strides[i], count, size);
          }
          kernel(run.data(), count);
          for (std::size_t i = 0; i < outputs; ++i)
            copy_strided(data[i] + start * strides[i], strides[i], run[i], size, count, size);
        }
      },
      grain_size);
}

}  // namespace mlpext::cpu
