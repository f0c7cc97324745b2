// A network of at most 128 wide as one kernel forward and one backward: compiled once a dtype, see
// access.cuh; MLPEXT_TABLE is the table's name. README.md beside it has the plan and what bounds it.
//
// A block takes a tile of rows through all the layers in shared memory, from one buffer to the next and back.
// Its matrices there have rows of job.stride elements, widths rounded up to 16, and 0 wherever a matrix of
// the network has no element. A warp makes a piece of a product at a time, 16 `high` rows by 16 columns, of
// which a lane holds eight values for each 16 rows: element e is in row g + 8 (e / 2 % 2) and column 2 t + e
// % 2 + 8 (e / 4), with g and t quotient and remainder of the lane by 4. No atomics: each sum belongs to one
// lane.
#pragma once
#include "cuda/access.cuh"
#include "cuda/experimental/narrow/narrow.h"
#include "formulas/activation_info.h"

namespace mlpext::MLPEXT_ISA {
namespace {

constexpr bool tensor_cores = sizeof(M) == 2;
constexpr int high = tensor_cores ? 2 : 1;  // two use every value of the other factor twice
constexpr int warps = threads / 32, tile_rows = Narrow::tile(sizeof(M));
using Piece = V[high][8];
using RowSums = V[high][4];

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int row_of(int e) { return lane() / 4 + 8 * (e / 2 % 2); }
__device__ __forceinline__ int column_of(int e) { return 2 * (lane() % 4) + e % 2 + 8 * (e / 4); }

// 16 bytes without a way through registers; there after copies_done() and a barrier.
__device__ __forceinline__ void copy_16_bytes(const M* from, M* to) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from))
      : "memory");
#else
  emulator::copy_later(from, to);
#endif
}
__device__ __forceinline__ void copies_done() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emulator::copies_done();
#endif
}

__device__ __forceinline__ bool wide(const void* pointer, int width) {
  return width % values == 0 && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// A (rows, width) matrix, and zeros up to `all_rows` and the next multiple of 16 columns.
__device__ __forceinline__ void load(const void* matrix, int rows, int width, int all_rows, int stride,
                                     M* to) {
  const M* const from = static_cast<const M*>(matrix);
  const int columns = round_up(width, 16);
  if (wide(from, width)) {
    const int across = columns / values;
    for (int i = threadIdx.x; i < all_rows * across; i += threads) {
      const int row = i / across, column = (i - row * across) * values;
      M* const place = to + row * stride + column;
      if (row < rows && column < width) copy_16_bytes(from + row * width + column, place);
      else *reinterpret_cast<uint4*>(place) = uint4{};
    }
    return;
  }
  for (int i = threadIdx.x; i < all_rows * columns; i += threads) {
    const int row = i / columns, column = i - row * columns;
    to[row * stride + column] = row < rows && column < width ? from[row * width + column] : M{};
  }
}

__device__ __forceinline__ void store(const M* from, int rows, int width, int stride, M* to) {
  if (wide(to, width)) {
    const int across = width / values;
    for (int i = threadIdx.x; i < rows * across; i += threads) {
      const int row = i / across, column = (i - row * across) * values;
      M some[values];
      read<values>(from + row * stride + column, some);
      write<values>(some, to + row * width + column);
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * width; i += threads) {
    const int row = i / width, column = i - row * width;
    to[i] = from[row * stride + column];
  }
}

// Two neighbours of a row.
__device__ __forceinline__ void read_pair(const M* from, V& x, V& y) {
  M pair[2];
  read<2>(from, pair);
  x = widen(pair[0]), y = widen(pair[1]);
}
__device__ __forceinline__ void write_pair(V x, V y, M* to) {
  M pair[2];
  narrow_pair(x, y, pair);
  WordOf<M, 2> word;
  memcpy(&word, pair, sizeof(word));
  *reinterpret_cast<WordOf<M, 2>*>(to) = word;
}

// Four 8 x 8 matrices of 16 bits, lane l giving the address of row l % 8 of matrix l / 8; of each matrix a
// lane receives elements 2 t and 2 t + 1 of row g, or, transposed, of column g.
template <bool transposed> __device__ __forceinline__ void load_matrices(const M* row, uint32_t (&to)[4]) {
#ifdef __CUDACC__
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
#else
  const auto rows = emulator::of_warp(row);
  const int g = lane() / 4, t = lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    if (reinterpret_cast<uintptr_t>(rows[8 * matrix + g]) % 16 != 0) emulator::fail("misaligned address");
    M pair[2];
    for (int j = 0; j < 2; ++j)
      pair[j] = transposed ? rows[8 * matrix + 2 * t + j][g] : rows[8 * matrix + g][2 * t + j];
    memcpy(&to[matrix], pair, 4);
  }
#endif
}

// c += a b of 16 x 16 and 16 x 8 values, in float.
__device__ __forceinline__ void multiply_add(V* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<M, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0].v), "+f"(c[1].v), "+f"(c[2].v), "+f"(c[3].v)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0].v), "+f"(c[1].v), "+f"(c[2].v), "+f"(c[3].v)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  struct Operands {
    M a[4][2], b[2][2];
  } mine;
  memcpy(mine.a, a, sizeof(mine.a)), memcpy(mine.b[0], &b0, 4), memcpy(mine.b[1], &b1, 4);
  const auto lanes = emulator::of_warp(mine);
  for (int e = 0; e < 4; ++e) {
    const int row = row_of(e), column = column_of(e);
    for (int k = 0; k < 16; ++k) {
      const M left = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2][k % 2];
      const M right = lanes[column * 4 + k % 8 / 2].b[k / 8][k % 2];
      c[e] = c[e] + widen(left) * widen(right);
    }
  }
