// What both kinds of epoch share: scratch memory, the way through the samples (rows brought in block by
// block, gathered in the epoch's order), progress, and the loss of a row of outputs, by the formulas of
// formulas/losses.h.
#pragma once
#include "cpu/epoch/job.h"
#include "cpu/epoch/panels.h"
#include "cpu/kernels.h"
#include "formulas/elementary.h"
#include "formulas/losses.h"
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

// What a loss sees of a sample: its outputs y, and d or a class number, which stands for d with a 1 in that
// place; and where dE/dy goes. y, d and slope are the register of them that begins at i, n of whose lanes
// count.
template <class T> struct LossRow {
  using V = Lanes<T>;
  const T *outputs, *targets;  // targets null: `target` is the class
  int64_t target, count;       // count: of the outputs
  T* slopes;
  V scale;  // what dE/dy is to be multiplied by

  MLPEXT_INLINE V y(int64_t i, int n) const { return load_partial<V>(outputs + i, n); }
  MLPEXT_INLINE V d(int64_t i, int n) const {
    if (targets) return load_partial<V>(targets + i, n);
    return select(numbers() == V(static_cast<double>(target - i)), V(1), V(0));
  }
  MLPEXT_INLINE V slope(int64_t i, int n) const { return load_partial<V>(slopes + i, n); }
  MLPEXT_INLINE void store_slope(int64_t i, int n, V dy) const { store_partial(slopes + i, dy, n); }

  // Calls f(i, n) for each register of the row.
  template <class F> MLPEXT_INLINE void along(F f) const {
    for (int64_t i = 0; i < count; i += V::size)
      f(i, static_cast<int>(count - i < V::size ? count - i : V::size));
  }
  // Calls f(y, d, E) for each register; returns the sum over the lanes of E, to which f adds.
  template <class F> MLPEXT_INLINE T sum(F f) const {
    V all(0);
    along([&](int64_t i, int n) MLPEXT_LAMBDA {
      V E = all;
      store_slope(i, n, scale * f(y(i, n), d(i, n), E));
      all = first(n, E, all);
    });
    return total(all);
  }
  static MLPEXT_INLINE T total(V v) {
    T sum = 0;
    for (int i = 0; i < V::size; ++i) sum += v.v[i];
    return sum;
  }
  // The first n lanes of a, then those of b.
  static MLPEXT_INLINE V first(int n, V a, V b) { return select(numbers() < V(n), a, b); }
  static MLPEXT_INLINE V numbers() {  // 0, 1, 2, ...
    return []<int... i>(std::integer_sequence<int, i...>) MLPEXT_LAMBDA {
      return V(typename V::Register{T(i)...});
    }(std::make_integer_sequence<int, V::size>());
  }
};

// Calls run(loss) with the loss of that place in the list.
template <class Run> void with_loss(std::size_t place, Run run) {
  [&]<class... Loss>(std::tuple<Loss...>*) {
    std::size_t i = 0;
    ((i++ == place ? run(Loss()) : void()), ...);
  }(static_cast<Losses*>(nullptr));
}

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

  double weight_of(int64_t row) const {
    return block.weights ? static_cast<const T*>(block.weights)[row] : 1;
  }
  // The sum of the weights of the next n samples, which are of one block.
  double weight_of_next(int64_t n) const {
    if (!block.weights) return static_cast<double>(n);
    double sum = 0;
    for (int64_t r = 0; r < n; ++r) sum += weight_of(row_of(done + r));
    return sum;
  }
  // A mean over samples that weigh so much together; 0 where they all weigh nothing. Of one that weighs 1
  // without a division: three of them took 2 % of a step at 64-100-10.
  static double mean(double sum, double weight) { return weight == 1 ? sum : weight > 0 ? sum / weight : 0; }
  // What a step of such samples multiplies the gradient of the sum by.
  double share(double weight) const { return job.mean ? mean(1, weight) : 1; }

  // Of the next n samples, from rows of y and of dE/dy that lie `stride` apart: dE/dy times `scale` and the
  // sample's weight, and the weighted sum of E.
  double loss(int64_t n, double scale, const T* y, T* dy, int64_t stride) {
    double total = 0, weights = 0;
    with_loss(job.loss, [&](auto formula) {
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = row_of(done + r);
        const double weight = weight_of(row);
        weights += weight;
        total += weight *
                 formula.error(LossRow<T>{
                     y + r * stride, block.classes ? nullptr : static_cast<const T*>(block.d) + row * outputs,
                     block.classes ? block.classes[row] : 0, outputs, dy + r * stride, V(scale * weight)});
      }
    });
    for (int64_t r = 0; r < n && job.outputs; ++r)
      std::memcpy(static_cast<T*>(job.outputs) + (done + r - block_first) * outputs, y + r * stride,
                  outputs * sizeof(T));
    epoch_error += static_cast<double>(n) * mean(total, weights);
    return total;
  }

  const EpochJob& job;
  const int64_t count, in, outputs;  // layers; the width of x and of y
  SampleRows block;
  int64_t block_first = 0, block_count = 0;
  int64_t done = 0, polled = 0;
  double epoch_error = 0;  // samples done times their mean E
  EpochReport report;
};

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
