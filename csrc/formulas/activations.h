// The activations: one struct for each, and the list of them. Everything else in the package, on every
// device, is made from this page. formula.h says what a struct has; docs/adding-an-activation.md how to add
// one.
#pragma once
#include <array>
#include <cstddef>
#include <string_view>
#include <tuple>

#include "formulas/formula.h"

namespace mlpext {

struct Identity : Formula {
  static constexpr std::string_view name = "identity";
  template <class V> MLPEXT_FORMULA V forward(V x) const { return x; }
  template <class V> MLPEXT_FORMULA V derivative(V) const { return V(1); }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V) const { return V(1); }
};

// 1 / (1 + e^|x|) where `small`, else 1 / (1 + e^-|x|).
template <class V, class Condition> MLPEXT_FORMULA V sigmoid_of_abs(V x, Condition small) {
  V e = exp(minus_abs(x));
  return select(small, e, V(1)) / (V(1) + e);
}

struct Sigmoid : Formula {  // 1 / (1 + e^-x), without overflow on either side
  static constexpr std::string_view name = "sigmoid";
  static constexpr bool keeps_output = true;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return sigmoid_of_abs(x, x < V(0)); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    V e = exp(minus_abs(x));
    return e / ((V(1) + e) * (V(1) + e));
  }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V y) const { return y * (V(1) - y); }
};

struct Tanh : Formula {
  static constexpr std::string_view name = "tanh";
  static constexpr bool keeps_output = true;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return tanh(x); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return V(4) * Sigmoid().derivative(x + x); }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V y) const { return V(1) - y * y; }
};

struct Hardtanh : Formula {  // x held between min_val and max_val
  static constexpr std::string_view name = "hardtanh";
  static constexpr std::array<Param, 2> params{{{"min_val", -1}, {"max_val", 1}}};
  static constexpr bool zero_slope_masks_gradient = true;
  double min_val, max_val;
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    return at_most(at_least(x, V(min_val)), V(max_val));
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    return select((x > V(min_val)) & (x < V(max_val)), V(1), V(0));
  }
  MLPEXT_FORMULA constexpr bool has_kernel() const { return min_val <= max_val; }
};

struct ReLU : Formula {  // max(0, x)
  static constexpr std::string_view name = "relu";
  static constexpr bool keeps_output = true;
  static constexpr bool zero_slope_masks_gradient = true;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return at_least(x, V(0)); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return select(x <= V(0), V(0), V(1)); }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V y) const { return derivative(y); }
};

struct ReLU6 : Formula {  // min(max(0, x), 6)
  static constexpr std::string_view name = "relu6";
  static constexpr bool zero_slope_masks_gradient = true;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return Hardtanh{{}, 0, 6}.forward(x); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return Hardtanh{{}, 0, 6}.derivative(x); }
};

struct LeakyReLU : Formula {  // x, and negative_slope x below 0: max(0.1 x, x) in the lecture
  static constexpr std::string_view name = "leaky_relu";
  static constexpr std::array<Param, 1> params{{{"negative_slope", 0.01}}};
  double negative_slope;
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    return select(x >= V(0), x, V(negative_slope) * x);
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    return select(x > V(0), V(1), V(negative_slope));
  }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V y) const { return derivative(y); }
  MLPEXT_FORMULA constexpr bool output_suffices() const { return negative_slope >= 0; }
};

struct ELU : Formula {  // x, and alpha (e^x - 1) below 0 (Clevert et al., 2015, arXiv 1511.07289)
  static constexpr std::string_view name = "elu";
  static constexpr std::array<Param, 1> params{{{"alpha", 1}}};
  static constexpr bool output_too_coarse_in_16bit = true;
  double alpha;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return select(x >= V(0), x, V(alpha) * expm1(x)); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    return select(x > V(0), V(1), exp(x, V(alpha)));
  }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V y) const {
    return select(y > V(0), V(1), y + V(alpha));
  }
  MLPEXT_FORMULA constexpr bool output_suffices() const { return alpha >= 0; }
};

struct SELU : Formula {  // scale * elu(x, alpha), self-normalising (Klambauer et al., 2017, arXiv 1706.02515)
  static constexpr std::string_view name = "selu";
  static constexpr bool output_too_coarse_in_16bit = true;
  static constexpr double scale = 1.0507009873554804934193349852946;
  static constexpr double alpha = 1.6732632423543772848170429916717;
  static constexpr double scaled_alpha = alpha * scale;
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    return select(x >= V(0), V(scale) * x, expm1(x, V(scaled_alpha)));
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    return select(x > V(0), V(scale), exp(x, V(scaled_alpha)));
  }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V y) const {
    return select(y > V(0), V(scale), y + V(scaled_alpha));
  }
};

