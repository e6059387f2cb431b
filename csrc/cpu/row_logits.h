// SPDX-License-Identifier: Apache-2.0
// The logits of log-sum-exps, for the forward and the backward kernel.
#pragma once

#include <block.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// The logits of one kind for row i; kByColumn: of its pairs for the columns.
template <class T, bool kCircle, bool kByColumn>
class RowLogits {
 public:
  RowLogits(const RowLogit<T>& kind, T shape, bool positive, int64_t i)
      : scales_(kind.scale),
        offsets_(kind.offset),
        bounds_(kind.bound),
        positive_(positive),
        shape_(shape),
        scale_(kind.scale[i]),
        offset_(kind.offset[i]),
        bound_(kind.bound == nullptr ? T(0) : kind.bound[i]) {}

  FLASHMETRIC_INLINE Vec<T> z(Vec<T> d, int64_t j) const {
    return fma(scale(j), d, kByColumn ? Vec<T>::load(offsets_ + j) : offset_);
  }
  FLASHMETRIC_INLINE Vec<T> value(Vec<T> z) const {
    return kCircle ? max(z + shape_, Vec<T>(0)) * (z - shape_) : z;
  }
  // Derivative of the logit in d.
  FLASHMETRIC_INLINE Vec<T> slope(Vec<T> z, int64_t j) const {
    return kCircle ? max(z + shape_, Vec<T>(0)) * scale(j) : scale(j);
  }
  FLASHMETRIC_INLINE typename Vec<T>::M kept(unsigned bits, Vec<T> d, int64_t j) const {
    const auto mask = Vec<T>::mask(bits);
    if (bounds_ == nullptr) return mask;
    const Vec<T> bound = kByColumn ? Vec<T>::load(bounds_ + j) : bound_;
    return mask & (positive_ ? greater(d, bound) : less(d, bound));
  }

 private:
  FLASHMETRIC_INLINE Vec<T> scale(int64_t j) const {
    return kByColumn ? Vec<T>::load(scales_ + j) : scale_;
  }

  const T *const scales_, *const offsets_, *const bounds_;
  const bool positive_;
  const Vec<T> shape_, scale_, offset_, bound_;
};

// Calls f with those logits.
template <bool kByColumn, class T, class F>
FLASHMETRIC_INLINE void with_logits(const RowLse<T>& op, int k, int64_t i, F&& f) {
  if (op.kinds[k].form == Logit::kCircle) {
    f(RowLogits<T, true, kByColumn>(op.kinds[k], op.shape, k == 0, i));
  } else {
    f(RowLogits<T, false, kByColumn>(op.kinds[k], op.shape, k == 0, i));
  }
}

// Whether rows may go through logits in one loop from products on: affine logits of distances that
// are linear in u. With more of both there would be too many kernels of that loop.
template <class T>
bool in_one_loop(const RowLse<T>& op, Distance distance) {
  return op.kinds[0].form != Logit::kCircle && op.kinds[1].form != Logit::kCircle &&
         (distance == Distance::kCosine || distance == Distance::kSqeuclidean ||
          distance == Distance::kDot);
}

template <class F>
FLASHMETRIC_INLINE bool with_linear_distance(Distance distance, F&& f) {
  if (distance == Distance::kCosine) return f(Cosine{});
  if (distance == Distance::kSqeuclidean) return f(Sqeuclidean{});
  return f(Dot{});
}

// e^(logit - centre) of one row and kind. The logit is rounded as everywhere else: with scale and
// offset folded into the power the errors of a logit and of the log-sum-exp over it, which of large
// ones are larger than 1, would not cancel.
template <class T>
class AffinePower {
 public:
  AffinePower(const RowLogit<T>& kind, T centre, int64_t i)
      : scale_(kind.scale[i]), offset_(kind.offset[i]), centre_(centre) {}

  FLASHMETRIC_INLINE Vec<T> operator()(Vec<T> d) const {
    return exp2(Vec<T>(1.44269504088896340736) * (fma(scale_, d, offset_) - centre_));
  }

 private:
  const Vec<T> scale_, offset_, centre_;
};

// Labels, u and distances of row i; whether it has any pair.
template <class T>
FLASHMETRIC_INLINE bool measure_row(const PairBlock<T>& pairs, int64_t i, Kinds<T>& kinds) {
  if (!pairs.label(i, kinds) || !pairs.measure(i, kinds)) return false;
  pairs.to_distance(i, kinds);
  return true;
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
