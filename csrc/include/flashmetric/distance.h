// SPDX-License-Identifier: Apache-2.0
// The distances, value beside derivative, and the arithmetic that they and formula.h need. Functors
// for float, double or a SIMD vector as V, on CPU and CUDA. No torch header, no standard library.
#pragma once

#if defined(__CUDACC__)
#define FLASHMETRIC_HD __host__ __device__ __forceinline__
#else
#define FLASHMETRIC_HD inline __attribute__((always_inline))
#endif

namespace flashmetric {

// Scalar forms of the vector vocabulary that the functors use; SIMD types bring their own.
FLASHMETRIC_HD float max(float a, float b) { return a < b ? b : a; }
FLASHMETRIC_HD double max(double a, double b) { return a < b ? b : a; }
FLASHMETRIC_HD float sqrt(float a) { return __builtin_sqrtf(a); }
FLASHMETRIC_HD double sqrt(double a) { return __builtin_sqrt(a); }
FLASHMETRIC_HD float exp(float a) { return __builtin_expf(a); }
FLASHMETRIC_HD double exp(double a) { return __builtin_exp(a); }
FLASHMETRIC_HD float expm1(float a) { return __builtin_expm1f(a); }
FLASHMETRIC_HD double expm1(double a) { return __builtin_expm1(a); }
#if defined(__CUDA_ARCH__)
// Of angles up to pi: the device's own sine reduces large arguments in local memory.
FLASHMETRIC_HD float sin(float a) { return ::sinpif(a * 0.318309886183790672f); }
FLASHMETRIC_HD double sin(double a) { return ::sinpi(a * 0.318309886183790672); }
#else
FLASHMETRIC_HD float sin(float a) { return __builtin_sinf(a); }
FLASHMETRIC_HD double sin(double a) { return __builtin_sin(a); }
#endif
FLASHMETRIC_HD float asin(float a) { return __builtin_asinf(a); }
FLASHMETRIC_HD double asin(double a) { return __builtin_asin(a); }
FLASHMETRIC_HD float log1p(float a) { return __builtin_log1pf(a); }
FLASHMETRIC_HD double log1p(double a) { return __builtin_log1p(a); }
FLASHMETRIC_HD bool greater(float a, float b) { return a > b; }
FLASHMETRIC_HD bool greater(double a, double b) { return a > b; }
FLASHMETRIC_HD bool equal(float a, float b) { return a == b; }
FLASHMETRIC_HD bool equal(double a, double b) { return a == b; }
FLASHMETRIC_HD float select(bool mask, float a, float b) { return mask ? a : b; }
FLASHMETRIC_HD double select(bool mask, double a, double b) { return mask ? a : b; }

// Distances.
// All are functions of one number u:
//   kDifference: u = |x - r|^2 = bias(x) + bias(r) - 2 x.r, gradient of u in x = 2 (x - r)
//   kDirect:     u = sum of term(x_k, r_k), which no inner product yields, gradient(x_k, r_k)
//   neither:     u = -2 x.r                               , gradient of u in x = -2 r
// value(u) is the distance, slope(value) = d value / d u. Every distance grows with u.
// kUnitRows: rows have unit length, except zero rows, which are at u = 2 from every row.

struct Euclidean {
  static constexpr bool kDifference = true;
  static constexpr bool kUnitRows = false;
  static constexpr bool kDirect = false;
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    return sqrt(max(u, V(0)));
  }
  // The root has no derivative at zero; 0 is the subgradient that keeps duplicates finite. The test
  // is for equality, so a NaN distance still gives a NaN gradient.
  template <class V>
  static FLASHMETRIC_HD V slope(V value) {
    return select(equal(value, V(0)), V(0), V(0.5) / value);
  }
  // The u below which value(u) < bound can hold.
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    return bound > T(0) ? bound * bound : T(0);
  }
};

struct Sqeuclidean {
  static constexpr bool kDifference = true;
  static constexpr bool kUnitRows = false;
  static constexpr bool kDirect = false;
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    return max(u, V(0));
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V) {
    return V(1);
  }
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    return bound;
  }
};

// 1 - x.r of unit rows, as half the squared difference: exact for near-duplicates, never negative.
struct Cosine {
  static constexpr bool kDifference = true;
  static constexpr bool kUnitRows = true;
  static constexpr bool kDirect = false;
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    return V(0.5) * max(u, V(0));
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V) {
    return V(0.5);
  }
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    return T(2) * bound;
  }
};

struct Dot {
  static constexpr bool kDifference = false;
  static constexpr bool kUnitRows = false;
  static constexpr bool kDirect = false;
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    return V(0.5) * u;
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V) {
    return V(0.5);
  }
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    return T(2) * bound;
  }
};