struct CELU : Formula {  // x, and alpha (e^(x / alpha) - 1) below 0 (Barron, 2017, arXiv 1704.07483)
  static constexpr std::string_view name = "celu";
  static constexpr std::array<Param, 1> params{{{"alpha", 1}}};
  static constexpr bool output_too_coarse_in_16bit = true;
  double alpha;
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    return select(x >= V(0), x, V(alpha) * expm1(x / V(alpha)));
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    return select(x > V(0), V(1), exp(x / V(alpha)));
  }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V y) const {
    return select(y > V(0), V(1), (y + V(alpha)) / V(alpha));
  }
  // torch takes alpha and 1 / alpha in float, and refuses what is no number there.
  MLPEXT_FORMULA constexpr bool has_kernel() const {
    return (alpha > 1e-38 && alpha < 1e38) || (alpha < -1e-38 && alpha > -1e38);
  }
  MLPEXT_FORMULA constexpr bool output_suffices() const { return alpha > 0; }
};

struct GELU : Formula {  // x P(X <= x), X normal (Hendrycks and Gimpel, 2016, arXiv 1606.08415)
  static constexpr std::string_view name = "gelu";
  template <class V> MLPEXT_FORMULA V forward(V x) const { return times_normal_cdf(x); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return times_normal_cdf_slope(x); }
};

// The derivative of x sigmoid(v), from minus = -|v|, where v has the sign of x, and slope = v'. exp
// multiplies the other factor in: e^-|v| alone would lose digits, then be 0, where the product is not.
template <class V, class Exponent> MLPEXT_FORMULA V times_sigmoid_derivative(V x, Exponent minus, V slope) {
  V e = exp(minus), d = V(1) + e;
  return select(x < V(0), exp(minus, madd(x, slope, d)), madd(x * slope, e, d)) / (d * d);
}

struct SiLU : Formula {  // x sigmoid(x) (Elfwing et al., 2017, arXiv 1702.03118)
  static constexpr std::string_view name = "silu";
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    V e = exp(minus_abs(x)), n = select(x < V(0), exp(minus_abs(x), at_least(x, V(-1000))), x);
    return madd(-at_most(n, V(1000)), e / (V(1) + e), n);  // n / (1 + e), rounded less often
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    return times_sigmoid_derivative(at_most(at_least(x, V(-1000)), V(1000)), minus_abs(x), V(1));
  }
};

// gelu's tanh approximation, x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
struct GELUTanh : Formula {
  static constexpr std::string_view name = "gelu_tanh";
  static constexpr TwoParts a{1.5957691216057308, -9.96930880911092e-17};  // 2u = a x + b x^3
  static constexpr TwoParts b{0.07135481627260025, -4.1218577217431825e-18};
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    V t = at_most(abs(x), V(1000));
    auto minus = -odd_cubic(t, a, b);
    V q = over_one_plus(exp(minus, t), exp(minus));
    return select(x < V(0), -q, x - q);
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    V bounded = at_most(at_least(x, V(-1000)), V(1000));
    V slope = madd(V(3 * b.hi) * bounded, bounded, V(a.hi));
    return times_sigmoid_derivative(bounded, -odd_cubic(abs(bounded), a, b), slope);
  }
};

struct Mish : Formula {  // x tanh(log(1 + e^x)) (Misra, 2019, arXiv 1908.08681), in t = e^-|x|
  static constexpr std::string_view name = "mish";
  // Below 0 it is x n / (1 + e) with n = t + t^2 / 2 = e, above x - x n / (1 + e) with n = 2 t^2 and e = 2 t
  // + 2 t^2.
  template <class V> static MLPEXT_FORMULA V rest(V x, V t) {
    return madd(select(x > V(0), V(2), V(0.5)) * t, t, select(x > V(0), t + t, t));
  }
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    V t = exp(minus_abs(x)), xt = exp(minus_abs(x), at_most(at_least(x, V(-1000)), V(1000)));
    V xn = madd(select(x > V(0), V(2), V(0.5)) * xt, t, select(x > V(0), V(0), xt));
    V q = over_one_plus(xn, rest(x, t));
    return select(x > V(0), x - q, q);
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    V t = exp(minus_abs(x)), bounded = at_most(at_least(x, V(-1000)), V(1000)), d = V(1) + rest(x, t);
    V above = madd(V(4) * t * t, bounded * (V(1) + t), madd(V(2), t, V(1)) * d);
    V below = exp(minus_abs(x), madd(madd(V(0.5), t, V(1)), d, bounded * (V(1) + t)));
    return select(x > V(0), above, below) / (d * d);
  }
};