#endif
}

// A factor of a product in shared memory: its elements by the outer index (the product's row or column) and
// by k, the index that is summed over. Neighbours lie along k, or along the outer index.
template <bool along_k> struct Factor {
  const M* data;
  int stride;

  __device__ __forceinline__ const M* at(int outer, int k) const {
    return along_k ? data + outer * stride + k : data + k * stride + outer;
  }
};

// piece[:live] += the product from row m and column n on, summed over k < depth, a multiple of 16; and, if
// with_sums, the sums of the left factor over k, in elements 0 and 2 of row_sums.
template <bool a_along_k, bool b_along_k>
__device__ __forceinline__ void product(Factor<a_along_k> a, Factor<b_along_k> b, int m, int n, int depth,
                                        int live, Piece& piece, RowSums& row_sums, bool with_sums) {
  if constexpr (tensor_cores) {
    // Where in the 16 x 16 values this lane's row of the four matrices starts.
    const int matrix = lane() / 8, row = lane() % 8;
    const int a_outer = matrix % 2 * 8 + (a_along_k ? row : 0), a_k = matrix / 2 * 8 + (a_along_k ? 0 : row);
    const int b_outer = matrix / 2 * 8 + (b_along_k ? row : 0), b_k = matrix % 2 * 8 + (b_along_k ? 0 : row);
    constexpr uint32_t ones = std::is_same_v<M, Half> ? 0x3c003c00 : 0x3f803f80;
    __syncwarp();  // what follows wants all lanes at once, and lanes at an edge have gone their own way
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t right[4], left[4];
      load_matrices<!b_along_k>(b.at(n + b_outer, k + b_k), right);
#pragma unroll
      for (int i = 0; i < high; ++i) {
        if (i >= live) break;
        load_matrices<!a_along_k>(a.at(m + 16 * i + a_outer, k + a_k), left);
        multiply_add(piece[i], left, right[0], right[1]);
        multiply_add(piece[i] + 4, left, right[2], right[3]);
        if (with_sums) multiply_add(row_sums[i], left, ones, ones);
      }
    }
  } else {
    constexpr int step = 4;
    const int row = m + row_of(0), column = n + column_of(0);
    for (int k = 0; k < depth; k += step) {
      M left[2][step], right[4][step];
      if constexpr (a_along_k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) read<step>(a.at(row + 8 * i, k), left[i]);
      } else {
#pragma unroll
        for (int j = 0; j < step; ++j) {
          left[0][j] = *a.at(row, k + j);
          left[1][j] = *a.at(row + 8, k + j);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (b_along_k) {
          read<step>(b.at(column + 8 * i, k), right[2 * i]);
          read<step>(b.at(column + 8 * i + 1, k), right[2 * i + 1]);
        } else {
#pragma unroll
          for (int j = 0; j < step; ++j) {
            M pair[2];
            read<2>(b.at(column + 8 * i, k + j), pair);
            right[2 * i][j] = pair[0], right[2 * i + 1][j] = pair[1];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < step; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          piece[0][e] = madd(widen(left[e / 2 % 2][j]), widen(right[e % 2 + e / 4 * 2][j]), piece[0][e]);
        if (with_sums) {
          row_sums[0][0] = row_sums[0][0] + widen(left[0][j]);
          row_sums[0][2] = row_sums[0][2] + widen(left[1][j]);
        }
      }
    }
  }
}

template <bool a_along_k, bool b_along_k>
__device__ __forceinline__ void product(Factor<a_along_k> a, Factor<b_along_k> b, int m, int n, int depth,
                                        Piece& piece) {
  RowSums none;
  product(a, b, m, n, depth, high, piece, none, /*with_sums=*/false);
}

// Calls run(i, e, row, column) for every second value of a piece at (m, n): for the first of two neighbours.
template <class Run> __device__ __forceinline__ void for_pairs(int m, int n, Run run) {
#pragma unroll
  for (int i = 0; i < high; ++i) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) run(i, e, m + 16 * i + row_of(e), n + column_of(e));
  }
}

