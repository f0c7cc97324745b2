// The losses: one struct for each, and the list of them. docs/adding-a-loss.md says how to add one.
//
// E is the error of one sample, with outputs y and desired outputs d. A struct has a name, by which Python
// calls it, and error(row), which returns E and leaves dE/dy in the row (LossRow, in
// cpu/epoch/epoch_base.h). The row hands out its values a register at a time, and what it hands out takes the
// lane operations that formula.h lists. Where E is a sum over the outputs, error is one call of
// row.sum(f): f(y, d, E) adds its part of E to the register E, and returns dE/dy.
#pragma once
#include <cmath>
#include <cstdint>
#include <string_view>
#include <tuple>

#include "formulas/activations.h"

namespace mlpext {

// E = 1/2 ||y - d||^2, dE/dy = y - d.
struct SquaredError {
  static constexpr std::string_view name = "squared_error";
  template <class Row> static MLPEXT_FORMULA double error(const Row& row) {
    using V = typename Row::V;
    return row.sum([](V y, V d, V& E) MLPEXT_LAMBDA {
      const V e = y - d;
      E = madd(V(0.5) * e, e, E);
      return e;
    });
  }
};

// E = -sum of d log softmax(y), with d of sum s: dE/dy = s softmax(y) - d.
struct CrossEntropy {
  static constexpr std::string_view name = "cross_entropy";
  template <class Row> static MLPEXT_FORMULA double error(const Row& row) {
    using V = typename Row::V;
    using T = typename V::Scalar;
    // exp(y - largest) cannot overflow; a NaN anywhere becomes the largest, and so the loss.
    const T* outputs = row.outputs;
    T largest = outputs[0];
    for (int64_t i = 1; i < row.count; ++i)
      largest = outputs[i] > largest || outputs[i] != outputs[i] ? outputs[i] : largest;
    V sum(0), weighed(0), weights(0);
    row.along([&](int64_t i, int n) MLPEXT_LAMBDA {
      const V shifted = row.y(i, n) - V(largest), power = row.first(n, exp(shifted), V(0));
      sum = sum + power;
      row.store_slope(i, n, power);
      if (!row.targets) return;
      weights = weights + row.d(i, n);
      weighed = madd(row.d(i, n), shifted, weighed);
    });
    const T s = row.targets ? row.total(weights) : 1, powers = row.total(sum);
    row.along([&](int64_t i, int n) MLPEXT_LAMBDA {
      const V softmax = row.slope(i, n) / V(powers);
      row.store_slope(i, n, row.scale * (V(s) * softmax - row.d(i, n)));
    });
    const T mean = row.targets ? row.total(weighed) : outputs[row.target] - largest;
    return s * std::log(powers) - mean;
  }
};

// E = sum of log(1 + e^y) - d y, y the logit of the probability that d is 1: dE/dy = sigmoid(y) - d. Written
// with e^-|y|, neither overflows, nor cancels where d is 0 or 1.
struct BinaryCrossEntropy {
  static constexpr std::string_view name = "binary_cross_entropy";
  template <class Row> static MLPEXT_FORMULA double error(const Row& row) {
    using V = typename Row::V;
    return row.sum([](V y, V d, V& E) MLPEXT_LAMBDA {
      const V power = exp(minus_abs(y)), tail = power / (V(1) + power);  // the sigmoid of -|y|
      E = E + (madd(-d, y, at_least(y, V(0))) + log1p(power));
      return select(y < V(0), tail - d, (V(1) - d) - tail);
    });
  }
};

using Losses = std::tuple<SquaredError, CrossEntropy, BinaryCrossEntropy>;

template <class... Loss>
constexpr std::array<std::string_view, sizeof...(Loss)> loss_names_of(std::tuple<Loss...>*) {
  return {Loss::name...};
}
// A loss goes by its place in this list.
inline constexpr auto loss_names = loss_names_of(static_cast<Losses*>(nullptr));

}  // namespace mlpext
