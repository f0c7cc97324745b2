// From formulas to kernels: compiled once a dtype. The including file sets MLPEXT_ISA (a namespace),
// MLPEXT_MEMORY (the type in memory), MLPEXT_TABLE (the table's name) and, for 16 bits, MLPEXT_APPROXIMATE.
//
// A thread moves 16 bytes at a time where every pointer allows it, and single elements, neighbours to
// neighbouring threads, where not and in tails; the formula between loads and stores is the same code, so a
// result depends neither on position nor on layout. No atomics: sums are taken in an order that depends on
// the shape alone.
#pragma once
#include "cuda/access.cuh"
#include "formulas/activation_info.h"

namespace mlpext::MLPEXT_ISA {
namespace {

constexpr int unroll = 2;  // accesses in flight, of each input

// 64-bit division costs as much as a formula.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Where element i of each operand lies, the output first.
template <int operands> struct Places {
  int64_t at[operands] = {};

  __device__ __forceinline__ Places(const Layout& layout, int64_t i) {
    if (layout.dims == 0) {
#pragma unroll
      for (int k = 0; k < operands; ++k) at[k] = i;
    }
#pragma unroll 1
    for (int d = 0; d < layout.dims; ++d) {
      const int64_t next = quotient(i, layout.sizes[d]), index = i - next * layout.sizes[d];
#pragma unroll
      for (int k = 0; k < operands; ++k) at[k] += index * layout.strides[k][d];
      i = next;
    }
  }
};

template <class A> struct Forward {
  static constexpr int inputs = 1;
  A f;
  __device__ __forceinline__ V operator()(const V* in) const { return f.forward(in[0]); }
};

template <class A, bool from_output> struct Backward {
  static constexpr int inputs = 2;
  using Saved = M;
  A f;
  __device__ __forceinline__ V operator()(V g, M saved, int64_t) const {
    if constexpr (from_output) return chain<A>(g, f.derivative_from_output(widen(saved)));
    else return chain<A>(g, f.derivative(widen(saved)));
  }
  __device__ __forceinline__ V operator()(const V* in) const {
    if constexpr (from_output) return chain<A>(in[0], f.derivative_from_output(in[1]));
    else return chain<A>(in[0], f.derivative(in[1]));
  }
};

// Loads come first, then the formula, then stores: the compiler keeps `unroll` accesses of each input in
// flight, which a formula between them would break up.
template <int n, class F> __device__ __forceinline__ void apply(const F& f, const M (&in)[F::inputs][n],
                                                                bool add_bias, const M (&bias)[n],
                                                                M (&packed)[n]) {
  V out[n];
#pragma unroll
  for (int j = 0; j < n; ++j) {
    V x[F::inputs];
#pragma unroll
    for (int k = 0; k < F::inputs; ++k) x[k] = widen(in[k][j]);
    if (F::inputs == 1 && add_bias) x[0] = x[0] + widen(bias[j]);
    out[j] = f(x);
  }
#pragma unroll
  for (int j = 0; j < n; j += 2) narrow_pair(out[j], out[j + 1], packed + j);
}

// A block of threads takes unroll * values * threads elements: with 16-byte accesses (`wide`) where every
// operand is one aligned run, else, and in the last block, element by element through the layout.
template <class F> __global__ void __launch_bounds__(threads)
    elementwise_kernel(const F f, const __grid_constant__ Elementwise job, const bool wide) {
  constexpr int count = unroll * values, tile = threads * count, operands = F::inputs + 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tile;
  const M* const biases = static_cast<const M*>(job.bias);
  const auto column = [&](int64_t i) { return i - quotient(i, job.columns) * job.columns; };
  M* const output = static_cast<M*>(job.output);
  if (wide && first + tile <= job.n) {
    M in[F::inputs][count], bias[count] = {}, out[count];
    const int64_t at = first + threadIdx.x * values;
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
#pragma unroll
      for (int k = 0; k < F::inputs; ++k)
        read<values>(static_cast<const M*>(job.inputs[k]) + at + u * threads * values, in[k] + u * values);
      if (F::inputs == 1 && biases)
        read<values>(biases + column(at + u * threads * values), bias + u * values);
    }
    apply(f, in, biases != nullptr, bias, out);
#pragma unroll
    for (int u = 0; u < unroll; ++u) write<values>(out + u * values, output + at + u * threads * values);
    return;
  }
  constexpr int some = 4;
#pragma unroll 1
  for (int64_t at = first + threadIdx.x; at < min(first + tile, job.n); at += some * threads) {
    M in[F::inputs][some] = {}, bias[some] = {}, out[some];
    int64_t to[some];
#pragma unroll
    for (int j = 0; j < some; ++j) {
      const int64_t i = at + j * threads;
      if (i >= job.n) break;
      const Places<operands> places(job.layout, i);
      to[j] = places.at[0];
#pragma unroll
      for (int k = 0; k < F::inputs; ++k) in[k][j] = static_cast<const M*>(job.inputs[k])[places.at[k + 1]];
      if (F::inputs == 1 && biases) bias[j] = biases[column(i)];
    }
    apply(f, in, biases != nullptr, bias, out);
#pragma unroll
    for (int j = 0; j < some; ++j)
      if (at + j * threads < job.n) output[to[j]] = out[j];
  }
}

template <class F> cudaError_t elementwise(const F& f, const Elementwise& job, cudaStream_t stream) {
  if (job.n == 0) return cudaSuccess;
  bool wide = job.layout.dims == 0 && aligned<M>(job.output);
  for (int k = 0; k < F::inputs; ++k) wide = wide && aligned<M>(job.inputs[k]);
  if (job.bias) wide = wide && aligned<M>(job.bias) && job.columns % values == 0;
  const auto blocks = static_cast<unsigned>(ceil_div(job.n, threads * unroll * values));
  return launch(elementwise_kernel<F>, blocks, threads, stream, f, job, wide);
}

template <class A> cudaError_t forward(const double* params, const Elementwise& job, cudaStream_t stream) {
  return elementwise(Forward<A>{with_params<A>(params)}, job, stream);
}
template <class A, bool from_output>
cudaError_t backward(const double* params, const Elementwise& job, cudaStream_t stream) {
  return elementwise(Backward<A, from_output>{with_params<A>(params)}, job, stream);
}

// The values that the threads of a column hold, summed pairwise; whole in the threads of row 0.
template <int n> __device__ __forceinline__ void sum_columns(V (&sums)[n]) {
  __shared__ Scalar shared[n * threads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < n; ++j) shared[j * threads + thread] = sums[j].v;
  __syncthreads();
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
#pragma unroll
      for (int j = 0; j < n; ++j)
        shared[j * threads + thread] += shared[j * threads + thread + half * blockDim.x];
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < n; ++j) sums[j] = V(shared[j * threads + thread]);
}

