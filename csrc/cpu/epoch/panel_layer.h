// A layer of an epoch: what it makes of a chunk of rows, its weights as panels, the products on them, and the
// optimizers' steps.
#pragma once
#include "cpu/epoch/dropout.h"
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
  bool identity, keeps_z, drops, trained;
  T *z, *y, *dz, *dy;  // (rows, columns) and (rows, outputs)
  T* mask;  // (rows, outputs), of dropout: y = f(z) m; where f' follows from f(z), that takes z's place
  int32_t* winner;  // (rows, outputs), of maxout

  Values(const EpochLayer& layer, int64_t rows, int64_t outputs, Arena& arena)
      : job(&layer),
        activation(&kernels.activations[layer.activation]),
        in(layer.in),
        out(layer.out),
        outputs(outputs),
        columns(outputs * layer.pieces),
        identity(layer.kind == EpochLayer::activated && layer.activation == index_of<Identity>),
        keeps_z(layer.kind != EpochLayer::activated || !layer.output_suffices),
        drops(layer.dropout.p > 0),
        trained(layer.weight.trained || layer.bias.trained) {
    y = arena.take<T>(rows * padded<T>(outputs));
    z = keeps_z || drops ? arena.take<T>(rows * padded<T>(columns)) : y;
    dy = arena.take<T>(rows * padded<T>(outputs));
    dz = layer.kind == EpochLayer::activated ? dy : arena.take<T>(rows * padded<T>(columns));
    mask = drops ? arena.take<T>(rows * padded<T>(outputs)) : nullptr;
    winner = layer.kind == EpochLayer::maxout ? arena.take<int32_t>(rows * outputs) : nullptr;
  }

  // y = f(z), or f(z1) z2, or the largest piece and its number, for `rows` rows from row `first` on, which is
  // that `sample` of the epoch. Rows lie dense, so that an activation is one run over all of them.
  void activate(int64_t first, int64_t rows, int64_t sample) const {
    T *z = this->z + first * columns, *y = drops && !keeps_z ? z : this->y + first * outputs;
    if (job->kind == EpochLayer::maxout) {
      for (int64_t r = 0; r < rows; ++r)
        kernels.maxout_forward[1][dtype<T>](z + r * columns, y + r * outputs, winner + (first + r) * outputs,
                                            job->pieces, outputs, outputs);
    } else if (job->kind == EpochLayer::gated) {
      for (int64_t r = 0; r < rows; ++r)
        activation->gated[dtype<T>](job->params, z + r * columns, z + r * columns + outputs, y + r * outputs,
                                    outputs);
    } else if (!identity) activation->forward[dtype<T>](job->params, z, y, rows * columns);
    else if (keeps_z) std::memcpy(y, z, rows * columns * sizeof(T));
    if (!drops) return;
    T *const dropped = this->y + first * outputs, *const mask = this->mask + first * outputs;
    dropout_mask<T>(job->dropout, sample, rows, out, outputs, mask);
    multiply(rows * outputs, y, mask, dropped);
  }
  // dz = dy f'. With pieces dz has the columns of all: of a maxout 0 but for those that have won, of a gated
  // layer dz1 = dy z2 f'(z1) and dz2 = dy f(z1).
  void activate_backward(int64_t first, int64_t rows) const {
    const T* z = this->z + first * columns;
    T *dy = this->dy + first * outputs, *dz = this->dz + first * columns;
    if (drops) multiply(rows * outputs, dy, mask + first * outputs, dy);
    if (job->kind == EpochLayer::maxout) {
      for (int64_t r = 0; r < rows; ++r)
        kernels.maxout_backward[1][dtype<T>](dy + r * outputs, winner + (first + r) * outputs,
                                             dz + r * columns, job->pieces, outputs, outputs);
    } else if (job->kind == EpochLayer::gated) {
      for (int64_t r = 0; r < rows; ++r) {
        const T* const own = z + r * columns;
        activation->gated_backward[dtype<T>](job->params, dy + r * outputs, own, own + outputs,
                                             dz + r * columns, dz + r * columns + outputs, outputs);
      }
    } else if (!identity)
      (keeps_z ? activation->backward : activation->backward_from_output)[dtype<T>](job->params, dy, z, dz,
                                                                                    rows * columns);
  }

 private:
  static void multiply(int64_t n, const T* a, const T* b, T* product) {
    map(n, product, [](Lanes<T> x, Lanes<T> y) MLPEXT_LAMBDA { return x * y; }, a, b);
  }
};