struct Softplus : Formula {  // log(1 + e^(beta x)) / beta, and x where beta x > threshold
  static constexpr std::string_view name = "softplus";
  static constexpr std::array<Param, 2> params{{{"beta", 1}, {"threshold", 20}}};
  double beta, threshold;
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    V u = V(beta) * x;
    return select(u > V(threshold), x, (at_least(u, V(0)) + log1p(exp(minus_abs(u)))) / V(beta));
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    V u = V(beta) * x;
    return select(u > V(threshold), V(1), Sigmoid().forward(u));
  }
};

struct Hardsigmoid : Formula {  // x / 6 + 1/2 between 0 and 1
  static constexpr std::string_view name = "hardsigmoid";
  static constexpr bool zero_slope_masks_gradient = true;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return ReLU6().forward(x + V(3)) / V(6); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    return select((x > V(-3)) & (x < V(3)), V(1.0 / 6), V(0));
  }
};

struct Hardswish : Formula {  // x hardsigmoid(x) (Howard et al., 2019, arXiv 1905.02244)
  static constexpr std::string_view name = "hardswish";
  static constexpr bool zero_slope_masks_gradient = true;
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    return at_least(x, V(-3)) * Hardsigmoid().forward(x);
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    return select(x <= V(-3), V(0), select(x < V(3), x / V(3) + V(0.5), V(1)));
  }
};

struct LogSigmoid : Formula {  // log(1 / (1 + e^-x))
  static constexpr std::string_view name = "logsigmoid";
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    return at_most(x, V(0)) - log1p(exp(minus_abs(x)));
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {  // sigmoid(-x)
    return sigmoid_of_abs(x, x > V(0));
  }
};

struct Softsign : Formula {  // x / (1 + |x|)
  static constexpr std::string_view name = "softsign";
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    V bounded = at_most(at_least(x, V(-1e30)), V(1e30));
    return bounded / (V(1) + abs(bounded));
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    V r = V(1) / (V(1) + abs(x));
    return r * r;
  }
};

struct Tanhshrink : Formula {  // x - tanh(x)
  static constexpr std::string_view name = "tanhshrink";
  template <class V> MLPEXT_FORMULA V forward(V x) const { return tanhshrink(x); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    V y = tanh(x);
    return y * y;
  }
};

struct Softshrink : Formula {  // x moved towards 0 by lambd, and 0 within
  static constexpr std::string_view name = "softshrink";
  static constexpr std::array<Param, 1> params{{{"lambd", 0.5}}};
  static constexpr bool rounds_params = true;
  static constexpr bool zero_slope_masks_gradient = true;
  double lambd;
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    return select(abs(x) <= V(lambd), V(0), x - select(x < V(0), V(-lambd), V(lambd)));
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return select(abs(x) <= V(lambd), V(0), V(1)); }
  MLPEXT_FORMULA constexpr bool has_kernel() const { return lambd >= 0; }
};

struct Hardshrink : Formula {  // x, and 0 where |x| <= lambd
  static constexpr std::string_view name = "hardshrink";
  static constexpr std::array<Param, 1> params{{{"lambd", 0.5}}};
  static constexpr bool rounds_params = true;
  static constexpr bool zero_slope_masks_gradient = true;
  double lambd;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return select(abs(x) <= V(lambd), V(0), x); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return select(abs(x) <= V(lambd), V(0), V(1)); }
};

// sin(omega x), for implicit neural representations (Sitzmann et al., 2020, arXiv 2006.09661)
struct Sine : Formula {
  static constexpr std::string_view name = "sine";
  static constexpr std::array<Param, 1> params{{{"omega", 1}}};
  double omega;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return sin(V(omega) * x); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return V(omega) * cos(V(omega) * x); }
};