template <class Index> struct Winner {
  using Saved = Index;
  __device__ __forceinline__ V operator()(V g, Index winner, int64_t piece) const {
    return winner == piece ? g : V(0);
  }
};

// One block of threads a tile of columns and chunk of rows (RowTiles): dz is written as it is made, its
// column sums stay in registers down the chunk, then meet in shared memory. One chunk: they are db; more: a
// row of `partial`, which add_sums adds up.
template <class F> __global__ void __launch_bounds__(threads)
    rows_kernel(const F f, const __grid_constant__ RowsJob job, const int64_t chunk_rows, const bool wide) {
  using Saved = typename F::Saved;
  // The pieces of a tile are neighbours, so that all but the first find g and saved in the L2 cache.
  const int64_t tile = quotient(blockIdx.x, job.pieces), piece = blockIdx.x - tile * job.pieces;
  const int across = blockDim.x, deep = blockDim.y;
  const int64_t first = tile * across * values, width = job.pieces * job.columns;
  const M* g = static_cast<const M*>(job.g.data);
  const Saved* saved = static_cast<const Saved*>(job.saved.data);
  M* dz = static_cast<M*>(job.dz) + piece * job.columns;
  const auto column = [&](int j) {
    return first + (wide ? threadIdx.x * values + j : j * across + threadIdx.x);
  };

  // A thread whose columns all lie beyond the matrix has no rows.
  const int64_t last = column(0) < job.columns ? min(job.rows, (blockIdx.y + 1) * chunk_rows) : 0;
  V sums[values];
#pragma unroll
  for (int j = 0; j < values; ++j) sums[j] = V(0);
  for (int64_t top = blockIdx.y * chunk_rows + threadIdx.y; top < last; top += unroll * deep) {
    M gs[unroll][values] = {};
    Saved ss[unroll][values] = {};
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t row = top + u * deep;
      if (row >= last) continue;
      if (wide) {
        read<values>(g + row * job.g.row_stride + column(0), gs[u]);
        read<values>(saved + row * job.saved.row_stride + column(0), ss[u]);
      } else {
#pragma unroll
        for (int j = 0; j < values; ++j) {
          if (column(j) >= job.columns) continue;
          gs[u][j] = g[row * job.g.row_stride + column(j) * job.g.column_stride];
          ss[u][j] = saved[row * job.saved.row_stride + column(j) * job.saved.column_stride];
        }
      }
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t row = top + u * deep;
      if (row >= last) continue;
      V out[values];
      M packed[values];
#pragma unroll
      for (int j = 0; j < values; ++j) {
        out[j] = f(widen(gs[u][j]), ss[u][j], piece);
        sums[j] = sums[j] + out[j];
      }
#pragma unroll
      for (int j = 0; j < values; j += 2) narrow_pair(out[j], out[j + 1], packed + j);
      if (wide) {
        write<values>(packed, dz + row * width + column(0));
      } else {
#pragma unroll
        for (int j = 0; j < values; ++j)
          if (column(j) < job.columns) dz[row * width + column(j)] = packed[j];
      }
    }
  }

  sum_columns(sums);
  if (threadIdx.y > 0) return;
