// SPDX-License-Identifier: Apache-2.0
// exp, expm1, log1p, asin and sin of vectors, on the ranges that formula.h needs, to about 2 units
// in the last place. Taylor series after a reduction of the argument: a few more terms than a
// fitted polynomial, and no table of constants that cannot be checked by eye.
#pragma once

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// Terms after which the series leave less than half a unit in the last place.
template <class T>
struct Terms {
  static constexpr bool kSingle = sizeof(T) == 4;
  static constexpr int kExp = kSingle ? 7 : 13;    // |r| <= ln(2) / 2
  static constexpr int kLog1p = kSingle ? 7 : 17;  // s^2 <= 1/9
  static constexpr int kAsin = kSingle ? 10 : 25;  // z <= 1/4
  static constexpr int kSin = kSingle ? 6 : 10;    // r <= pi/2
};

constexpr double kPi = 3.14159265358979323846;

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }
constexpr double asin_coefficient(int k) {
  return k == 0 ? 1.0 : asin_coefficient(k - 1) * (2 * k - 1) * (2 * k - 1) / (2 * k * (2 * k + 1));
}

// Coefficients of one series in the type of the vectors.
template <class T, int kCount>
struct Series {
  T c[kCount];
  // c[0] + z c[1] + z^2 c[2] ...
  FLASHMETRIC_INLINE Vec<T> operator()(Vec<T> z) const {
    Vec<T> sum(c[kCount - 1]);
#pragma GCC unroll 32
    for (int k = kCount - 2; k >= 0; --k) sum = fma(sum, z, Vec<T>(c[k]));
    return sum;
  }
};

// e^r = 1 + r + r^2 series(r)
template <class T>
constexpr Series<T, Terms<T>::kExp - 1> exp_series() {
  Series<T, Terms<T>::kExp - 1> s{};
  for (int k = 2; k <= Terms<T>::kExp; ++k) s.c[k - 2] = static_cast<T>(inverse_factorial(k));
  return s;
}
// 2^r = series(r)
template <class T>
constexpr Series<T, Terms<T>::kExp + 1> exp2_series() {
  Series<T, Terms<T>::kExp + 1> s{};
  double power = 1;  // ln(2)^k
  for (int k = 0; k <= Terms<T>::kExp; ++k, power *= 0.693147180559945309417)
    s.c[k] = static_cast<T>(power * inverse_factorial(k));
  return s;
}
// atanh(s) = s + s z series(z), z = s^2
template <class T>
constexpr Series<T, Terms<T>::kLog1p> atanh_series() {
  Series<T, Terms<T>::kLog1p> s{};
  for (int k = 1; k <= Terms<T>::kLog1p; ++k) s.c[k - 1] = static_cast<T>(1.0 / (2 * k + 1));
  return s;
}
// asin(w) = w + w z series(z), z = w^2
template <class T>
constexpr Series<T, Terms<T>::kAsin> asin_series() {
  Series<T, Terms<T>::kAsin> s{};
  for (int k = 1; k <= Terms<T>::kAsin; ++k) s.c[k - 1] = static_cast<T>(asin_coefficient(k));
  return s;
}
// sin(r) = r + r z series(z), z = r^2
template <class T>
constexpr Series<T, Terms<T>::kSin> sin_series() {
  Series<T, Terms<T>::kSin> s{};
  for (int k = 1; k <= Terms<T>::kSin; ++k)
    s.c[k - 1] = static_cast<T>((k % 2 == 0 ? 1 : -1) * inverse_factorial(2 * k + 1));
  return s;
}

// x = n ln(2) + r, and e^r - 1. Arguments whose exponential is 0 or infinite are brought to where
// 2^n still is; NaN stays NaN.
template <class T>
struct ReducedExp {
  Vec<T> n, expm1_r;

