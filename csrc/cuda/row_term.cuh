// SPDX-License-Identifier: Apache-2.0
// What a pair brings to its row: terms and logits of z = scale * d + offset, and bounds.
#pragma once

#include <pair_tile.cuh>

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
struct PairLogit {
  float value, slope;

  __device__ __forceinline__ PairLogit(const PairForm& form, int kind, float z) {
    const float factor = fmaxf(z + form.shape, 0.0f);
    value = form.circle[kind] ? factor * (z - form.shape) : z;
    slope = form.circle[kind] ? factor : 1.0f;
  }
};

// z of pairs by one of their rows, for one kind.
struct RoleOfRow {
  float scale, offset, bound, weight, lse;

  __device__ RoleOfRow(const PairRole& role, int kind, int64_t i)
      : scale(role.scale.of(kind, i)),
        offset(role.offset.of(kind, i)),
        bound(role.bound == nullptr ? 0.0f : role.bound[kind * role.rows + i]),
        weight(role.weight == nullptr ? 1.0f : role.weight[kind * role.rows + i]),
        lse(role.lse == nullptr ? 0.0f : role.lse[kind * role.rows + i]) {}

  __device__ float z(float d) const { return fmaf(scale, d, offset); }
};

__device__ __forceinline__ bool is_kept(const PairRole& role, int kind, float bound, float d) {
  return role.bound == nullptr || (kind == 0 ? d > bound : d < bound);
}

// Beyond this u a negative of row i has neither a loss nor a place in the counts.
__device__ inline float negative_limit(const PairRole& role, const PairForm& form, bool logits,
                                       Distance distance, int64_t i) {
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