#pragma unroll
  for (int j = 0; j < values; ++j) {
    if (column(j) >= job.columns) continue;
    const int64_t at = piece * job.columns + column(j);
    if (gridDim.y == 1) static_cast<M*>(job.db)[at] = narrow<M>(sums[j]);
    else static_cast<Scalar*>(job.partial)[blockIdx.y * width + at] = sums[j].v;
  }
}

__global__ void __launch_bounds__(threads) add_sums_kernel(const __grid_constant__ Sums job) {
  const Scalar* const partial = static_cast<const Scalar*>(job.partial);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  V sum[1] = {V(0)};
  if (column < job.columns) {
    for (int64_t row = threadIdx.y; row < job.rows; row += blockDim.y)
      sum[0] = sum[0] + V(partial[row * job.row_stride + column]);
  }
  sum_columns(sum);
  if (threadIdx.y == 0 && column < job.columns) static_cast<M*>(job.db)[column] = narrow<M>(sum[0]);
}

cudaError_t add_sums(const Sums& job, cudaStream_t stream) {
  return launch(add_sums_kernel, dim3(ceil_div(job.columns, 8)), dim3(8, threads / 8), stream, job);
}

template <class F> cudaError_t rows(const F& f, const RowsJob& job, cudaStream_t stream) {
  const int64_t width = job.pieces * job.columns;
  if (width == 0) return cudaSuccess;
  const RowTiles tiles(sizeof(M), job.rows, job.columns);
  const bool wide = job.g.column_stride == 1 && job.saved.column_stride == 1 &&
                    job.g.row_stride % values == 0 && job.saved.row_stride % values == 0 &&
                    job.columns % values == 0 && aligned<M>(job.g.data) &&
                    aligned<typename F::Saved>(job.saved.data) && aligned<M>(job.dz);
  if (tiles.chunks > 0) {
    const dim3 grid(tiles.tiles * job.pieces, tiles.chunks), block(tiles.across, tiles.deep);
    const cudaError_t error = launch(rows_kernel<F>, grid, block, stream, f, job, tiles.chunk_rows, wide);
    if (error != cudaSuccess || tiles.chunks == 1) return error;
  }
  return add_sums({tiles.chunks, width, width, job.partial, job.db}, stream);
}

template <class A, bool from_output>
cudaError_t backward_rows(const double* params, const RowsJob& job, cudaStream_t stream) {
  return rows(Backward<A, from_output>{with_params<A>(params)}, job, stream);
}
template <class Index> cudaError_t maxout_rows(const double*, const RowsJob& job, cudaStream_t stream) {
  return rows(Winner<Index>(), job, stream);
}

