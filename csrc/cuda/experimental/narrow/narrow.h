// Networks of at most 128 wide as one kernel: what narrow.cuh and those who call it share. No torch header.
#pragma once
#include <algorithm>

#include "cuda/kernels.h"

namespace mlpext::cuda {

constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

// A layer y = f(z), z = x W' + b, whose x is the y of the one before.
struct NarrowLayer {
  int in, out;     // widths
  int activation;  // its place in the list
  double params[2];
  const void* weight;  // (out, in)
  const void* bias;    // (out), or null
  // (rows, out), null where it is not stored (forward) or f' does not come from it (backward: from z if that
  // is there, else from y).
  void *y, *z;
  void *dw, *db;  // backward: null where they are not asked for

  // The sums of a layer are (out, sum_stride): dW, and db behind its columns. The padding keeps the rows that
  // a warp adds to in different banks.
  constexpr int sum_stride() const { return round_up(in, 16) + 8; }
  constexpr int sums() const { return dw || db ? out * sum_stride() : 0; }
};

struct Narrow {
  static constexpr int widest = 128, deepest = 32;

  int64_t rows;
  const void* x;  // (rows, in of the first layer)
  int depth;
  NarrowLayer layers[deepest];
  // Backward. Layers below `lowest` have no gradients; dx is that of its input, null where it is not asked
  // for.
  int lowest;
  const void* g;  // of the last y
  void* dx;
  float* partial;  // (blocks, sums)

  // How it runs: plan() decides.
  int blocks;
  int stride;         // elements from row to row in shared memory
  int weight_rows;    // of weights there
  bool resident;      // all weights stay in shared memory, not one layer at a time
  bool shared_sums;   // the sums of dW and db are in shared memory, not in `partial`
  int sums;           // how many there are
  std::size_t bytes;  // of shared memory

  // RowsJob of a tile, all of it in shared memory.
  static constexpr int tile(int value_size) { return value_size == 2 ? 64 : 32; }
  // On a multiprocessor: as many as its registers serve.
  static constexpr int blocks_together(bool backward) { return backward ? 2 : 3; }

  // What a device offers.
  struct Device {
    int multiprocessors;
    int shared_bytes;  // that one block may have
  };
  // False: not even the least fits. Unmeasured: two blocks on a multiprocessor come first, then weights that
  // stay, then sums in shared memory.
  bool plan(int value_size, bool backward, Device device);
};

inline bool Narrow::plan(int value_size, bool backward, Device device) {
  int width = 0, all = 0, most = 0;
  bool keeps_z = false;
  sums = 0;
  for (int l = 0; l < depth; ++l) {
    const NarrowLayer& layer = layers[l];
    width = std::max({width, layer.in, layer.out});
    all += round_up(layer.out, 16);
    most = std::max(most, round_up(layer.out, 16));
    keeps_z = keeps_z || layer.z;
    sums += layer.sums();
  }
  stride = round_up(width, 16) + 16 / value_size;
  const std::size_t row = std::size_t(stride) * value_size;
  const std::size_t buffers = row * tile(value_size) * (backward || keeps_z ? 3 : 2);
  const std::size_t whole = device.shared_bytes, half = (whole + 1024) / 2 - 1024;  // 1 KiB is the system's
  const auto fits = [&](std::size_t limit, bool stay, bool sums_too) {
    resident = stay, shared_sums = backward && sums_too;
    weight_rows = stay ? all : most;
    bytes = row * weight_rows + buffers + (shared_sums ? sums * sizeof(float) : 0);
    return bytes <= limit;
  };
  if (!(fits(half, true, true) || fits(half, false, true) || fits(whole, true, true) ||
        fits(whole, false, true) || fits(whole, false, false)))
    return false;
  const int64_t together = std::min<int64_t>(blocks_together(backward), (whole + 1024) / (bytes + 1024));
  int64_t most_blocks = together * device.multiprocessors;
  if (backward)  // 64 MiB of partial sums at most
    most_blocks = std::min(most_blocks, std::max<int64_t>(1, (16 << 20) / std::max(1, sums)));
  blocks = static_cast<int>(std::min(most_blocks, ceil_div(rows, tile(value_size))));
  return true;
}

struct NarrowKernels {
  cudaError_t (*forward)(const Narrow& job, cudaStream_t stream);
  cudaError_t (*backward)(const Narrow& job, cudaStream_t stream);
};
extern const NarrowKernels narrow_float32_kernels, narrow_bfloat16_kernels, narrow_float16_kernels;

// There are none for float64.
inline const NarrowKernels& narrow_kernels(Dtype dtype) {
  return dtype == float32    ? narrow_float32_kernels
         : dtype == bfloat16 ? narrow_bfloat16_kernels
                             : narrow_float16_kernels;
}

}  // namespace mlpext::cuda