// A layer's weights as panels with the bias as last row. Lanes of padding hold 0 in weights and gradients.
template <class T> struct PanelLayer : Values<T> {
  using V = Lanes<T>;
  using Values<T>::job, Values<T>::in, Values<T>::out, Values<T>::outputs, Values<T>::columns;
  using Values<T>::z, Values<T>::dz;

  bool needs_dx;   // whether a layer below is trained
  bool one_chunk;  // whether a step is one: then W is transposed as it is used, a panel at a time
  // W' with the bias as row `in`, and of the same layout dE/dW and the optimizer's buffers.
  Panels<T> weight, gradient, state[2];
  Panels<T> transposed;  // W, for dx: all of it, or one panel

  PanelLayer(const EpochLayer& layer, int64_t rows, bool needs_dx, bool one_chunk, bool stores_gradient,
             int states, Arena& arena)
      : Values<T>(layer, rows, padded<T>(layer.out), arena), needs_dx(needs_dx), one_chunk(one_chunk) {
    auto panels = [&](int64_t rows, int64_t columns, bool wanted) {
      return Panels<T>{wanted ? arena.take<T>(rows * columns) : nullptr, rows, columns};
    };
    weight = panels(in + 1, columns, true);
    gradient = panels(in + 1, columns, this->trained && stores_gradient);
    for (int i = 0; i < 2; ++i) state[i] = panels(in + 1, columns, this->trained && i < states);
    transposed = panels(columns, one_chunk ? panel_width<T> : padded<T>(in), needs_dx && rows > 1);
    transposed.columns = padded<T>(in);
  }

  // Between the parameters as torch has them, (out, in) or (pieces, out, in), and panels, whose columns are
  // the outputs of all pieces, each piece padded to whole registers.
  template <bool to_panels> void copy(const Panels<T>& panels, void* weight_, void* bias_) const {
    T* weight = static_cast<T*>(weight_);
    T* bias = static_cast<T*>(bias_);
    for (int64_t piece = 0; piece < job->pieces; ++piece) {
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
    for (int64_t q = 0; q < transposed.count() && !one_chunk; ++q) transpose_weight(q, transposed.panel(q));
  }
  void transpose_weight(int64_t q, T* to) const {
    const int64_t width = transposed.width(q), left = in - q * panel_width<T>,
                  n = left < width ? left : width;
    if (n < width) std::memset(to, 0, columns * width * sizeof(T));  // the last panel's padding
    for (int64_t p = 0; p < weight.count(); ++p)
      transpose<T>(weight.panel(p) + q * panel_width<T> * weight.width(p), weight.width(p),
                   to + p * panel_width<T> * width, width, n, weight.width(p));
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

  // dx = dz W of several rows, `dx_row` apart: panels of W, whose columns are the inputs. The padding
  // between pieces is multiplied too, as zeros; behind the last output of a single one nothing is.
  void input_gradient(int64_t rows, T* dx, int64_t dx_row) const {
    const int64_t depth = job->pieces > 1 ? columns : out;
    for (int64_t q = 0; q < transposed.count(); ++q) {
      const int64_t width = transposed.width(q);
      T* const panel = transposed.panel(one_chunk ? 0 : q);
      if (one_chunk) transpose_weight(q, panel);
      panel_gemm<T>(rows, width, depth, dz, panel, dx + q * panel_width<T>, nullptr, 1, 0,
                    {columns, 1, width, dx_row, 0});
    }
  }

  // C = beta C + alpha dE/dW, and the same of the bias with its own beta, for those that are trained; beta 0
  // does not read C. At most chunk_rows rows.
  void weight_gradient(int64_t rows, const T* x, int64_t x_row, const Panels<T>& c, T alpha, T beta,
                       T bias_beta) const {
    static constexpr T one = 1;
    alignas(64) T dense[chunk_rows * panel_width<T>];
    for (int64_t p = 0; p < c.count(); ++p) {
      const int64_t width = c.width(p);
      T *panel = c.panel(p), *last = panel + in * width;
      const T* slopes = dz + p * panel_width<T>;
      if (columns > width) {  // rows 256 or 512 floats apart would share a few lines of the L1 cache
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t v = 0; v < width; v += V::size)
            store(dense + r * width + v, load<V>(slopes + r * columns + v));
        slopes = dense;
      }
      if (job->weight.trained)
        panel_gemm<T>(in, width, rows, x, slopes, panel, beta == 0 ? nullptr : panel, alpha, beta,
                      {1, x_row, width, width, width});
      if (job->bias.trained)
        panel_gemm<T>(1, width, rows, &one, slopes, last, bias_beta == 0 ? nullptr : last, alpha, bias_beta,
                      {0, 0, width, width, width});
    }
  }

  // ||W||^2 of the trained weights, without the biases; and of the whole gradient that `update` would take.
  double squared_weights() const {
    double sum = 0;
    for (int64_t p = 0; job->weight.trained && p < weight.count(); ++p)
      sum += squares(weight.panel(p), in * weight.width(p), [](V w, int64_t) MLPEXT_LAMBDA { return w; });
    return sum;
  }
  double squared_gradient(T factor, T l2) const {
    double sum = 0;
    for (int64_t p = 0; p < weight.count(); ++p)
      in_panel(p, [&](int64_t first, int64_t bias, int64_t end) MLPEXT_LAMBDA {
        sum += squares(gradient.data + first, end - first, [&](V g, int64_t i) MLPEXT_LAMBDA {
          return total<true>(first + i, g, factor, first + i < bias ? l2 : T(0));
        });
      });
    return sum;
  }

  // The optimizer's step, element by element: W from g = factor dE/dW + l2 W (of the bias, factor dE/db) and
  // the optimizer's buffers of the same places.
  void update(const UpdateRule& rule, int64_t step, T factor, T l2) const {
    if (factor == 1 && l2 == 0) update_with<false>(rule, step, factor, l2);
    else update_with<true>(rule, step, factor, l2);
  }

  // The same after one sample, whose dE/dW = dz' x need not be stored; and in the same pass, so that the
  // weights come from memory once a step, z of the `next` sample where that is known.
  void update(const UpdateRule& rule, int64_t step, T l2, const T* x, const T* next) const {
    if (l2 == 0) update_with<false>(rule, step, l2, x, next);
    else update_with<true>(rule, step, l2, x, next);
  }

 private:
  // g at place i of the panels.
  template <bool changes> MLPEXT_INLINE V total(int64_t i, V gradient, T factor, T l2) const {
    if constexpr (!changes) return gradient;
    else return madd(broadcast(l2), load<V>(weight.data + i), broadcast(factor) * gradient);
  }

  // Calls f(first, bias, end) with places of panel p: what is trained lies from first to end, the bias from
  // `bias` on.
  template <class F> MLPEXT_INLINE void in_panel(int64_t p, F f) const {
    const int64_t width = weight.width(p), start = p * panel_width<T> * (in + 1), bias = start + in * width;
    f(job->weight.trained ? start : bias, bias, job->bias.trained ? bias + width : bias);
  }

  // The sum of value(x, i)^2 over the registers x of n numbers, i the place of its first.
  template <class F> static MLPEXT_INLINE double squares(const T* numbers, int64_t n, F value) {
    V sum[4] = {V(0), V(0), V(0), V(0)};
    in_steps<4, 1>(0, n / V::size,
                   [&]<int registers>(int64_t first, std::integral_constant<int, registers>) MLPEXT_LAMBDA {
#pragma GCC unroll 4
                     for (int v = 0; v < registers; ++v) {
                       const int64_t i = (first + v) * V::size;
                       const V x = value(load<V>(numbers + i), i);
                       sum[v] = madd(x, x, sum[v]);
                     }
                   });
    return LossRow<T>::total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  template <bool changes> void update_with(const UpdateRule& rule, int64_t step, T factor, T l2) const {
    with_rule(rule, step, [&](auto move) MLPEXT_LAMBDA {
      for (int64_t p = 0; p < weight.count(); ++p)
        in_panel(p, [&](int64_t first, int64_t bias, int64_t end) MLPEXT_LAMBDA {
          for (int64_t i = first; i < end; i += V::size)
            move(i, total<changes>(i, load<V>(gradient.data + i), factor, i < bias ? l2 : T(0)));
        });
    });
  }

  template <bool changes>
  void update_with(const UpdateRule& rule, int64_t step, T l2, const T* x, const T* next) const {
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
              const V w = trained[bias]
                              ? move(place, total<changes>(place, input * slope[v], 1, bias ? T(0) : l2))
                              : load<V>(weight.data + place);
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
      const V new_mean(1 - rule.beta1), new_square(1 - rule.beta2), beta2(rule.beta2);
      // Also with eps 0 a gradient that has always been 0 moves nothing: padding stays 0.
      const V eps = at_least(V(rule.eps), V(std::numeric_limits<T>::min()));
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

}  // namespace
}  // namespace mlpext::MLPEXT_ISA
