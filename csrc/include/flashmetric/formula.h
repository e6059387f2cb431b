// SPDX-License-Identifier: Apache-2.0
// The formulas of the package, each written once: pointwise pair losses and the triplet rule here,
// distances in distance.h. Every native backend instantiates these functors (with float, double or
// a SIMD vector as V), so CPU and CUDA cannot drift. No torch header, no standard library.
#pragma once

#include <flashmetric/distance.h>

namespace flashmetric {

// Pair losses: functions of z, which is the violation of a margin (d - pos_margin or
// neg_margin - d) or in general scale * d + offset. A z that is NaN gives a value and a slope that
// are NaN, also where the slope is a constant.

struct Linear {
  template <class V>
  static FLASHMETRIC_HD V value(V z) {
    return z;
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V z) {
    return select(equal(z, z), V(1), z);
  }
};

struct Square {
  template <class V>
  static FLASHMETRIC_HD V value(V z) {
    return z * z;
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V z) {
    return V(2) * z;
  }
};

struct Hinge {
  template <class V>
  static FLASHMETRIC_HD V value(V z) {
    return max(z, V(0));
  }
  // What is not above 0 is 0 or NaN: the value, which costs nothing beside it.
  template <class V>
  static FLASHMETRIC_HD V slope(V z) {
    return select(greater(z, V(0)), V(1), max(z, V(0)));
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

// log(1 + e^z), also the smooth triplet loss.
struct Softplus {
  template <class V>
  static FLASHMETRIC_HD V value(V z) {
    return max(z, V(0)) + log1p(exp(V(0) - max(z, V(0) - z)));
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V z) {
    return V(1) / (V(1) + exp(V(0) - z));
  }
};

struct Exp {
  template <class V>
  static FLASHMETRIC_HD V value(V z) {
    return exp(z);
  }
  template <class V>
  static FLASHMETRIC_HD V slope(V z) {
    return exp(z);
  }
};

// The square of the logistic function.
struct SquaredSigmoid {
  template <class V>
  static FLASHMETRIC_HD V value(V z) {
    const V s = V(1) / (V(1) + exp(V(0) - z));
    return s * s;
  }
  // Both sigma and 1 - sigma without cancellation or overflow.
  template <class V>
  static FLASHMETRIC_HD V slope(V z) {
    const V tail = exp(V(0) - max(z, V(0) - z)), upper = V(1) / (V(1) + tail);
    const V lower = tail * upper;
    const auto rising = greater(z, V(0));
    const V s = select(rising, upper, lower);
    return V(2) * s * s * select(rising, lower, upper);
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
enum class Term : int {
  kNone,
  kLinear,
  kSquare,
  kHinge,
  kSquaredHinge,
  kSoftplus,
  kExp,
  kSquaredSigmoid
};

// `term` is not kNone: that has no functor.
template <class F>
FLASHMETRIC_HD auto with_term(Term term, F&& f) {
  switch (term) {
    case Term::kLinear:
      return f(Linear{});
    case Term::kSquare:
      return f(Square{});
    case Term::kHinge:
      return f(Hinge{});
    case Term::kSquaredHinge:
      return f(SquaredHinge{});
    case Term::kSoftplus:
      return f(Softplus{});
    case Term::kExp:
      return f(Exp{});
    default:
      return f(SquaredSigmoid{});
  }
}

}  // namespace flashmetric