  FLASHMETRIC_INLINE explicit ReducedExp(Vec<T> x) {
    constexpr bool kSingle = Terms<T>::kSingle;
    // ln(2) in two parts, of which the first has enough trailing zeros for exact products.
    constexpr double kHigh = kSingle ? 0.693359375 : 6.93147180369123816490e-01;
    constexpr double kLow = kSingle ? -2.12194440054690583e-4 : 1.90821492927058770002e-10;
    x = min(max(x, Vec<T>(kSingle ? -104 : -746)), Vec<T>(kSingle ? 89 : 710));
    n = round(x * Vec<T>(1.44269504088896340736));
    const Vec<T> r = fma(n, Vec<T>(-kLow), fma(n, Vec<T>(-kHigh), x));
    constexpr auto series = exp_series<T>();
    expm1_r = fma(r * r, series(r), r);
  }
};

template <class T>
FLASHMETRIC_INLINE Vec<T> exp(Vec<T> x) {
  const ReducedExp<T> e(x);
  return ldexp(Vec<T>(1) + e.expm1_r, e.n);
}

// 2^x. Short sums side by side: in a loop of little else the latency of one long sum is what takes
// the time.
template <class T>
FLASHMETRIC_INLINE Vec<T> exp2(Vec<T> x) {
  constexpr auto s = exp2_series<T>();
  x = min(max(x, Vec<T>(Terms<T>::kSingle ? -150.5 : -1076)),
          Vec<T>(Terms<T>::kSingle ? 128.5 : 1024.5));
  const Vec<T> n = round(x), r = x - n, r2 = r * r, r4 = r2 * r2;
  Vec<T> sum(0);
  constexpr int kLast = Terms<T>::kExp;
#pragma GCC unroll 4
  for (int k = kLast / 4 * 4; k >= 0; k -= 4) {
    Vec<T> low(s.c[k]), high(0);
    if (k + 1 <= kLast) low = fma(Vec<T>(s.c[k + 1]), r, low);
    if (k + 2 <= kLast) high = Vec<T>(s.c[k + 2]);
    if (k + 3 <= kLast) high = fma(Vec<T>(s.c[k + 3]), r, high);
    const Vec<T> four = k + 2 <= kLast ? fma(high, r2, low) : low;
    sum = k == kLast / 4 * 4 ? four : fma(sum, r4, four);
  }
  return ldexp(sum, n);
}

// For x <= 0.
template <class T>
FLASHMETRIC_INLINE Vec<T> expm1(Vec<T> x) {
  const ReducedExp<T> e(x);
  const Vec<T> power = ldexp(Vec<T>(1), e.n);
  return fma(e.expm1_r, power, power - Vec<T>(1));
}

// For 0 <= t <= 1: log(1 + t) = 2 atanh(t / (2 + t)).
template <class T>
FLASHMETRIC_INLINE Vec<T> log1p(Vec<T> t) {
  constexpr auto series = atanh_series<T>();
  const Vec<T> s = t / (t + Vec<T>(2)), z = s * s, twice = s + s;
  return fma(twice * z, series(z), twice);
}

// For 0 <= w <= 1.
template <class T>
FLASHMETRIC_INLINE Vec<T> asin(Vec<T> w) {
  constexpr auto series = asin_series<T>();
  const auto large = greater(w, Vec<T>(0.5));
  const Vec<T> z = select(large, Vec<T>(0.5) * (Vec<T>(1) - w), w * w);
  const Vec<T> root = select(large, sqrt(z), w);
  const Vec<T> angle = fma(root * z, series(z), root);
  return select(large, fma(Vec<T>(-2), angle, Vec<T>(kPi / 2)), angle);
}

// For 0 <= v <= pi, or the number next to it.
template <class T>
FLASHMETRIC_INLINE Vec<T> sin(Vec<T> v) {
  constexpr auto series = sin_series<T>();
  // What pi has beyond its nearest number.
  constexpr double kRest = Terms<T>::kSingle ? -8.74227800037248566e-8 : 1.22464679914735321e-16;
  const Vec<T> r = select(greater(v, Vec<T>(kPi / 2)), (Vec<T>(kPi) - v) + Vec<T>(kRest), v);
  const Vec<T> z = r * r;
  return fma(r * z, series(z), r);
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
