// SPDX-License-Identifier: Apache-2.0
// The formulas of the package, each written once: distances and pointwise pair losses, value beside
// derivative. Every native backend instantiates these functors (with float, double or a SIMD vector
// as V), so CPU and CUDA cannot drift. No torch header, no standard library.
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
FLASHMETRIC_HD float log1p(float a) { return __builtin_log1pf(a); }
FLASHMETRIC_HD double log1p(double a) { return __builtin_log1p(a); }
FLASHMETRIC_HD bool greater(float a, float b) { return a > b; }
FLASHMETRIC_HD bool greater(double a, double b) { return a > b; }
FLASHMETRIC_HD bool equal(float a, float b) { return a == b; }
FLASHMETRIC_HD bool equal(double a, double b) { return a == b; }
FLASHMETRIC_HD float select(bool mask, float a, float b) { return mask ? a : b; }
FLASHMETRIC_HD double select(bool mask, double a, double b) { return mask ? a : b; }

// Distances.
// All four are functions of one number u that a tile of inner products yields:
//   kDifference: u = |x - r|^2 = bias(x) + bias(r) - 2 x.r, gradient of u in x = 2 (x - r)
//   otherwise:   u = -2 x.r                               , gradient of u in x = -2 r
// value(u) is the distance, slope(value) = d value / d u.

struct Euclidean {
  static constexpr bool kDifference = true;
  static constexpr bool kUnitRows = false;
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

// Pair losses: functions of the violation z = d - pos_margin or z = neg_margin - d.

struct Hinge {
  template <class V>
  static FLASHMETRIC_HD V value(V z) {
    return max(z, V(0));
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V z) {
    return select(greater(z, V(0)), V(1), V(0));
  }
};

struct SquaredHinge {
  template <class V>
  static FLASHMETRIC_HD V value(V z) {
    const V t = max(z, V(0));
    return t * t;
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V z) {
    return V(2) * max(z, V(0));
  }
};

// Triplet losses: functions of v = d(a, p) - d(a, n) + margin; Hinge, or:

struct Softplus {
  template <class T>
  static FLASHMETRIC_HD T value(T v) {
    return max(v, T(0)) + log1p(exp(v > T(0) ? -v : v));
  }
  template <class T>
  static FLASHMETRIC_HD T slope(T v) {
    return T(1) / (T(1) + exp(-v));
  }
};

enum class Reduction : int { kMean, kMeanNonzero, kSum };

// What one anchor brings to the reduced loss of the hardest triplets.
template <class T>
struct TripletTerm {
  T loss;         // 0 for anchors left out
  T slope;        // d loss / d d(a, p) = -(d loss / d d(a, n))
  bool counted;   // in the divisor of a mean
  bool poisoned;  // a NaN distance: no finite loss may have a NaN gradient
};

template <class T>
struct TripletRule {
  T margin;
  bool smooth;  // softplus in place of the hinge
  bool keep;    // count anchors that lack a positive or a negative
  Reduction reduction;

  FLASHMETRIC_HD TripletTerm<T> term(bool has_positive, bool has_negative, T d_ap, T d_an) const {
    // Kept anchors: a missing positive is at distance 0 already; a missing negative is as far as
    // the positive, so that neither distance moves the loss.
    const bool moving = has_negative && (has_positive || keep);
    const T v = moving ? d_ap - d_an + margin : margin;
    TripletTerm<T> term{T(0), T(0), moving || keep, d_ap != d_ap || d_an != d_an};
    if (term.counted) term.loss = smooth ? Softplus::value(v) : Hinge::value(v);
    if (moving) term.slope = smooth ? Softplus::slope(v) : Hinge::slope(v);
    if (reduction == Reduction::kMeanNonzero) term.counted = term.loss != T(0);
    return term;
  }

  // What the sum of the losses is divided by.
  FLASHMETRIC_HD double divisor(long long counted) const {
    return reduction == Reduction::kSum || counted < 1 ? 1.0 : static_cast<double>(counted);
  }
};

// Run time -> compile time.
enum class Distance : int { kEuclidean, kSqeuclidean, kCosine, kDot };
enum class Formula : int { kHinge, kSquaredHinge };

// Calls f with the functor that `distance` names: the same as writing the call four times.
template <class F>
FLASHMETRIC_HD auto with_distance(Distance distance, F&& f) {
  switch (distance) {
    case Distance::kEuclidean:
      return f(Euclidean{});
    case Distance::kSqeuclidean:
      return f(Sqeuclidean{});
    case Distance::kCosine:
      return f(Cosine{});
    default:
      return f(Dot{});
  }
}

// Derivative in u of the distance that has this value. A NaN distance has a NaN gradient, also
// where the slope is a constant.
template <class T>
FLASHMETRIC_HD T slope_at(Distance distance, T value) {
  if (value != value) return value;
  return with_distance(distance, [=](auto d) { return decltype(d)::slope(value); });
}

template <class F>
FLASHMETRIC_HD auto with_formula(Formula formula, F&& f) {
  return formula == Formula::kHinge ? f(Hinge{}) : f(SquaredHinge{});
}

}  // namespace flashmetric