template <int n> __device__ __forceinline__ void clear(V (&sums)[high][n]) {
#pragma unroll
  for (int i = 0; i < high; ++i) {
#pragma unroll
    for (int e = 0; e < n; ++e) sums[i][e] = V(0);
  }
}

// Writes the values of a piece that lie in a (rows, width) matrix, and 0 for the others.
__device__ __forceinline__ void put(const Piece& piece, int m, int n, int rows, int width, int stride,
                                    M* to) {
  for_pairs(m, n, [&](int i, int e, int row, int column) {
    const V x = row < rows && column < width ? piece[i][e] : V(0);
    const V y = row < rows && column + 1 < width ? piece[i][e + 1] : V(0);
    write_pair(x, y, to + row * stride + column);
  });
}

// The pieces of a product's tile: those of the same columns are neighbours.
struct Pieces {
  int across_rows, count;
  __device__ __forceinline__ Pieces(int rows, int width)
      : across_rows(static_cast<int>(ceil_div(rows, 16 * high))),
        count(across_rows * round_up(width, 16) / 16) {}
  __device__ __forceinline__ int m(int i) const { return i % across_rows * 16 * high; }
  __device__ __forceinline__ int n(int i) const { return i / across_rows * 16; }
};

__device__ __forceinline__ void load_weight(const NarrowLayer& layer, int stride, M* to) {
  load(layer.weight, layer.out, layer.in, round_up(layer.out, 16), stride, to);
}
template <class T> __device__ __forceinline__ void exchange(T*& a, T*& b) {
  T* const c = a;
  a = b, b = c;
}

// The tile's part of a matrix of the network.
template <class T> __device__ __forceinline__ M* rows_from(T* matrix, int64_t first, int width) {
  return const_cast<M*>(static_cast<const M*>(matrix)) + first * width;
}

__global__ void __launch_bounds__(threads, Narrow::blocks_together(false))
    narrow_forward_kernel(const __grid_constant__ Narrow job) {
  const int stride = job.stride, warp = threadIdx.x / 32;
  M* const weights = reinterpret_cast<M*>(shared_memory());
  M* x = weights + job.weight_rows * stride;
  M* y = x + tile_rows * stride;
  M* const z = y + tile_rows * stride;
  if (job.resident) {
    M* to = weights;
    for (int l = 0; l < job.depth; ++l) {
      load_weight(job.layers[l], stride, to);
      to += round_up(job.layers[l].out, 16) * stride;
    }
  }
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile_rows; first < job.rows;
       first += static_cast<int64_t>(gridDim.x) * tile_rows) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(tile_rows), job.rows - first));
    // Into y: x may still be on its way out.
    load(rows_from(job.x, first, job.layers[0].in), rows, job.layers[0].in, tile_rows, stride, y);
    exchange(x, y);
    const M* weight = weights;
    for (int l = 0; l < job.depth; ++l) {
      const NarrowLayer& layer = job.layers[l];
      if (!job.resident) load_weight(layer, stride, weights);
      copies_done();
      __syncthreads();
      const Pieces pieces(rows, layer.out);
      for (int i = warp; i < pieces.count; i += warps) {
        const int m = pieces.m(i), n = pieces.n(i);
        Piece piece;
        clear(piece);
        product<true, true>({x, stride}, {weight, stride}, m, n, round_up(layer.in, 16), piece);
        if (layer.bias) {
          const M* const bias = static_cast<const M*>(layer.bias);
          for_pairs(m, n, [&](int i, int e, int, int column) {
            if (column < layer.out) piece[i][e] = piece[i][e] + widen(bias[column]);
            if (column + 1 < layer.out) piece[i][e + 1] = piece[i][e + 1] + widen(bias[column + 1]);
          });
        }
        if (layer.z) put(piece, m, n, rows, layer.out, stride, z);
        with_activation(layer.activation, layer.params, [&](const auto& f) {
          for_pairs(m, n, [&](int i, int e, int, int) {
            piece[i][e] = f.forward(piece[i][e]);
            piece[i][e + 1] = f.forward(piece[i][e + 1]);
          });
        });
        put(piece, m, n, rows, layer.out, stride, y);
      }
      __syncthreads();
      if (layer.y) store(y, rows, layer.out, stride, rows_from(layer.y, first, layer.out));
      if (layer.z) store(z, rows, layer.out, stride, rows_from(layer.z, first, layer.out));
      if (job.resident) weight += round_up(layer.out, 16) * stride;
      exchange(x, y);
    }
  }
}

