// Gradient descent in steps of several samples, compiled once an instruction set.
//
// A step takes its samples, x (rows, in), through the layers in chunks that stay in the cache: forward z = x
// W' + b, y = f(z) layer by layer, the loss, then backward dz = dy f', dW = dz' x, dx = dz W. Where a step is
// one chunk under plain descent, W -= eta dW is part of the product that makes dW (`fused`), which then is
// never stored. At batch size 1 no weight is transposed: dx comes of dot products with the rows as they lie.
#pragma once
#include "cpu/epoch/epoch_base.h"
#include "formulas/activation_info.h"

namespace mlpext::MLPEXT_ISA {
namespace {

// Rows taken at once: at 784-256-128-10, 96 rows and the weights share a 1 MiB L2 (192 spill: 8 % slower).
constexpr int64_t chunk_rows = 96;

// What a layer makes of a chunk of rows, and how its activation goes. `outputs` of them are kept a row: out,
// perhaps padded.
template <class T> struct Values {
  const EpochLayer* job;
  const cpu::ActivationKernels* activation;
  int64_t in, out, outputs, columns;  // `columns`: of z, `outputs` of each piece
  bool identity, keeps_z, trained;
  T *z, *y, *dz, *dy;  // (rows, columns) and (rows, outputs)
  int32_t* winner;     // (rows, outputs), of maxout

  Values(const EpochLayer& layer, int64_t rows, int64_t outputs, Arena& arena)
      : job(&layer),
        activation(&kernels.activations[layer.activation]),
        in(layer.in),
        out(layer.out),
        outputs(outputs),
        columns(outputs * (layer.pieces ? layer.pieces : 1)),
        identity(!layer.pieces && layer.activation == index_of<Identity>),
        keeps_z(layer.pieces || !layer.output_suffices),
        trained(layer.weight.trained || layer.bias.trained) {
    y = arena.take<T>(rows * padded<T>(outputs));
    z = keeps_z ? arena.take<T>(rows * padded<T>(columns)) : y;
    dy = arena.take<T>(rows * padded<T>(outputs));
    dz = layer.pieces ? arena.take<T>(rows * padded<T>(columns)) : dy;
    winner = layer.pieces ? arena.take<int32_t>(rows * outputs) : nullptr;
  }

  // y = f(z), or the largest piece and its number, for `rows` rows from row `first` on. Rows lie dense, so
  // that an activation is one run over all of them.
  void activate(int64_t first, int64_t rows) const {
    T *z = this->z + first * columns, *y = this->y + first * outputs;
    if (job->pieces) {
      for (int64_t r = 0; r < rows; ++r)
        kernels.maxout_forward[1][dtype<T>](z + r * columns, y + r * outputs, winner + (first + r) * outputs,
                                            job->pieces, outputs, outputs);
    } else if (!identity) activation->forward[dtype<T>](job->params, z, y, rows * columns);
    else if (keeps_z) std::memcpy(y, z, rows * columns * sizeof(T));
  }
  // dz = dy f'; of a maxout dz has the columns of all pieces, and is 0 but for those that have won.
  void activate_backward(int64_t first, int64_t rows) const {
    const T *z = this->z + first * columns, *dy = this->dy + first * outputs;
    T* dz = this->dz + first * columns;
    if (job->pieces) {
      for (int64_t r = 0; r < rows; ++r)
        kernels.maxout_backward[1][dtype<T>](dy + r * outputs, winner + (first + r) * outputs,
                                             dz + r * columns, job->pieces, outputs, outputs);
    } else if (!identity)
      (keeps_z ? activation->backward : activation->backward_from_output)[dtype<T>](job->params, dy, z, dz,
                                                                                    rows * columns);
  }
};

// A layer's weights as panels with the bias as last row. Lanes of padding hold 0 in weights and gradients.
template <class T> struct PanelLayer : Values<T> {
  using V = Lanes<T>;
  using Values<T>::job, Values<T>::in, Values<T>::out, Values<T>::outputs, Values<T>::columns;
  using Values<T>::z, Values<T>::dz;

  bool needs_dx;  // whether a layer below is trained
  // W' with the bias as row `in`, and of the same layout dE/dW and the optimizer's buffers; W, for dx.
  Panels<T> weight, gradient, state[2], transposed;

  PanelLayer(const EpochLayer& layer, int64_t rows, bool needs_dx, bool stores_gradient, int states,
             Arena& arena)
      : Values<T>(layer, rows, padded<T>(layer.out), arena), needs_dx(needs_dx) {
    auto panels = [&](int64_t rows, int64_t columns, bool wanted) {
      return Panels<T>{wanted ? arena.take<T>(rows * columns) : nullptr, rows, columns};
    };
    weight = panels(in + 1, columns, true);
    gradient = panels(in + 1, columns, this->trained && stores_gradient);
    for (int i = 0; i < 2; ++i) state[i] = panels(in + 1, columns, this->trained && i < states);
    transposed = panels(columns, padded<T>(in), needs_dx && rows > 1);
  }

  // Between the parameters as torch has them, (out, in) or (pieces, out, in), and panels, whose columns are
  // the outputs of all pieces, each piece padded to whole registers.
  template <bool to_panels> void copy(const Panels<T>& panels, void* weight_, void* bias_) const {
    T* weight = static_cast<T*>(weight_);
    T* bias = static_cast<T*>(bias_);
    for (int64_t piece = 0; piece < (job->pieces ? job->pieces : 1); ++piece) {
      for (int64_t o = 0; o < out;) {
        const int64_t column = piece * outputs + o, p = column / panel_width<T>;
        const int64_t room = (p + 1) * panel_width<T> - column, n = out - o < room ? out - o : room;
        T* own = weight ? weight + (piece * out + o) * in : nullptr;
        if (own && to_panels) transpose<T>(own, in, panels.at(0, column), panels.width(p), n, in);
        else if (own) transpose<T>(panels.at(0, column), panels.width(p), own, in, in, n);
        T* own_bias = bias ? bias + piece * out + o : nullptr;
        if (bias && to_panels) std::memcpy(panels.at(in, column), own_bias, n * sizeof(T));
        else if (bias) std::memcpy(own_bias, panels.at(in, column), n * sizeof(T));
        o += n;
      }
    }
  }
  void read_parameters() {
    copy<true>(weight, job->weight.value, job->bias.value);
    for (int i = 0; i < 2; ++i)
      if (state[i].data) copy<true>(state[i], job->weight.state[i], job->bias.state[i]);
  }
  void write_parameters() const {
    const bool w = job->weight.trained, b = job->bias.trained;
    copy<false>(weight, w ? job->weight.value : nullptr, b ? job->bias.value : nullptr);
    for (int i = 0; i < 2; ++i)
      if (state[i].data)
        copy<false>(state[i], w ? job->weight.state[i] : nullptr, b ? job->bias.state[i] : nullptr);
  }

  // W from W', once a step: dx of several rows runs along panels of W.
  void transpose_weight() const {
    for (int64_t q = 0; q < transposed.count(); ++q)
      for (int64_t p = 0; p < weight.count(); ++p) {
        const int64_t left = in - q * panel_width<T>, width = weight.width(p);
        const T* from = weight.panel(p) + q * panel_width<T> * width;
        T* to = transposed.panel(q) + p * panel_width<T> * transposed.width(q);
        transpose<T>(from, width, to, transposed.width(q), left < panel_width<T> ? left : panel_width<T>,
                     width);
      }
  }

  // z = x W' + b
  void forward(int64_t rows, const T* x, int64_t x_row) const {
    for (int64_t p = 0; p < weight.count(); ++p) {
      const int64_t width = weight.width(p);
      const T* panel = weight.panel(p);
      panel_gemm<T>(rows, width, in, x, panel, z + p * panel_width<T>, panel + in * width, 1, 1,
                    {x_row, 1, width, columns, 0});
    }
  }

  // dx = dz W of one row: dot products with the rows of the panels, as many at once as there are lanes.
  void input_gradient(T* dx) const {
    for (int64_t first = 0; first < in; first += V::size)
      store(dx + first, sums<V::size, V>(
                            [&](int64_t i) {
                              V dot(0);
                              for (int64_t p = 0; i < in && p < weight.count(); ++p) {
                                const int64_t width = weight.width(p);
                                const T *row = weight.panel(p) + i * width, *slope = dz + p * panel_width<T>;
                                for (int64_t v = 0; v < width; v += V::size)
                                  dot = madd(load<V>(row + v), load<V>(slope + v), dot);
                              }
                              return dot;
                            },
                            first));
  }

  // dx = dz W of several rows, `dx_row` apart: panels of W, whose columns are the inputs. A maxout's padding
  // between pieces is multiplied too, as zeros; behind the last output nothing is.
  void input_gradient(int64_t rows, T* dx, int64_t dx_row) const {
    const int64_t depth = job->pieces ? columns : out;
    for (int64_t q = 0; q < transposed.count(); ++q) {
      const int64_t width = transposed.width(q);
      panel_gemm<T>(rows, width, depth, dz, transposed.panel(q), dx + q * panel_width<T>, nullptr, 1, 0,
                    {columns, 1, width, dx_row, 0});
    }
  }

  // C = beta C + alpha dE/dW, and the same of the bias, for those that are trained; beta 0 does not read C.
  void weight_gradient(int64_t rows, const T* x, int64_t x_row, const Panels<T>& c, T alpha, T beta) const {
    static constexpr T one = 1;
    for (int64_t p = 0; p < c.count(); ++p) {
      const int64_t width = c.width(p);
      T *panel = c.panel(p), *last = panel + in * width;
      const T* dz_panel = dz + p * panel_width<T>;
      if (job->weight.trained)
        panel_gemm<T>(in, width, rows, x, dz_panel, panel, beta == 0 ? nullptr : panel, alpha, beta,
                      {1, x_row, columns, width, width});
      if (job->bias.trained)
        panel_gemm<T>(1, width, rows, &one, dz_panel, last, beta == 0 ? nullptr : last, alpha, beta,
                      {0, 0, columns, width, width});
    }
  }

  // The optimizer's step, element by element: W from dE/dW and the optimizer's buffers of the same places.
  void update(const UpdateRule& rule, int64_t step) const {
    with_rule(rule, step, [&](auto move) MLPEXT_LAMBDA {
      for (int64_t p = 0; p < weight.count(); ++p) {
        const int64_t width = weight.width(p), start = p * panel_width<T> * (in + 1);
        const int64_t first = start + (job->weight.trained ? 0 : in * width);
        const int64_t end = start + (job->bias.trained ? in + 1 : in) * width;
        for (int64_t i = first; i < end; i += V::size) move(i, load<V>(gradient.data + i));
      }
    });
  }

  // The same after one sample, whose dE/dW = dz' x need not be stored; and in the same pass, so that the
  // weights come from memory once a step, z of the `next` sample where that is known.
  void update(const UpdateRule& rule, int64_t step, const T* x, const T* next) const {
    with_rule(rule, step, [&, inputs = in](auto move) MLPEXT_LAMBDA {
      for (int64_t p = 0; p < weight.count(); ++p) {
        const int64_t width = weight.width(p), panel = p * panel_width<T> * (inputs + 1);
        const bool trained[] = {job->weight.trained, job->bias.trained};
        auto some = [&]<int registers>(int64_t first, std::integral_constant<int, registers>) MLPEXT_LAMBDA {
          const int64_t column = p * panel_width<T> + first * V::size;
          V slope[registers], sum[registers];
#pragma GCC unroll 4
          for (int v = 0; v < registers; ++v) slope[v] = load<V>(dz + column + v * V::size), sum[v] = V(0);
          for (int64_t r = 0; r <= inputs; ++r) {
            const bool bias = r == inputs;
            const V input = broadcast(bias ? T(1) : x[r]),
                    next_input = broadcast(bias || !next ? T(1) : next[r]);
            const int64_t i = panel + r * width + first * V::size;
#pragma GCC unroll 4
            for (int v = 0; v < registers; ++v) {
              const int64_t place = i + v * V::size;
              const V w = trained[bias] ? move(place, input * slope[v]) : load<V>(weight.data + place);
              sum[v] = madd(next_input, w, sum[v]);
            }
          }
          if (!next) return;
#pragma GCC unroll 4
          for (int v = 0; v < registers; ++v) store(z + column + v * V::size, sum[v]);
        };
        if constexpr (panel_vectors > 2) in_steps<4, 2, 1>(0, width / V::size, some);
        else in_steps<2, 1>(0, width / V::size, some);
      }
    });
  }

 private:
  // Calls run(move), where move(i, g) changes the register of weights at place i, given dE/dW, and the
  // optimizer's buffers there, and returns it. What is the same for all elements is computed once, pow above
  // all: 100 ns a call, once for 16 weights, had taken most of Adam's time at batch size 1.
  template <class Run> void with_rule(const UpdateRule& rule, int64_t step, Run run) const {
    auto run_with = [&]<int states>(std::integral_constant<int, states>, auto changed) MLPEXT_LAMBDA {
      run([=, w = weight.data, s0 = state[0].data, s1 = state[1].data](int64_t i, V g) MLPEXT_LAMBDA {
        V s[2];
        if (states > 0) s[0] = load<V>(s0 + i);
        if (states > 1) s[1] = load<V>(s1 + i);
        const V moved = changed(load<V>(w + i), g, s);
        store(w + i, moved);
        if (states > 0) store(s0 + i, s[0]);
        if (states > 1) store(s1 + i, s[1]);
        return moved;
      });
    };
    const V lr(rule.lr), decay(rule.weight_decay), momentum(rule.momentum);
    if (rule.kind == UpdateRule::descent && !state[0].data) {
      run_with(std::integral_constant<int, 0>(),
               [=](V w, V g, V*) MLPEXT_LAMBDA { return madd(-lr, madd(decay, w, g), w); });
    } else if (rule.kind == UpdateRule::descent) {
      run_with(std::integral_constant<int, 1>(), [=, nesterov = rule.nesterov](V w, V g, V* s) MLPEXT_LAMBDA {
        g = madd(decay, w, g);
        s[0] = madd(momentum, s[0], g);
        return madd(-lr, nesterov ? madd(momentum, s[0], g) : s[0], w);
      });
    } else {
      const double n = static_cast<double>(step);
      const V new_mean(1 - rule.beta1), new_square(1 - rule.beta2), beta2(rule.beta2), eps(rule.eps);
      const V root_scale(1 / std::sqrt(1 - std::pow(rule.beta2, n)));
      const V step_size(rule.lr / (1 - std::pow(rule.beta1, n)));
      const V kept(1 - rule.lr * rule.weight_decay);
      run_with(std::integral_constant<int, 2>(),
               [=, decoupled = rule.kind == UpdateRule::adamw](V w, V g, V* s) MLPEXT_LAMBDA {
                 if (decoupled) w = w * kept;
                 else g = madd(decay, w, g);
                 s[0] = madd(new_mean, g - s[0], s[0]);
                 s[1] = madd(new_square * g, g, beta2 * s[1]);
                 return w - step_size * (s[0] / madd(sqrt(s[1]), root_scale, eps));
               });
    }
  }
};

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
    fused = chunks == 1 && job.block_size >= step && rule.kind == UpdateRule::descent && rule.momentum == 0;
    const int states = rule.kind != UpdateRule::descent ? 2 : rule.momentum != 0 ? 1 : 0;
    layers = arena.take<PanelLayer<T>>(count);
    bool needs_dx = false;
    for (int64_t l = 0; l < count; ++l) {
      const PanelLayer<T> layer(job.layers[l], rows, needs_dx, !fused && rows > 1, states, arena);
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
      job.losses[step] = error / static_cast<double>(size);
      ++report.steps;
      if (!std::isfinite(job.losses[step])) break;
    }
    for (int64_t l = 0; l < count; ++l) layers[l].write_parameters();
    return report;
  }

