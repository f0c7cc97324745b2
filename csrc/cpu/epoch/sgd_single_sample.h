// Gradient descent one sample at a time, compiled once an instruction set: every weight is read twice and
// written once a sample, or less.
//
// Behind the first layer the forward product takes dot products with the rows of W, and one pass over W then
// makes dx and moves W. The first layer's inputs are known beforehand, so it takes a block of samples at a
// time: sample i of a block that begins with W needs
//
//   W_i x_i = s^i W x_i - eta sum over j < i of s^(i-1-j) (x_j . x_i) dz_j,    s = 1 - eta weight_decay
//
// where W x_i is a product of the whole block, and the block's dz move W in one product at its end. Nothing
// but rounding differs from step after step.
#pragma once
#include "cpu/epoch/panel_layer.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// At 16 the corrections add 1/16 to the first layer's work, and its weights leave the cache once in 16
// samples.
constexpr int64_t sgd_block = 16;

// A layer behind the first, its weights in rows as torch has them, a multiple of the lanes apart.
template <class T> struct SgdLayer : Values<T> {
  using V = Lanes<T>;
  using Values<T>::job, Values<T>::in, Values<T>::columns, Values<T>::dz;

  int64_t stride;
  T *weight, *bias;

  SgdLayer(const EpochLayer& layer, Arena& arena)
      : Values<T>(layer, 1, layer.out, arena), stride(padded<T>(in)) {
    weight = arena.take<T>(columns * stride);
    bias = arena.take<T>(padded<T>(columns));
  }

  void read_parameters() {
    const T* own = static_cast<const T*>(job->weight.value);
    for (int64_t i = 0; i < columns; ++i) std::memcpy(weight + i * stride, own + i * in, in * sizeof(T));
    if (job->bias.value) std::memcpy(bias, job->bias.value, columns * sizeof(T));
  }
  void write_parameters() const {
    T* own = static_cast<T*>(job->weight.value);
    for (int64_t i = 0; i < columns && job->weight.trained; ++i)
      std::memcpy(own + i * in, weight + i * stride, in * sizeof(T));
    if (job->bias.trained) std::memcpy(job->bias.value, bias, columns * sizeof(T));
  }

  void forward(const T* x, int64_t sample) const {
    gemm_few_rows<T>(x, 0, weight, stride, bias, this->z, 0, 1, columns, in);
    this->activate(0, 1, sample);
  }

  // dx = dz W, then W = decay W + rate dz x', in one pass; and the same of the bias.
  void backward(const T* x, T* dx, T rate, T decay) const {
    if (!job->weight.trained) pass<false, false>(x, dx, rate, decay);
    else if (decay == 1) pass<true, false>(x, dx, rate, decay);
    else pass<true, true>(x, dx, rate, decay);
    if (job->bias.trained)
      for (int64_t i = 0; i < columns; i += V::size)
        store(bias + i, madd(broadcast(rate), load<V>(dz + i), broadcast(decay) * load<V>(bias + i)));
  }

 private:
  // By blocks of columns: their share of dx and of x stays in registers.
  template <bool moves, bool decays> void pass(const T* x, T* dx, T rate, T decay) const {
    // Members could change with any store, for all that the compiler knows.
    T *const own = weight, *const slopes = dz;
    const int64_t n = columns, row_stride = stride;
    auto block = [&]<int registers>(int64_t first, std::integral_constant<int, registers>, auto load_some,
                                    auto store_some) MLPEXT_LAMBDA {
      V sum[registers], change[registers];
#pragma GCC unroll 8
      for (int v = 0; v < registers; ++v) {
        sum[v] = V(0);
        change[v] = broadcast(rate) * load_some(x + first + v * V::size);
      }
      T* row = own + first;
      for (int64_t i = 0; i < n; ++i, row += row_stride) {
        const V slope = broadcast(slopes[i]);
        V w[registers];
#pragma GCC unroll 8
        for (int v = 0; v < registers; ++v) {
          w[v] = load_some(row + v * V::size);
          sum[v] = madd(slope, w[v], sum[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < registers && moves; ++v) {
          if (decays) w[v] = broadcast(decay) * w[v];
          store_some(row + v * V::size, madd(slope, change[v], w[v]));
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < registers; ++v) store_some(dx + first + v * V::size, sum[v]);
    };
    auto whole = [&](int64_t v, auto registers) MLPEXT_LAMBDA {
      block(
          v * V::size, registers, [](const T* p) MLPEXT_LAMBDA { return load<V>(p); },
          [](T* p, V w) MLPEXT_LAMBDA { store(p, w); });
    };
    if constexpr (vector_registers == 32) in_steps<8, 4, 2, 1>(0, in / V::size, whole);
    else in_steps<4, 2, 1>(0, in / V::size, whole);
    const int left = static_cast<int>(in % V::size);
    if (left > 0)
      block(
          in - left, std::integral_constant<int, 1>(),
          [&](const T* p) MLPEXT_LAMBDA { return load_partial<V>(p, left); },
          [&](T* p, V w) MLPEXT_LAMBDA { store_partial(p, w, left); });
  }
};

template <class T> class SingleSampleSgd : EpochBase<T> {
  using EpochBase<T>::job, EpochBase<T>::count, EpochBase<T>::in, EpochBase<T>::done, EpochBase<T>::report;

 public:
  static bool serves(const EpochJob& job) {
    return job.step_size == 1 && job.rule.kind == UpdateRule::descent && job.rule.momentum == 0 &&
           job.rule.l2 == 0 && job.rule.clip_norm == 0;
  }

  SingleSampleSgd(const EpochJob& job, Arena& arena)
      : EpochBase<T>(job),
        rate(static_cast<T>(-job.rule.lr)),
        decay(static_cast<T>(1 - job.rule.lr * job.rule.weight_decay)),
        first(job.layers[0], sgd_block, /*needs_dx=*/false, /*one_chunk=*/true, /*stores_gradient=*/false,
              /*states=*/0, arena) {
    // Where only one of weight and bias decays, their sum cannot.
    const auto& [weight, bias] = std::tie(job.layers[0].weight, job.layers[0].bias);
    most = decay == 1 || !bias.value || weight.trained == bias.trained ? sgd_block : 1;
    x_row = padded<T>(in);
    x = arena.take<T>(sgd_block * x_row);
    gram = arena.take<T>(sgd_block * sgd_block);
    layers = arena.take<SgdLayer<T>>(count);
    lowest_trained = count;
    for (int64_t l = count - 1; l >= 0; --l)
      if (job.layers[l].weight.trained || job.layers[l].bias.trained) lowest_trained = l;
    for (int64_t l = 1; l < count; ++l) {
      const SgdLayer<T> layer(job.layers[l], arena);
      if (arena.memory) layers[l] = layer;
    }
  }

  EpochReport run() {
    first.read_parameters();
    for (int64_t l = 1; l < count; ++l) layers[l].read_parameters();
    while (done < job.samples && this->bring(1) && take_block()) {
    }
    first.write_parameters();
    for (int64_t l = 1; l < count; ++l) layers[l].write_parameters();
    return report;
  }

 private:
  // False: stop.
  bool take_block() {
    const int64_t left = this->block_first + this->block_count - done, size = left < most ? left : most;
    this->gather(size, x, x_row);
    first.forward(size, x, x_row);
    gemm_few_rows<T>(x, x_row, x, x_row, nullptr, gram, sgd_block, size, size, in);
    int64_t i = 0;
    bool goes_on = true;
    while (goes_on && i < size && (goes_on = this->proceed())) {
      goes_on = take_sample(i);
      ++i;
    }
    if (i > 0 && first.trained) finish_block(i);
    return goes_on;
  }

  bool take_sample(int64_t i) {
    if (i > 0 && first.trained) correct(i);
    first.activate(i, 1, done);
    const T* y = first.y + i * first.outputs;
    T* dy = first.dy + i * first.outputs;
    for (int64_t l = 1; l < count; ++l) {
      layers[l].forward(y, done);
      y = layers[l].y;
      dy = layers[l].dy;
    }
    const double weight = this->weight_of_next(1), error = this->loss(1, this->share(weight), y, dy, 0);
    for (int64_t l = count - 1; l > 0 && l >= lowest_trained; --l) {
      layers[l].activate_backward(0, 1);
      const bool second = l == 1;
      layers[l].backward(second ? first.y + i * first.outputs : layers[l - 1].y,
                         second ? first.dy + i * first.outputs : layers[l - 1].dy, rate, decay);
    }
    if (lowest_trained == 0) first.activate_backward(i, 1);
    ++done;
    job.losses[report.steps] = this->mean(error, weight);
    return std::isfinite(job.losses[report.steps++]);
  }

  // z of sample i of the block, after the steps of those before it.
  void correct(int64_t i) {
    T factors[sgd_block];
    T power = 1;  // of the decay
    for (int64_t j = i; j-- > 0; power *= decay)
      factors[j] = power * (first.job->weight.trained * gram[i * sgd_block + j] + first.job->bias.trained);
    for (int64_t p = 0; p < first.weight.count(); ++p) {
      T* z = first.z + i * first.columns + p * panel_width<T>;
      panel_gemm<T>(1, first.weight.width(p), i, factors, first.dz + p * panel_width<T>, z, z, rate, power,
                    {0, 1, first.columns, 0, 0});
    }
  }

  // Moves the first layer by the n samples done.
  void finish_block(int64_t n) {
    T power = 1;
    for (int64_t j = n; decay != 1 && j-- > 0; power *= decay)
      for (int64_t c = 0; c < first.columns; ++c) first.dz[j * first.columns + c] *= power;
    first.weight_gradient(n, x, x_row, first.weight, rate, power, power);
  }

  T rate, decay;
  PanelLayer<T> first;
  int64_t most;  // samples of a block
  int64_t x_row;
  T *x, *gram;
  SgdLayer<T>* layers;     // layers[0] is empty: that one is `first`
  int64_t lowest_trained;  // the first layer, counted from the input, that is
};

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