cudaError_t narrow_forward(const Narrow& job, cudaStream_t stream) {
  return launch_shared(narrow_forward_kernel, job.blocks, threads, job.bytes, stream, job);
}

// The gradient of x of the layer `from` at (m, n), of g itself behind the last one, times f' of the layer
// that x comes from, if the gradient goes on to it.
__device__ __forceinline__ void gradient_piece(const Narrow& job, const NarrowLayer* from,
                                               const NarrowLayer* to, const M* dz, const M* weight,
                                               const M* source, int m, int n, int rows, int width,
                                               M* result) {
  Piece piece;
  clear(piece);
  if (from) {
    product<true, false>({dz, job.stride}, {weight, job.stride}, m, n, round_up(from->out, 16), piece);
  } else {
    for_pairs(m, n, [&](int i, int e, int row, int column) {
      read_pair(dz + row * job.stride + column, piece[i][e], piece[i][e + 1]);
    });
  }
  if (to) {
    Piece saved;
    clear(saved);
    if (to->y || to->z) {
      for_pairs(m, n, [&](int i, int e, int row, int column) {
        read_pair(source + row * job.stride + column, saved[i][e], saved[i][e + 1]);
      });
    }
    const bool from_output = !to->z;
    with_activation(to->activation, to->params, [&]<class A>(const A& f) {
      const auto each = [&](auto derivative) {
        for_pairs(0, 0, [&](int i, int e, int, int) {
          piece[i][e] = chain<A>(piece[i][e], derivative(saved[i][e]));
          piece[i][e + 1] = chain<A>(piece[i][e + 1], derivative(saved[i][e + 1]));
        });
      };
      if constexpr (HasDerivativeFromOutput<A>) {
        if (from_output) {
          each([&](V y) { return f.derivative_from_output(y); });
          return;
        }
      }
      each([&](V z) { return f.derivative(z); });
    });
  }
  put(piece, m, n, rows, width, job.stride, result);
}

// sums += dz' x at (m, n), and, with the first columns, the sums of dz.
__device__ __forceinline__ void weight_piece(const NarrowLayer& layer, const M* dz, const M* x, int stride,
                                             int m, int n, int rows, Scalar* sums) {
  Piece piece;
  clear(piece);
  RowSums row_sums;
  clear(row_sums);
  product<false, false>({dz, stride}, {x, stride}, m, n, round_up(rows, 16),
                        (round_up(layer.out, 16) - m) / 16, piece, row_sums, n == 0);
  const int sum_stride = layer.sum_stride(), bias_at = round_up(layer.in, 16);
  for_pairs(m, n, [&](int i, int e, int row, int column) {
    if (row >= layer.out) return;
    float2* const to = reinterpret_cast<float2*>(sums + row * sum_stride + column);
    float2 sum = *to;
    sum.x += piece[i][e].v, sum.y += piece[i][e + 1].v;
    *to = sum;
    if (n == 0 && e < 4 && lane() % 4 == 0) sums[row * sum_stride + bias_at] += row_sums[i][e].v;
  });
}