// The angle between unit rows, in radians. By the half chord: the angle keeps its digits where it
// is small.
struct Angular {
  static constexpr double kPi = 3.14159265358979323846;
  static constexpr bool kDifference = true;
  static constexpr bool kUnitRows = true;
  static constexpr bool kDirect = false;
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    const V half_chord = V(0.5) * sqrt(max(u, V(0)));
    // Of the half chord and 1 the smaller, or NaN.
    return V(2) * asin(V(0) - max(V(0) - half_chord, V(-1)));
  }
  // No derivative at 0 and at pi: 0 keeps duplicates and opposites finite.
  template <class V>
  static FLASHMETRIC_HD V slope(V value) {
    const V s = sin(value);
    const V slope = select(greater(V(0), s), V(0), select(equal(s, V(0)), V(0), V(0.5) / s));
    return select(equal(value, V(kPi)), V(0), slope);
  }
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    if (!(bound < T(kPi))) return static_cast<T>(__builtin_inff());
    const T chord = T(2) * sin(T(0.5) * max(bound, T(0)));
    return chord * chord;
  }
};

// sqrt(1 - x.r) of unit rows.
struct SqrtCosine {
  static constexpr bool kDifference = true;
  static constexpr bool kUnitRows = true;
  static constexpr bool kDirect = false;
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    return sqrt(V(0.5) * max(u, V(0)));
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V value) {
    return select(equal(value, V(0)), V(0), V(0.25) / value);
  }
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    return bound > T(0) ? T(2) * bound * bound : T(0);
  }
};

// 1 - exp(-|x - r|^2), the Gaussian kernel as a distance. Its slope has the absolute error of the
// distance, half a unit in the last place of 1: of rows far beyond the width, whose slope is below
// that, the gradient is 0. (exp(-u) would keep its digits, but u is gone where slopes are needed.)
struct Rbf {
  static constexpr bool kDifference = true;
  static constexpr bool kUnitRows = false;
  static constexpr bool kDirect = false;
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    return V(0) - expm1(V(0) - max(u, V(0)));
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V value) {
    return V(1) - value;
  }
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    return bound < T(1) ? -log1p(-max(bound, T(0))) : static_cast<T>(__builtin_inff());
  }
};

struct Cityblock {
  static constexpr bool kDifference = false;
  static constexpr bool kUnitRows = false;
  static constexpr bool kDirect = true;
  template <class V>
  static FLASHMETRIC_HD V term(V x, V r) {
    const V t = x - r;
    return max(t, V(0) - t);
  }
  template <class V>
  static FLASHMETRIC_HD V gradient(V x, V r) {
    return select(greater(x, r), V(1), select(greater(r, x), V(-1), V(0)));
  }
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    return max(u, V(0));
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V) {
    return V(1);
  }
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    return bound;
  }
};

// The chi-squared distance of histograms; features that are 0 in both count nothing.
struct Chi2 {
  static constexpr bool kDifference = false;
  static constexpr bool kUnitRows = false;
  static constexpr bool kDirect = true;
  template <class V>
  static FLASHMETRIC_HD V term(V x, V r) {
    const V t = x - r, s = x + r;
    return select(equal(s, V(0)), V(0), t * t / s);
  }
  template <class V>
  static FLASHMETRIC_HD V gradient(V x, V r) {
    const V s = x + r;
    return select(equal(s, V(0)), V(0), ((x - r) / s) * ((x + V(3) * r) / s));
  }
  template <class V>
  static FLASHMETRIC_HD V value(V u) {
    return max(u, V(0));
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V) {
    return V(1);
  }
  template <class T>
  static FLASHMETRIC_HD T inverse(T bound) {
    return bound;
  }
};

// Run time -> compile time.
enum class Distance : int {
  kEuclidean,
  kSqeuclidean,
  kCosine,
  kDot,
  kAngular,
  kSqrtCosine,
  kRbf,
  kCityblock,
  kChi2
};

// Calls f with the functor that `distance` names: the same as writing the call nine times.
template <class F>
FLASHMETRIC_HD auto with_distance(Distance distance, F&& f) {
  switch (distance) {
    case Distance::kEuclidean:
      return f(Euclidean{});
    case Distance::kSqeuclidean:
      return f(Sqeuclidean{});
    case Distance::kCosine:
      return f(Cosine{});
    case Distance::kAngular:
      return f(Angular{});
    case Distance::kSqrtCosine:
      return f(SqrtCosine{});
    case Distance::kRbf:
      return f(Rbf{});
    case Distance::kCityblock:
      return f(Cityblock{});
    case Distance::kChi2:
      return f(Chi2{});
    default:
      return f(Dot{});
  }
}

FLASHMETRIC_HD constexpr bool is_direct(Distance distance) {
  return distance == Distance::kCityblock || distance == Distance::kChi2;
}
FLASHMETRIC_HD constexpr bool is_difference(Distance distance) {
  return distance != Distance::kDot && !is_direct(distance);
}
FLASHMETRIC_HD constexpr bool has_unit_rows(Distance distance) {
  return distance == Distance::kCosine || distance == Distance::kAngular ||
         distance == Distance::kSqrtCosine;
}

// Derivative in u of the distance that has this value. A NaN distance has a NaN gradient, also
// where the slope is a constant.
template <class T>
FLASHMETRIC_HD T slope_at(Distance distance, T value) {
  if (value != value) return value;
  return with_distance(distance, [=](auto d) { return decltype(d)::slope(value); });
}

}  // namespace flashmetric