// n neighbouring outputs, whose first piece lies at `from`.
template <int n, class Index>
__device__ __forceinline__ void largest(const Maxout& job, int64_t from, int64_t to) {
  const M* x = static_cast<const M*>(job.x) + from;
  M best[n], piece[n];
  Index winner[n] = {};
  read<n>(x, best);
#pragma unroll 2
  for (int64_t k = 1; k < job.pieces; ++k) {
    read<n>(x + k * job.inner, piece);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (wins(widen(piece[j]), widen(best[j])).bits) best[j] = piece[j], winner[j] = static_cast<Index>(k);
    }
  }
  write<n>(best, static_cast<M*>(job.y) + to);
  if (job.index) write<n>(winner, static_cast<Index*>(job.index) + to);
}
template <int n, class Index>
__device__ __forceinline__ void scatter(const MaxoutBackward& job, int64_t to, int64_t from) {
  M g[n], dx[n];
  Index winner[n];
  read<n>(static_cast<const M*>(job.g) + from, g);
  read<n>(static_cast<const Index*>(job.index) + from, winner);
  for (int64_t k = 0; k < job.pieces; ++k) {
#pragma unroll
    for (int j = 0; j < n; ++j) dx[j] = winner[j] == k ? g[j] : M{};
    write<n>(dx, static_cast<M*>(job.dx) + k * job.inner + to);
  }
}

// Calls run(where the first piece lies, i) for each output i of this thread, or for every `values`-th.
template <class Job, class Run>
__device__ __forceinline__ void for_outputs(const Job& job, int step, Run run) {
  const int64_t n = job.outer * job.inner, first = static_cast<int64_t>(blockIdx.x) * threads * values;
#pragma unroll 1
  for (int64_t i = first + threadIdx.x * step; i < min(n, first + threads * values); i += threads * step)
    run(i + (job.pieces - 1) * job.inner * quotient(i, job.inner), i);
}

template <class Index> __global__ void __launch_bounds__(threads)
    maxout_forward_kernel(const __grid_constant__ Maxout job, const bool wide) {
  if (wide) for_outputs(job, values, [&](int64_t x, int64_t y) { largest<values, Index>(job, x, y); });
  else for_outputs(job, 1, [&](int64_t x, int64_t y) { largest<1, Index>(job, x, y); });
}
template <class Index> __global__ void __launch_bounds__(threads)
    maxout_backward_kernel(const __grid_constant__ MaxoutBackward job, const bool wide) {
  if (wide) for_outputs(job, values, [&](int64_t x, int64_t y) { scatter<values, Index>(job, x, y); });
  else for_outputs(job, 1, [&](int64_t x, int64_t y) { scatter<1, Index>(job, x, y); });
}

template <class Index> cudaError_t maxout_forward(const Maxout& job, cudaStream_t stream) {
  const int64_t n = job.outer * job.inner;
  if (n == 0) return cudaSuccess;
  const bool wide =
      job.inner % values == 0 && aligned<M>(job.x) && aligned<M>(job.y) && aligned<Index>(job.index);
  return launch(maxout_forward_kernel<Index>, static_cast<unsigned>(ceil_div(n, threads * values)), threads,
                stream, job, wide);
}
template <class Index> cudaError_t maxout_backward(const MaxoutBackward& job, cudaStream_t stream) {
  const int64_t n = job.outer * job.inner;
  if (n == 0) return cudaSuccess;
  const bool wide =
      job.inner % values == 0 && aligned<M>(job.g) && aligned<Index>(job.index) && aligned<M>(job.dx);
  return launch(maxout_backward_kernel<Index>, static_cast<unsigned>(ceil_div(n, threads * values)), threads,
                stream, job, wide);
}

template <class A> constexpr ActivationKernels activation_kernels() {
  ActivationKernels kernels{forward<A>, backward<A, false>, nullptr, backward_rows<A, false>, nullptr};
  if constexpr (HasDerivativeFromOutput<A>) {
    kernels.backward_from_output = backward<A, true>;
    kernels.backward_rows_from_output = backward_rows<A, true>;
  }
  return kernels;
}
template <class... A>
constexpr std::array<ActivationKernels, sizeof...(A)> all_activation_kernels(std::tuple<A...>*) {
  return {activation_kernels<A>()...};
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA

namespace mlpext::cuda {

constinit const Kernels MLPEXT_TABLE{
    MLPEXT_ISA::all_activation_kernels(static_cast<Activations*>(nullptr)),
    {MLPEXT_ISA::maxout_forward<uint8_t>, MLPEXT_ISA::maxout_forward<int32_t>},
    {MLPEXT_ISA::maxout_backward<uint8_t>, MLPEXT_ISA::maxout_backward<int32_t>},
    {MLPEXT_ISA::maxout_rows<uint8_t>, MLPEXT_ISA::maxout_rows<int32_t>},
    MLPEXT_ISA::add_sums,
};

}  // namespace mlpext::cuda