 private:
  // One update from `size` samples. False, and no update made: the epoch was stopped between two chunks.
  bool take_step(int64_t size) {
    const T scale = job.mean ? T(1.0 / static_cast<double>(size)) : T(1);
    error = 0;
    for (int64_t l = 0; l < count; ++l)
      if (layers[l].transposed.data) layers[l].transpose_weight();
    for (int64_t first = 0; first < size;) {
      const int64_t left = size - first, chunks = (left + rows - 1) / rows;
      const int64_t n = this->proceed() ? this->bring(left / chunks) : 0;
      if (n == 0) return false;
      forward(n);
      const PanelLayer<T>& last = layers[count - 1];
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
      layers[l].activate(0, n);
      input = layers[l].y;
      input_row = layers[l].outputs;
    }
  }

  // From dE/dy of the last layer down to the lowest that is trained: dz, then dx for the layer below while W
  // is still the one that made y, then dE/dW: added to the step's, or with the last chunk used to move W.
  void backward(int64_t n, bool first_chunk, bool last_chunk) {
    const UpdateRule& rule = job.rule;
    const int64_t number = rule.steps + report.steps + 1;
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
                              T(1 - rule.lr * rule.weight_decay));
      } else if (rows == 1) {
        const T* next = l == 0 ? this->next_input() : nullptr;
        z_made = next != nullptr;
        layer.update(rule, number, input, next);
      } else {
        layer.weight_gradient(n, input, input_row, layer.gradient, 1, first_chunk ? T(0) : T(1));
        if (last_chunk) layer.update(rule, number);
      }
      if (!layer.needs_dx) break;
    }
  }

  int64_t steps, rows, x_row;
  bool fused;
  bool z_made = false;  // of the first layer, of the next sample
  PanelLayer<T>* layers;
  T* x;
  double error = 0;  // sum of E over the step under way
};

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
