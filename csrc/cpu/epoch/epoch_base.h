// What both kinds of epoch share: scratch memory, the way through the samples (rows brought in block by
// block, gathered in the epoch's order), progress, and the losses with their gradients dE/dy. To add a loss:
// its name in job.h, its value and gradient here, beside squared_error and cross_entropy
// (docs/adding-a-loss.md).
#pragma once
#include "cpu/epoch/job.h"
#include "cpu/epoch/panels.h"
#include "cpu/kernels.h"
#include "formulas/elementary.h"
#include "formulas/simd_memory.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace mlpext::MLPEXT_ISA {

extern const cpu::Kernels kernels;

namespace {

using cpu::EpochJob;
using cpu::EpochLayer;
using cpu::EpochReport;
using cpu::Loss;
using cpu::SampleRows;
using cpu::UpdateRule;

template <class T> constexpr Dtype dtype = sizeof(T) == 4 ? float32 : float64;

// Hands out aligned pieces of the caller's scratch memory; without memory it only counts them.
// AddressSanitizer is told of their ends: it knows only the whole.
struct Arena {
  char* memory;
  int64_t used = 0;
  template <class T> T* take(int64_t n) {
    T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    int64_t room = (bytes + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
    room += 64;
    if (memory) __asan_poison_memory_region(memory + used + bytes, room - bytes);
#endif
    used += room;
    return piece;
  }
};

template <class T> class EpochBase {
 protected:
  using V = Lanes<T>;

  explicit EpochBase(const EpochJob& job)
      : job(job), count(job.layer_count), in(job.layers[0].in), outputs(job.layers[count - 1].out) {}

  // Reports progress now and then. False: stop.
  bool proceed() {
    if (job.poll && done - polled >= 16) {
      if (!job.poll(job.context, done, epoch_error)) return !(report.stopped = true);
      polled = done;
    }
    return true;
  }

  // How many of the next n >= 1 samples can be taken at once: those of one block, where the rows come in
  // blocks of block_size (the next one is fetched when all of this one are done). 0: stop.
  int64_t bring(int64_t n) {
    if (!job.fetch) {
      block = job.rows;
      block_count = job.samples;
    } else if (done == block_first + block_count) {
      block_first = done;
      block_count = job.samples - done < job.block_size ? job.samples - done : job.block_size;
      report.stopped = !job.fetch(job.context, block_first, block_count, &block);
      if (report.stopped) return 0;
    }
    const int64_t left = block_first + block_count - done;
    return n < left ? n : left;
  }

  int64_t row_of(int64_t i) const { return block.order ? block.order[i - block_first] : i - block_first; }

  // The next input, or null at the end of a block.
  const T* next_input() const {
    const bool here = done < job.samples && done < block_first + block_count;
    return here ? static_cast<const T*>(block.x) + row_of(done) * in : nullptr;
  }

  // The next n inputs, as rows `x_row` apart.
  void gather(int64_t n, T* x, int64_t x_row) const {
    for (int64_t r = 0; r < n; ++r)
      std::memcpy(x + r * x_row, static_cast<const T*>(block.x) + row_of(done + r) * in, in * sizeof(T));
  }

  // Of the next n samples, from rows of y and of dE/dy that lie `stride` apart: dE/dy, and the sum of E.
  double loss(int64_t n, T scale, const T* y, T* dy, int64_t stride) {
    double total = 0;
    for (int64_t r = 0; r < n; ++r, y += stride, dy += stride) {
      const int64_t row = row_of(done + r);
      const T* d = block.classes ? nullptr : static_cast<const T*>(block.d) + row * outputs;
      const int64_t target = block.classes ? block.classes[row] : 0;
      total += job.loss == Loss::squared_error ? squared_error(y, d, target, dy, scale)
                                               : cross_entropy(y, d, target, dy, scale);
      if (job.outputs)
        std::memcpy(static_cast<T*>(job.outputs) + (done + r - block_first) * outputs, y,
                    outputs * sizeof(T));
    }
    epoch_error += total;
    return total;
  }

  // Sum of f(i, lanes) over the registers of a row of outputs, f given how many lanes count.
  template <class F> MLPEXT_INLINE void along(F f) const {
    for (int64_t i = 0; i < outputs; i += V::size)
      f(i, static_cast<int>(outputs - i < V::size ? outputs - i : V::size));
  }
  static MLPEXT_INLINE T sum_of(V v) {
    T sum = 0;
    for (int i = 0; i < V::size; ++i) sum += v.v[i];
    return sum;
  }

  // E = 1/2 ||y - d||^2, dE/dy = y - d; a class number stands for its one-hot d.
  double squared_error(const T* y, const T* d, int64_t target, T* dy, T scale) const {
    V squares(0);
    along([&](int64_t i, int n) __attribute__((always_inline)) {
      V e = load_partial<V>(y + i, n);
      if (d) e = e - load_partial<V>(d + i, n);
      else if (target >= i && target < i + n) e.v[target - i] -= 1;
      squares = madd(e, e, squares);
      store_partial(dy + i, broadcast(scale) * e, n);
    });
    return 0.5 * sum_of(squares);
  }

  // E = -sum d log softmax(y), with d of sum s: dE/dy = s softmax(y) - d.
  double cross_entropy(const T* y, const T* d, int64_t target, T* dy, T scale) const {
    // exp(y - largest) cannot overflow; a NaN anywhere becomes the largest, and so the loss.
    T largest = y[0];
    for (int64_t i = 1; i < outputs; ++i) largest = y[i] > largest || y[i] != y[i] ? y[i] : largest;
    V sum(0), weighed(0), weights(0);
    along([&](int64_t i, int n) __attribute__((always_inline)) {
      const V shifted = load_partial<V>(y + i, n) - broadcast(largest);
      V power = exp(shifted);
      for (int j = n; j < V::size; ++j) power.v[j] = 0;
      sum = sum + power;
      store_partial(dy + i, power, n);
      if (!d) return;
      const V wanted = load_partial<V>(d + i, n);
      weights = weights + wanted;
      weighed = madd(wanted, shifted, weighed);
    });
    const T s = d ? sum_of(weights) : 1, powers = sum_of(sum);
    along([&](int64_t i, int n) __attribute__((always_inline)) {
      const V softmax = load_partial<V>(dy + i, n) / broadcast(powers);
      V slope = broadcast(s) * softmax;
      if (d) slope = slope - load_partial<V>(d + i, n);
      else if (target >= i && target < i + n) slope.v[target - i] -= 1;
      store_partial(dy + i, broadcast(scale) * slope, n);
    });
    const T mean = d ? sum_of(weighed) : y[target] - largest;
    return s * std::log(powers) - mean;
  }

  const EpochJob& job;
  const int64_t count, in, outputs;  // layers; the width of x and of y
  SampleRows block;
  int64_t block_first = 0, block_count = 0;
  int64_t done = 0, polled = 0;
  double epoch_error = 0;  // sum of E
  EpochReport report;
};

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