// (x + sqrt(x^2 + b)) / 2 (Barron, 2021, arXiv 2112.11687), as max(x, 0) + tail, which cancels nowhere
struct Squareplus : Formula {
  static constexpr std::string_view name = "squareplus";
  static constexpr std::array<Param, 1> params{{{"b", 4}}};
  double b;
  static constexpr double far = 1e18;  // above, the square would overflow in float, and b no longer shows
  template <class V> MLPEXT_FORMULA V root(V x) const {
    return select(abs(x) > V(far), abs(x), sqrt(madd(x, x, V(b))));
  }
  template <class V> MLPEXT_FORMULA V tail(V x) const {
    V half = V(0.5) * abs(x);  // halves, whose sum cannot overflow
    return V(b / 4) / madd(V(0.5), root(x), half);
  }
  template <class V> MLPEXT_FORMULA V forward(V x) const { return at_least(x, V(0)) + tail(x); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    V d = tail(x) / root(x);
    return select(x > V(0), V(1) - d, d);
  }
  // A number in float, as is b / 4.
  MLPEXT_FORMULA constexpr bool has_kernel() const { return b > 1e-30 && b < 1e20; }
};

struct ReLUSquared : Formula {  // max(0, x)^2 (So et al., 2021, arXiv 2109.08668)
  static constexpr std::string_view name = "relu_squared";
  static constexpr bool zero_slope_masks_gradient = true;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return at_least(x, V(0)) * at_least(x, V(0)); }
  // Not 2 sqrt(y) from the output: in float16 y = x^2 leaves the numbers long before x does.
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return V(2) * at_least(x, V(0)); }
};

// x sigmoid(alpha x): gelu as CLIP has it (Radford et al., 2021, arXiv 2103.00020). alpha |x| has two parts,
// because its rounding alone would cost the exponential 40 ULP at -80.
struct QuickGELU : Formula {
  static constexpr std::string_view name = "quick_gelu";
  static constexpr std::array<Param, 1> params{{{"alpha", 1.702}}};
  double alpha;
  template <class V> MLPEXT_FORMULA V forward(V x) const {
    V t = at_most(abs(x), V(1000 / alpha));
    auto minus = -two_part_product(t, alpha);
    V q = over_one_plus(exp(minus, t), exp(minus));
    return select(x < V(0), -q, x - q);
  }
  template <class V> MLPEXT_FORMULA V derivative(V x) const {
    V bounded = at_most(at_least(x, V(-1000 / alpha)), V(1000 / alpha));
    return times_sigmoid_derivative(bounded, -two_part_product(abs(bounded), alpha), V(alpha));
  }
  // The bound on x, by which exp multiplies, is below 10^6, and alpha x a number.
  MLPEXT_FORMULA constexpr bool has_kernel() const { return alpha >= 0.01 && alpha <= 1000; }
};

struct Threshold : Formula {  // x where x > threshold, else value
  static constexpr std::string_view name = "threshold";
  static constexpr std::array<Param, 2> params{{{"threshold", 0}, {"value", 0}}};
  static constexpr bool zero_slope_masks_gradient = true;
  double threshold, value;
  template <class V> MLPEXT_FORMULA V forward(V x) const { return select(x <= V(threshold), V(value), x); }
  template <class V> MLPEXT_FORMULA V derivative(V x) const { return select(x <= V(threshold), V(0), V(1)); }
  template <class V> MLPEXT_FORMULA V derivative_from_output(V y) const { return derivative(y); }
  // y <= threshold where x is. A value just below the threshold could be rounded to one above it.
  MLPEXT_FORMULA constexpr bool output_suffices() const { return value <= 0 && threshold >= 0; }
};

// The list. An activation's index is its place here.
using Activations =
    std::tuple<Identity, Sigmoid, Tanh, ReLU, LeakyReLU, ELU, GELU, GELUTanh, SiLU, Mish, Softplus, SELU,
               CELU, ReLU6, Hardtanh, Hardsigmoid, Hardswish, LogSigmoid, Softsign, Tanhshrink, Softshrink,
               Hardshrink, Sine, Squareplus, ReLUSquared, QuickGELU, Threshold>;
inline constexpr std::size_t activation_count = std::tuple_size_v<Activations>;

// The gradient of x from that of f(x).
template <class A, class V> MLPEXT_FORMULA V chain(V grad_output, V derivative) {
  if constexpr (A::zero_slope_masks_gradient)
    return select(derivative == V(0), V(0), grad_output * derivative);
  else return grad_output * derivative;
}

// Maxout: whether a further piece takes the place of the best so far. The first of equals stays, a NaN wins.
template <class V> MLPEXT_FORMULA auto wins(V piece, V best) {
  return (!(piece <= best)) & (best == best);  // a NaN is not <=
}

template <class A>
concept HasDerivativeFromOutput = requires { &A::template derivative_from_output<double>; };

}  // namespace mlpext
