// Gradient descent in steps of several samples, compiled once an instruction set.
//
// A step takes its samples, x (rows, in), through the layers in chunks that stay in the cache: forward z = x
// W' + b, y = f(z) layer by layer, the loss, then backward dz = dy f', dW = dz' x, dx = dz W. Where a step is
// one chunk under plain descent, W -= eta dW is part of the product that makes dW (`fused`), which then is
// never stored. At batch size 1 no weight is transposed: dx comes of dot products with the rows as they lie.
//
// The gradient of a step is g = share (dW + l2 W), with share 1, or for a mean 1 over the samples' weights.
// dE/dy has that factor already, but where samples have weights and the step several chunks: what those to
// come weigh is not known, and dW is multiplied at the end. Where the norm of g is bounded, dW is stored,
// since no weight can be moved before the last of g is known.
#pragma once
#include "cpu/epoch/panel_layer.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// Steps of any number of samples, under any rule.
template <class T> class Minibatches : EpochBase<T> {
  using EpochBase<T>::job, EpochBase<T>::count, EpochBase<T>::done, EpochBase<T>::report;

 public:
  Minibatches(const EpochJob& job, Arena& arena) : EpochBase<T>(job) {
    steps = (job.samples + job.step_size - 1) / job.step_size;
    const int64_t step = job.step_size < job.samples ? job.step_size : job.samples;
    const int64_t chunks = (step + chunk_rows - 1) / chunk_rows;
    rows = (step + chunks - 1) / chunks;
    // A step's samples in chunks of nearly equal size: 100 are two chunks of 50, not 96 and 4.
    // The update is part of the gradient's product where one chunk is a step, and needs nothing but dE/dW. (A
    // block smaller than a step cuts the step into chunks of its own.)
    const UpdateRule& rule = job.rule;
    one_chunk = chunks == 1 && job.block_size >= step;
    const bool clips = rule.clip_norm != 0;
    fused = one_chunk && rule.kind == UpdateRule::descent && rule.momentum == 0 && !clips;
    single = rows == 1 && !clips;
    const int states = rule.kind != UpdateRule::descent ? 2 : rule.momentum != 0 ? 1 : 0;
    layers = arena.take<PanelLayer<T>>(count);
    bool needs_dx = false;
    for (int64_t l = 0; l < count; ++l) {
      const PanelLayer<T> layer(job.layers[l], rows, needs_dx, one_chunk, !fused && !single, states, arena);
      if (layers) layers[l] = layer;
      needs_dx |= layer.trained;
    }
    x_row = padded<T>(job.layers[0].in);
    x = arena.take<T>(rows * x_row);
  }

  EpochReport run() {
    // Weights live in panels for the epoch, and come back at its end, also where it stops early: no step is
    // half made then.
    for (int64_t l = 0; l < count; ++l) layers[l].read_parameters();
    for (int64_t step = 0; step < steps && !report.stopped; ++step) {
      const int64_t left = job.samples - step * job.step_size;
      const int64_t size = left < job.step_size ? left : job.step_size;
      if (!take_step(size)) break;
      job.losses[step] = this->mean(error, weight);
      ++report.steps;
      if (!std::isfinite(job.losses[step])) break;
    }
    for (int64_t l = 0; l < count; ++l) layers[l].write_parameters();
    return report;
  }

 private:
  // One update from `size` samples. False, and no update made: the epoch was stopped between two chunks.
  bool take_step(int64_t size) {
    error = weight = 0;
    for (int64_t l = 0; l < count; ++l) {
      if (layers[l].transposed.data) layers[l].transpose_weight();
      if (job.rule.l2 != 0) error += 0.5 * job.rule.l2 * layers[l].squared_weights();
    }
    for (int64_t first = 0; first < size;) {
      const int64_t left = size - first, chunks = (left + rows - 1) / rows;
      const int64_t n = this->proceed() ? this->bring(left / chunks) : 0;
      if (n == 0) return false;
      forward(n);
      const PanelLayer<T>& last = layers[count - 1];
      weight += this->weight_of_next(n);
      const double scale =
          divides_last() ? 1 : this->share(this->block.weights ? weight : static_cast<double>(size));
      error += this->loss(n, scale, last.y, last.dy, last.outputs);
      done += n;
      backward(n, first == 0, first + n == size);
      first += n;
    }
    return true;
  }

  // The next n rows of x through all layers; each leaves z (where f' needs it) and y for the way back.
  void forward(int64_t n) {
    this->gather(n, x, x_row);
    const T* input = x;
    int64_t input_row = x_row;
    for (int64_t l = 0; l < count; ++l) {
      if (l > 0 || !z_made) layers[l].forward(n, input, input_row);
      z_made = false;
      layers[l].activate(0, n, done);
      input = layers[l].y;
      input_row = layers[l].outputs;
    }
  }

  // From dE/dy of the last layer down to the lowest that is trained: dz, then dx for the layer below while W
  // is still the one that made y, then dE/dW: added to the step's, or with the last chunk used to move W.
  void backward(int64_t n, bool first_chunk, bool last_chunk) {
    const UpdateRule& rule = job.rule;
    const int64_t number = rule.steps + report.steps + 1;
    const double share = this->share(weight), factor = divides_last() ? share : 1, l2 = rule.l2 * share;
    for (int64_t l = count - 1; l >= 0; --l) {
      const PanelLayer<T>& layer = layers[l];
      layer.activate_backward(0, n);
      if (layer.transposed.data) layer.input_gradient(n, layers[l - 1].dy, layers[l - 1].outputs);
      else if (layer.needs_dx) layer.input_gradient(layers[l - 1].dy);
      const T* input = l ? layers[l - 1].y : x;
      const int64_t input_row = l ? layers[l - 1].outputs : x_row;
      if (!layer.trained) {
      } else if (fused) {
        layer.weight_gradient(n, input, input_row, layer.weight, T(-rule.lr),
                              T(1 - rule.lr * (rule.weight_decay + l2)), T(1 - rule.lr * rule.weight_decay));
      } else if (single) {
        const T* next = l == 0 ? this->next_input() : nullptr;
        z_made = next != nullptr;
        layer.update(rule, number, T(l2), input, next);
      } else {
        const T kept = first_chunk ? T(0) : T(1);
        layer.weight_gradient(n, input, input_row, layer.gradient, 1, kept, kept);
        if (last_chunk && rule.clip_norm == 0) layer.update(rule, number, T(factor), T(l2));
      }
      if (!layer.needs_dx) break;
    }
    if (last_chunk && rule.clip_norm != 0) update_clipped(number, factor, l2);
  }

  // As torch.nn.utils.clip_grad_norm_, then the optimizer's step.
  void update_clipped(int64_t number, double factor, double l2) {
    double squares = 0;
    for (int64_t l = 0; l < count; ++l)
      if (layers[l].trained) squares += layers[l].squared_gradient(T(factor), T(l2));
    const double ratio = job.rule.clip_norm / (std::sqrt(squares) + 1e-6), kept = ratio > 1 ? 1 : ratio;
    for (int64_t l = 0; l < count; ++l)
      if (layers[l].trained) layers[l].update(job.rule, number, T(kept * factor), T(kept * l2));
  }

  bool divides_last() const { return this->block.weights && !one_chunk; }

  int64_t steps, rows, x_row;
  bool one_chunk;       // a step is one chunk
  bool fused, single;   // whether dW is never stored: by the product, or by the update of one sample
  bool z_made = false;  // of the first layer, of the next sample
  PanelLayer<T>* layers;
  T* x;
  // Of the step under way: the sum of E, with l2/2 ||W||^2, and that of the samples' weights.
  double error = 0, weight = 0;
};

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