__global__ void __launch_bounds__(threads, Narrow::blocks_together(true))
    narrow_backward_kernel(const __grid_constant__ Narrow job) {
  const int stride = job.stride, warp = threadIdx.x / 32;
  M* const weights = reinterpret_cast<M*>(shared_memory());
  M* const x = weights + job.weight_rows * stride;
  M* dz = x + tile_rows * stride;
  M* next = dz + tile_rows * stride;
  Scalar* const partial = job.partial + static_cast<int64_t>(blockIdx.x) * job.sums;
  Scalar* const sums = job.shared_sums ? reinterpret_cast<Scalar*>(x + 3 * tile_rows * stride) : partial;
  for (int i = threadIdx.x; i < job.sums; i += threads) sums[i] = 0;
  const M* last_weight = weights;
  if (job.resident) {
    M* to = weights;
    for (int l = 0; l < job.depth; ++l) {
      last_weight = to;
      load_weight(job.layers[l], stride, to);
      to += round_up(job.layers[l].out, 16) * stride;
    }
  }
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile_rows; first < job.rows;
       first += static_cast<int64_t>(gridDim.x) * tile_rows) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(tile_rows), job.rows - first));
    const M* weight = last_weight;
    Scalar* layer_sums = sums + job.sums;
    // Step l makes the gradient of x of layer l, and dz of the layer before it; the first one that of g.
    for (int l = job.depth; l >= job.lowest; --l) {
      const NarrowLayer* const from = l < job.depth ? &job.layers[l] : nullptr;
      const NarrowLayer* const to = l > job.lowest ? &job.layers[l - 1] : nullptr;
      const int width = from ? from->in : to->out;
      const bool sums_wanted = from && from->sums(), goes_on = to || job.dx;
      if (!from) load(rows_from(job.g, first, width), rows, width, tile_rows, stride, dz);
      else if (!job.resident && goes_on) load_weight(*from, stride, weights);
      const bool from_output = to && to->y && !to->z;
      if (const void* const matrix = l ? job.layers[l - 1].y : job.x; sums_wanted || from_output)
        load(rows_from(matrix, first, width), rows, width, tile_rows, stride, x);
      if (to && to->z) load(rows_from(to->z, first, width), rows, width, tile_rows, stride, next);
      copies_done();
      __syncthreads();
      if (from) layer_sums -= from->sums();
      const Pieces gradient(goes_on ? rows : 0, width);
      const Pieces product(sums_wanted ? from->out : 0, width);
      for (int i = warp; i < gradient.count + product.count; i += warps) {
        if (const int j = i - gradient.count; j >= 0)
          weight_piece(*from, dz, x, stride, product.m(j), product.n(j), rows, layer_sums);
        else
          gradient_piece(job, from, to, dz, weight, from_output ? x : next, gradient.m(i), gradient.n(i),
                         rows, width, next);
      }
      __syncthreads();
      if (!to && job.dx) {
        store(next, rows, width, stride, rows_from(job.dx, first, width));
        __syncthreads();
      }
      if (job.resident && from && l > 0) weight -= round_up(job.layers[l - 1].out, 16) * stride;
      exchange(dz, next);
    }
  }
  if (!job.shared_sums) return;
  __syncthreads();
  for (int i = threadIdx.x; i < job.sums; i += threads) partial[i] = sums[i];
}

// dw and db from the blocks' sums: a column of `add_deep` threads adds up each, in order.
constexpr int add_deep = 8, add_across = threads / add_deep;
__global__ void __launch_bounds__(threads) narrow_add_kernel(const __grid_constant__ Narrow job) {
  __shared__ Scalar shared[threads];
  const int deep = threadIdx.x / add_across;
  int at = blockIdx.x * add_across + threadIdx.x % add_across;
  Scalar sum = 0;
  if (at < job.sums) {
#pragma unroll 4
    for (int block = deep; block < job.blocks; block += add_deep)
      sum += job.partial[static_cast<int64_t>(block) * job.sums + at];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (deep > 0 || at >= job.sums) return;
  for (int i = 1; i < add_deep; ++i) sum += shared[threadIdx.x + i * add_across];
  int l = 0;
  for (; at >= job.layers[l].sums(); ++l) at -= job.layers[l].sums();
  const NarrowLayer& layer = job.layers[l];
  const int row = at / layer.sum_stride(), column = at - row * layer.sum_stride();
  if (column < layer.in && layer.dw) static_cast<M*>(layer.dw)[row * layer.in + column] = narrow<M>(V(sum));
  if (column == round_up(layer.in, 16) && layer.db) static_cast<M*>(layer.db)[row] = narrow<M>(V(sum));
}

cudaError_t narrow_backward(const Narrow& job, cudaStream_t stream) {
  const cudaError_t error =
      launch_shared(narrow_backward_kernel, job.blocks, threads, job.bytes, stream, job);
  if (error != cudaSuccess || job.sums == 0) return error;
  return launch(narrow_add_kernel, static_cast<unsigned>(ceil_div(job.sums, add_across)), threads, stream,
                job);
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA

namespace mlpext::cuda {

constinit const NarrowKernels MLPEXT_TABLE{MLPEXT_ISA::narrow_forward, MLPEXT_ISA::narrow_backward};

}  // namespace mlpext::cuda
