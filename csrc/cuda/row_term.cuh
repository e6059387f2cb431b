// SPDX-License-Identifier: Apache-2.0
// What a pair brings to its row: terms and logits of z = scale * d + offset, and bounds.
#pragma once

#include <flashmetric/cuda_rows.h>
#include <exact.cuh>
#include <prims.cuh>

namespace flashmetric::cuda {

// The function of a kind that is not wanted.
struct NoTerm {
  template <class V>
  static __device__ V value(V) {
    return V(0);
  }
  template <class V>
  static __device__ V slope(V) {
    return V(0);
  }
};

template <class F>
__device__ __forceinline__ auto with_any_term(Term term, F&& f) {
  if (term == Term::kNone) return f(NoTerm{});
  return with_term(term, f);
}

constexpr float kLog2E = 1.44269504088896341f;

// A logit and its derivative in z. The weight of a circle logit counts as a constant in that, by
// definition.
template <class T>
struct PairLogit {
  T value, slope;

  __device__ __forceinline__ PairLogit(const PairForm<T>& form, int kind, T z) {
    const T factor = ::fmax(z + form.shape, T(0));
    value = form.circle[kind] ? factor * (z - form.shape) : z;
    slope = form.circle[kind] ? factor : T(1);
  }
};

// z of pairs by one of their rows, for one kind.
template <class T>
struct RoleOfRow {
  T scale, offset, bound, weight, lse;

  __device__ RoleOfRow(const PairRole<T>& role, int kind, int64_t i)
      : scale(role.scale.of(kind, i)),
        offset(role.offset.of(kind, i)),
        bound(role.bound == nullptr ? T(0) : role.bound[kind * role.rows + i]),
        weight(role.weight == nullptr ? T(1) : role.weight[kind * role.rows + i]),
        lse(role.lse == nullptr ? T(0) : role.lse[kind * role.rows + i]) {}

  __device__ T z(T d) const { return ::fma(scale, d, offset); }
};

template <class T>
__device__ __forceinline__ bool is_kept(const PairRole<T>& role, int kind, T bound, T d) {
  return role.bound == nullptr || (kind == 0 ? d > bound : d < bound);
}

// e^x of the softmax.
__device__ __forceinline__ float softmax_exp(float x) { return exp2_fast(x * kLog2E); }
__device__ __forceinline__ double softmax_exp(double x) { return exp(x); }

// The derivative of a weighted log-sum-exp in the distance of one of its pairs.
template <class T>
__device__ __forceinline__ T logit_weight(const PairForm<T>& form, const RoleOfRow<T>& own,
                                          int kind, T d) {
  const PairLogit<T> logit(form, kind, own.z(d));
  // Nothing depends on the sum of no pairs.
  if (own.lse == -static_cast<T>(__builtin_huge_valf())) return T(0);
  return own.weight * own.scale * logit.slope * softmax_exp(logit.value - own.lse);
}

// What one of its rows sees in a pair: derivative in d of that row's part of the objective.
template <class T>
__device__ T pair_weight(const PairForm<T>& form, bool logits, const PairRole<T>& role, int kind,
                         int64_t row, T d) {
  const RoleOfRow<T> own(role, kind, row);
  const Term term = form.term[kind];
  if (term == Term::kNone || !is_kept(role, kind, own.bound, d)) return T(0);
  if (logits) return logit_weight(form, own, kind, d);
  const T z = own.z(d);
  const T slope = with_term(term, [=](auto f) { return decltype(f)::slope(z); });
  return slope == T(0) ? T(0) : own.weight * own.scale * slope;
}

// Beyond this u a negative of row i has neither a loss nor a place in the counts.
__device__ inline float negative_limit(const PairRole<float>& role, const PairForm<float>& form,
                                       bool logits, Distance distance, int64_t i) {
  const Term term = form.term[1];
  // With bounds the pairs that are kept are counted, wanted or not.
  if (term == Term::kNone && (logits || role.bound == nullptr)) return -__builtin_huge_valf();
  const float scale = role.scale.of(1, i);
  float limit = __builtin_huge_valf();
  if (role.bound != nullptr) {
    limit = role.bound[role.rows + i];
  } else if (!logits && (term == Term::kHinge || term == Term::kSquaredHinge) && scale < 0.0f) {
    limit = -role.offset.of(1, i) / scale;
  }
  const float u =
      with_product_distance(distance, [=](auto d) { return decltype(d)::inverse(limit); });
  // A zero row is at u = 2 from rows that have unit length but for the rounding of their dtype.
  const float flat = has_unit_rows(distance) && u > 2.0f ? fmaxf(u, 2.1f) : u;
  // Rounding must not put a pair beyond the limit that is not.
  return flat + fabsf(flat) * 1e-6f;
}

}  // namespace flashmetric::cuda
