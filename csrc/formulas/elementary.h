// Elementary functions on lanes: one inline polynomial each, float and double from one text.
//
// No table but those of tables.h, no branch but the far ranges of sin, cos and gelu; a NaN stays one,
// infinities give the limits, and subnormal results are rounded, not flushed. Beside each function stands its
// max ULP as measured: with FMA, and in brackets without (baseline); float over all inputs (brackets: every
// 37th or closer), double over 10^4 random ones.
#pragma once

#ifdef MLPEXT_VECTOR_BYTES
#include "formulas/simd_lanes.h"
#else
#include "formulas/scalar_lanes.h"
#endif
#if MLPEXT_VECTOR_BYTES >= 32
#include "formulas/tables.h"
#endif

namespace mlpext::MLPEXT_ISA {

template <class V> constexpr bool is_float = sizeof(typename V::Scalar) == 4;

// c0 + c1 x + c2 x^2 + ...
template <class V, class... C> MLPEXT_INLINE V horner(V x, double c0, C... c) {
  if constexpr (sizeof...(c) == 0) return V(c0);
  else return madd(x, horner(x, c...), V(c0));
}

// a b + c where the two nearly cancel, so that what is left is exact or nearly so: what rounding lost.
template <class V> MLPEXT_INLINE V residual(V a, V b, V c) {
  if constexpr (fused_madd) return madd(a, b, c);
  using T = typename V::Scalar;
  constexpr auto head = ~typename Format<T>::Bits(0) << (Format<T>::mantissa / 2 + 1);
  const V a1 = from_bits<V>(bits_of(a) & head), a2 = a - a1, b1 = from_bits<V>(bits_of(b) & head),
          b2 = b - b1;
  return (((a1 * b1 + c) + a1 * b2) + a2 * b1) + a2 * b2;
}

// x rounded to a whole number n, |n| < 2^22 or 2^51, by adding 1.5 * 2^23 or 2^52: the low bits of `biased`
// are n's.
template <class V> struct RoundedInteger {
  static constexpr double magic = is_float<V> ? 0x1.8p23 : 0x1.8p52;
  V biased;
  MLPEXT_INLINE V value() const { return biased - V(magic); }
  MLPEXT_INLINE typename V::Bits bits() const { return bits_of(biased); }
};
template <class V> MLPEXT_INLINE RoundedInteger<V> round_product(V x, double c) {
  return {madd(x, V(c), V(RoundedInteger<V>::magic))};
}

// 2^(n + offset) for exponents of normal numbers.
template <class V> MLPEXT_INLINE V power_of_two(typename V::Bits n, int offset) {
  using F = Format<typename V::Scalar>;
  return from_bits<V>((n << F::mantissa) + (typename F::Bits(F::bias + offset) << F::mantissa));
}

// x * 2^n, 0.5 <= x < 2, rounded once also when subnormal; |n| up to twice the largest exponent.
template <class V> MLPEXT_INLINE V scale(V x, RoundedInteger<V> n) {
#if MLPEXT_VECTOR_BYTES == 64
  if constexpr (is_float<V>) return V(_mm512_maskz_scalef_ps(0xffff, x.v, n.value().v));
  else return V(_mm512_maskz_scalef_pd(0xff, x.v, n.value().v));
#else
  const auto half = round_product(n.value(), 0.5).bits();
  return x * power_of_two<V>(half, 0) * power_of_two<V>(n.bits() - half, 0);
#endif
}

// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, in `wide` for |r| < 0.41: degree 4 (5) in float, 10 in double; it
// gives e^r - 1 a relative error of 2^-25.9 in float, 2^-57.7 in double.
template <bool wide = false, class V> MLPEXT_INLINE V expm1_terms(V r) {
  if constexpr (is_float<V> && !wide)
    return horner(r, 0.5, 0.1666653, 0.041666158, 0.008368273, 0.0013975992);
  else if constexpr (is_float<V>)
    return horner(r, 0.5, 0.16666612, 0.041666396, 0.008344386, 0.001394393, 0.00014911752);
  else
    return horner(r, 0.5, 0.16666666666666746, 0.041666666666667004, 0.008333333333271527,
                  0.0013888888888668887, 0.00019841269998743986, 2.4801587751488235e-05,
                  2.7557145056151536e-06, 2.755694529177771e-07, 2.5139044274645392e-08,
                  2.100128797163858e-09);
}
template <bool wide = false, class V> MLPEXT_INLINE V expm1_reduced(V r) {
  return madd(r * r, expm1_terms<wide>(r), r);
}

constexpr double log2e = 1.4426950408889634;
// ln 2 = hi + lo; the products of hi with exponents are exact.
template <class V> constexpr double ln2_hi = is_float<V> ? 0x1.62ep-1 : 0x1.62e42fefa38p-1;
template <class V> constexpr double ln2_lo = is_float<V> ? 0x1.0bfbe8p-15 : 0x1.ef35793c7673p-45;

// x - n ln 2
template <class V> MLPEXT_INLINE V subtract_ln2(V x, V n) {
  return madd(n, V(-ln2_lo<V>), madd(n, V(-ln2_hi<V>), x));
}

// A number in two parts: hi + lo, |lo| at most an ulp or two of hi.
template <class V> struct Pair {
  V hi, lo;
  friend MLPEXT_INLINE Pair operator-(Pair x) { return {-x.hi, -x.lo}; }
};

// e^x = 2^n e^r, |r| <= ln 2 / 2; x in one part or two. For 16 bits r is in units of ln 2, and 2^r, of degree
// 5, has a relative error of 2^-23.4; with n's rounding e^x is right to |x| 2^-25 more.
template <class V> struct Exponential {
  RoundedInteger<V> n;
  V r;
  MLPEXT_INLINE explicit Exponential(V x) : n(round_product(x, log2e)) {
    if constexpr (V::low_precision) r = madd(x, V(log2e), -n.value());
    else r = subtract_ln2(x, n.value());
  }
  MLPEXT_INLINE explicit Exponential(Pair<V> x) : Exponential(x.hi) {
    if constexpr (!V::low_precision)
      r = madd(n.value(), V(-ln2_hi<V>), x.hi) + madd(n.value(), V(-ln2_lo<V>), x.lo);
  }
  MLPEXT_INLINE V power() const {  // e^r in 16 bits
    const V s = r * r, low = horner(r, 1, 0.69314698), middle = horner(r, 0.24022242, 0.055507337);
    return madd(madd(horner(r, 0.0096715127, 0.0013264727), s, middle), s, low);
  }
  MLPEXT_INLINE V times(V c) const {
    if constexpr (V::low_precision) return scale(c * power(), n);
    return scale(madd(c * r, madd(r, expm1_terms(r), V(1)), c), n);
  }
};

// x where e^x is neither 0 nor infinity, and somewhat beyond.
template <class V> MLPEXT_INLINE V exp_range(V x) {
  return at_least(at_most(x, V(is_float<V> ? 89 : 710)), V(is_float<V> ? -150 : -800));
}
template <class V> MLPEXT_INLINE Pair<V> exp_range(Pair<V> x) { return {exp_range(x.hi), x.lo}; }

// e^x, and c e^x for |c| < 10^6, rounded as well as e^x and 0 only where the product is; x may have two
// parts. Max ULP: float 0.93 (1.20), double 0.82 (1.05).
template <class V> MLPEXT_INLINE V exp(V x) { return Exponential<V>(exp_range(x)).times(V(1)); }
template <class V> MLPEXT_INLINE V exp(Pair<V> x) { return Exponential<V>(exp_range(x)).times(V(1)); }
template <class V> MLPEXT_INLINE V exp(V x, V c) { return Exponential<V>(exp_range(x)).times(c); }
template <class V> MLPEXT_INLINE V exp(Pair<V> x, V c) { return Exponential<V>(exp_range(x)).times(c); }

// n / (1 + e), e >= 0 and n finite, nearly rounded once: what rounding 1 + e and the quotient lost is made
// good.
template <class V> MLPEXT_INLINE V over_one_plus(V n, V e) {
  if constexpr (V::low_precision) return n / (V(1) + e);
  const V d = V(1) + e, lost = e - (d - V(1)), r = V(1) / d, y = n * r;
  return madd(madd(-y, lost, residual(-y, d, n)), r, y);
}

// a x + b x^3 in two parts, as exp takes it; a and b have two parts, too. |a + b x^2| < 16 (float) or 64
// (double) wherever the second part counts: to such sums the part of a on a grid adds exactly.
template <class V, class Constant> MLPEXT_INLINE Pair<V> odd_cubic(V x, Constant a, Constant b) {
  constexpr double magic = is_float<V> ? 0x1.8p32 : 0x1.8p5;
  const double a_grid = (a.hi + magic) - magic, b_hi = typename V::Scalar(b.hi);
  const V a1(a_grid), a2((a.hi - a_grid) + a.lo), b1(b_hi), b2((b.hi - b_hi) + b.lo);
  const V z = x * x, slope = madd(b1, z, a1), y = x * slope;
  if constexpr (V::low_precision) return {y, V(0)};
  const V rest = residual(b1, z, a1 - slope) + madd(b1, residual(x, x, -z), madd(b2, z, a2));
  return {y, madd(x, rest, residual(x, slope, -y))};
}

// c x in two parts, as exp takes it.
template <class V> MLPEXT_INLINE Pair<V> two_part_product(V x, double c) {
  const double rounded = typename V::Scalar(c);
  const V y = V(rounded) * x;
  if constexpr (V::low_precision) return {y, V(0)};
  return {y, madd(V(c - rounded), x, residual(V(rounded), x, -y))};
}

// What expm1 shares with its multiple: 2^n (1 + m) - 1, or m alone up to 0.41, where 2 (1 + m) - 1, just
// above ln 2 / 2, would cancel and cost 2 ULP.
template <class V> struct Expm1 {
  Mask<typename V::Scalar> near;
  V r, half;  // half = 2^n / 2: 2^n itself may overflow
  MLPEXT_INLINE explicit Expm1(V x) : near(abs(x) < V(0.41)) {
    const V t =
        at_least(at_most(x, V(is_float<V> ? 89 : 710)), V(is_float<V> ? -18 : -39));  // beyond: inf, -1
    const auto n = round_product(t, log2e);
    r = subtract_ln2(t, select(near, V(0), n.value()));
    half = power_of_two<V>(n.bits(), -1);
  }
};

// Max ULP: float 1.43, below 0 0.87 (1.40, 0.98), double 1.12 (1.10).
template <class V> MLPEXT_INLINE V expm1(V x) {
  const Expm1<V> e(x);
  const V m = expm1_reduced<true>(e.r), y = madd(e.half, m, e.half - V(0.5));
  return copysign(select(e.near, m, y + y), x);  // for -0
}

// c (e^x - 1) for c > 0, rounded nearly as well.
template <class V> MLPEXT_INLINE V expm1(V x, V c) {
  const Expm1<V> e(x);
  const V rest = e.r * e.r * expm1_terms<true>(e.r), y = madd(c * e.half, e.r + rest, c * (e.half - V(0.5)));
  const V p = c * e.r, near = p + madd(c, rest, residual(c, e.r, -p));
  return copysign(select(e.near, near, y + y), x);
}

// 1 - tanh(t) = 2 / (e^2t + 1) for t >= 0
template <class V> MLPEXT_INLINE V one_minus_tanh(V t) {
  t = at_most(t, V(is_float<V> ? 9.1 : 19.1));  // beyond: less than half an ulp of 1
  const auto n = round_product(t, 2 * log2e);
  const V power = power_of_two<V>(n.bits(), 0);
  const V e = madd(power, expm1_reduced(subtract_ln2(t + t, n.value())), power);
  return V(2) / (e + V(1));
}

// |x| < 0.56: x + x^3 q(x^2), q of degree 4 in float, 10 in double.
// Max ULP: float 1.17 by the table, else 1.45 (1.42), double 1.41 (1.34).
template <class V> MLPEXT_INLINE V tanh(V x) {
  const V t = abs(x);
#if MLPEXT_VECTOR_BYTES == 64
  if constexpr (is_float<V>) {
    const V bounded = at_most(t, V(14));
    return copysign(piecewise(tanh_table, quarter_of_octave(bounded), bounded), x);
  }
#endif
  const V z = t * t;
  V q;
  if constexpr (is_float<V>)
    q = horner(z, -3.3333313e-01, 1.3332437e-01, -5.383626e-02, 2.1005783e-02, -6.1821397e-03);
  else
    q = horner(z, -0.3333333333333328, 0.13333333333323746, -0.05396825396207604, 0.02186948833760144,
               -0.008863231814868233, 0.0035920841479180083, -0.0014554925188961388, 0.0005882390271805032,
               -0.00023286214715130565, 8.257562487935518e-05, -1.903893304955719e-05);
  return copysign(select(t < V(0.56), madd(t * z, q, t), V(1) - one_minus_tanh(t)), x);
}

// x - tanh(x). |x| < 1: x^3 (1/3 + q(x^2)), q of degree 7 in float, 16 in double, with x^3 in two parts.
template <class V> MLPEXT_INLINE V tanhshrink(V x) {
  const V t = abs(x), z = t * t, cube = t * z;
  V q;
  if constexpr (is_float<V>)
    q = z * horner(z, -0.13333312, 0.05396333, -0.021829518, 0.008697974, -0.0032069709, 0.0009236356,
                   -0.00014282367);
  else
    q = z * horner(z, -0.1333333333333331, 0.05396825396823156, -0.021869488535297885, 0.00886323551258739,
                   -0.003592127823652332, 0.001455832653290811, -0.0005900175763535086,
                   0.00023908846376653154, -9.679108983752376e-05, 3.899186661071375e-05,
                   -1.5416446707126692e-05, 5.777649982412294e-06, -1.921811747213646e-06,
                   5.123293514745995e-07, -9.365596749694354e-08, 8.539977078885353e-09);
  const V third(1.0 / 3), rest = residual(t, z, -cube) + t * residual(t, t, -z);
  const V near = madd(cube, third, madd(cube, q, rest * third));
  const V y = select(t < V(1), near, (t - V(1)) + one_minus_tanh(t));
  return copysign(y, x) + V(0);  // 0 - 0 is +0
}

// Max ULP: float 1.27 (1.27), double 1.19 (1.50).
template <class V> MLPEXT_INLINE V log1p(V x) {
  using T = typename V::Scalar;
  using F = Format<T>;
  // 1 + x = 2^k (1 + f) with 1 + f in [0.75, 1.5); f is exact up to x = 5.
  const auto b = bits_of(V(1) + x) - bits_of(V(0.75));
  const auto e = b & (~typename F::Bits(0) << F::mantissa);  // k in the exponent's place
  const V s = from_bits<V>(bits_of(V(4)) - e);  // 4 * 2^-k: a normal number even for the largest x
  const V f = from_bits<V>(bits_of(x) - e) - madd(s, V(-0.25), V(1));  // in this order -0 stays -0
  // k + bias + 1 > 0 as the low bits of a large number, then -k: its zero times -ln 2 keeps the -0, too.
  constexpr double large = is_float<V> ? 0x1p23 : 0x1p52;
  const V minus_k =
      V(large + F::bias + 1) - from_bits<V>(((b + bits_of(V(2))) >> F::mantissa) | bits_of(V(large)));
  // log(1 + f) = 2 atanh(r), around f - f^2 / 2; q has degree 2 in float, 7 in double.
  const V r = f / (V(2) + f), z = r * r, h = V(0.5) * f * f;
  V q;
  if constexpr (is_float<V>) q = horner(z, 6.666695e-01, 3.9957657e-01, 3.0364004e-01);
  else
    q = horner(z, 0.666666666666666, 0.4000000000005667, 0.2857142855583043, 0.22222224296311363,
               0.1818166582562713, 0.1539111706008564, 0.13173439309281326, 0.13844672491925275);
  V y = madd(minus_k, V(-0.6931471805599453), f - (h - r * madd(z, q, h)));
  y = select(x < V(__builtin_inf()), y, x);
  return select(x > V(-1), y, select(x == V(-1), V(-__builtin_inf()), V(__builtin_nan(""))));
}

// t - n pi/2 = r + tail for whole n below 2^16 (float), 2^30 (double). The products of n with all parts of
// pi/2 but the last are exact: by FMA, or because the parts are short. Without the tail sin would have 1.5
// ULP, where |r| is just above 1/4.
template <class V> struct Quadrant {
  V r, tail;
  MLPEXT_INLINE Quadrant(V t, V n) {
    if constexpr (is_float<V> && fused_madd) subtract(t, n, -0x1.777a5cp-25, -0x1.ee59dap-50, 0x1.921fb6p0);
    else if constexpr (is_float<V>)
      subtract(t, n, 0x1.68p-39, 0x1.84698ap-48, 0x1.92p0, 0x1.fcp-12, -0x1.58p-21, 0x1.1p-30);
    else if constexpr (fused_madd)
      subtract(t, n, 0x1.1a62633145c07p-54, -0x1.f1976b7ed8fbcp-110, 0x1.921fb54442d18p0);
    else subtract(t, n, 0x1.8cc518p-72, -0x1.fc8f8cbb5bf6cp-97, 0x1.921fb4p0, 0x1.4442dp-24, 0x1.846988p-48);
  }
  template <class... P> MLPEXT_INLINE void subtract(V t, V n, double middle, double last, P... first) {
    ((t = madd(n, V(-first), t)), ...);
    const V p = n * V(middle);
    r = t - p;
    tail =
        madd(n, V(-last), (t - r) - p) - madd(n, V(middle), -p);  // what rounding p and r lost, and the rest
  }
};

// sin(x + shift pi/2), shift 0 or 1; degrees 7 and 8 in float, 13 and 14 in double. Beyond 1e5 (float) or 1e9
// (double), and for infinities, lane by lane with the C library.
template <int shift, class V> MLPEXT_INLINE V sine(V x) {
  using T = typename V::Scalar;
  using F = Format<T>;
  const V t = abs(x);
  const auto n = round_product(t, 0.6366197723675814);
  const Quadrant<V> q(t, n.value());
  const V z = q.r * q.r;
  V s, c;
  if constexpr (is_float<V>) {
    s = horner(z, -1.6666654e-01, 8.332106e-03, -1.9507884e-04);
    c = horner(z, -0.5, 4.1666646e-02, -1.3887307e-03, 2.4431656e-05);
  } else {
    s = horner(z, -0.1666666666666663, 0.00833333333332182, -0.00019841269829332472, 2.7557313527321752e-06,
               -2.505072706501954e-08, 1.589439487838676e-10);
    c = horner(z, -0.5, 0.04166666666666659, -0.0013888888888872186, 2.480158728829582e-05,
               -2.75573140153953e-07, 2.087567817869225e-09, -1.135734732819494e-11);
  }
  s = q.r + madd(q.r * z, s, q.tail);
  c = madd(z, c, V(1));
  const auto quadrant = n.bits() + shift;
  const V odd = from_bits<V>((quadrant & 1) << F::mantissa);
  auto sign = (quadrant & 2) << (F::mantissa + F::exponent - 1);
  if constexpr (shift == 0) sign ^= bits_of(x) & sign_bit<T>;
  V y = from_bits<V>(bits_of(select(odd == V(0), s, c)) ^ sign);
  return patch_lanes(T(is_float<V> ? 1e5 : 1e9), x, y,
                     [](T far) { return T(shift == 0 ? library_sin(far) : library_cos(far)); });
}
// Max ULP, both: float 1.21 (2.48), double 1.13 (1.50).
template <class V> MLPEXT_INLINE V sin(V x) { return sine<0>(x); }
template <class V> MLPEXT_INLINE V cos(V x) { return sine<1>(x); }

// -t^2 / 2 in two parts: rounding the square alone would cost 50 ULP of its exponential at t = 14.
template <class V> MLPEXT_INLINE Pair<V> minus_half_square(V t) {
  const V u = V(-0.5) * t, hi = u * t;
  return {hi, residual(u, t, -hi)};
}
template <class V> constexpr double gaussian_end =
    is_float<V> ? 14.5 : 38.8;  // normal_pdf and normal_cdf(-t) are 0 here

// e^(-x^2/2) / sqrt(2 pi). Max ULP: float 1.27 (1.79), double 1.29 (1.31).
template <class V> MLPEXT_INLINE V normal_pdf(V x) {
  const V t = at_most(abs(x), V(gaussian_end<V>));
  return Exponential<V>(minus_half_square(t)).times(V(0.3989422804014327));
}

// Phi(-t) = erfc(t / sqrt 2) / 2, or t Phi(-t), for t >= 0: e^(-t^2/2) u q(u), u = 1 / (t + b), q of degree 9
// in float, 22 in double. What rounding u, q(u) and their products lost is made good: 2 ULP.
template <bool times_t, class V> MLPEXT_INLINE V normal_tail(V t) {
  t = at_most(t, V(gaussian_end<V>));
  const V b(is_float<V> ? 3.25 : 4.5), d = t + b, u = V(1) / d;
  const V c0(is_float<V> ? 0.39893818 : 0.39894228039030279),
      c1(is_float<V> ? 1.2966915 : 1.7952402653642123);
  V q2;
  if constexpr (is_float<V>)
    q2 = horner(u, 3.8182242, 9.565706, 25.818419, -38.746063, 467.9382, -2297.8506, 4114.5996, -2641.4902);
  else
    q2 = horner(u, 7.6796383727954883, 30.967942057464272, 116.31364372514524, 399.68855291819999,
                1211.7073265685443, 3203.4479930853531, 2618.6357586586123, 45553.242047001837,
                -680851.36056723646, 6648511.5916381036, -59803361.149138486, 398887211.81489761,
                -1977284019.3395315, 6621995975.4977231, -8481585756.9107169, -44561839197.975316,
                299992403084.4471, -885527675755.48293, 1515408242536.4596, -1462728284932.1377,
                622324146153.51355);
  const V q1 = madd(u, q2, c1), q = madd(u, q1, c0);
  if constexpr (V::low_precision) {
    const Exponential<V> g(V(-0.5) * t * t);
    // Near 0 rounded once: half of a subnormal number of 16 bits is often nearly a tie.
    const V y = select(t < V(1e-4), madd(t, V(-0.3989422804014327), V(0.5)), u * q);
    return g.times(times_t ? t * y : y);
  }
  // u's relative error counts 1 + u q'(u) / q(u) times, about a line in u.
  const V u_lost = madd(u, (d - b) - t, residual(-u, d, V(1)));
  const V product = u * q, q_lost = madd(u, madd(u, q2, c1 - q1), madd(u, q1, c0 - q));
  V lost = madd(u, q_lost, residual(u, q, -product));
  lost = madd(product * madd(u, V(is_float<V> ? 5 : 9), V(1)), u_lost, lost);
  const Exponential<V> g(minus_half_square(t));
  const V m = expm1_reduced(g.r), rest = madd(product, m, madd(lost, m, lost)), y = product + rest;
  if constexpr (times_t) return scale(madd(t, y, t * (rest - (y - product))), g.n);
  else return scale(y, g.n);
}

// Max ULP: float 1.8 (2.9), double 2.7 (3.3).
template <class V> MLPEXT_INLINE V normal_cdf(V x) {
  const V tail = normal_tail<false>(abs(x));
  return select(x > V(0), V(1) - tail, tail);
}

// x Phi(x). Max ULP: float 1.2 by the table of AVX-512, 2.0 of AVX2 (2.9), double 2.7 (3.3).
template <class V> MLPEXT_INLINE V times_normal_cdf(V x) {
  const V t = abs(x), positive = at_least(x, V(0));
  auto far = [&] { return positive - normal_tail<true>(t); };
#if MLPEXT_VECTOR_BYTES >= 32
  if constexpr (is_float<V>)
    return near_or_far(t, positive - piecewise(gelu_tail, nearest_gelu_piece(t), t), far);
#endif
  return far();
}
// Its derivative, Phi(x) + x e^(-x^2/2) / sqrt(2 pi).
template <class V> MLPEXT_INLINE V times_normal_cdf_slope(V x) {
  auto far = [&] { return madd(at_most(at_least(x, V(-1000)), V(1000)), normal_pdf(x), normal_cdf(x)); };
#if MLPEXT_VECTOR_BYTES >= 32
  if constexpr (is_float<V>) {
    const V t = abs(x), tail = piecewise(gelu_slope_tail, nearest_gelu_piece(t), t);
    return near_or_far(t, select(x > V(0), V(1) - tail, tail), far);
  }
#endif
  return far();
}

}  // namespace mlpext::MLPEXT_ISA
