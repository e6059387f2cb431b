// SPDX-License-Identifier: Apache-2.0
// One row of a slab against all rows of the other side: what the kernels of the slab engine share.
#pragma once

#include <flashmetric/kernels.h>
#include <exact.cuh>
#include <slab.cuh>

namespace flashmetric::cuda {

template <class T>
class SlabRow {
 public:
  __device__ SlabRow(const SlabProblem& problem, int64_t row_of_slab)
      : problem_(problem),
        i_(problem.begin + row_of_slab),
        label_(problem.x.labels[i_]),
        norm_(static_cast<const T*>(problem.x.norms)[i_]) {}

  __device__ int64_t number() const { return i_; }
  __device__ int64_t m() const { return problem_.r.n; }
  __device__ bool is_self(int64_t j) const { return problem_.self && j == i_; }
  __device__ bool same(int64_t j) const { return problem_.r.labels[j] == label_; }
  __device__ bool difference() const { return is_difference(problem_.distance); }

  __device__ T norm(int64_t j) const { return static_cast<const T*>(problem_.r.norms)[j]; }
  // Zero rows are apart from all others where rows have unit length.
  __device__ bool apart(int64_t j) const { return unit() && (norm_ == T(0) || norm(j) == T(0)); }

  // What orders row j among the others: u without the part that all have in common. A zero row:
  // u = 1 + 1 - 0; and it is at the same distance from every row itself.
  __device__ T key(int64_t j, T product) const {
    if (!difference()) return u(j, product);
    if (unit() && norm_ == T(0)) return T(0);
    return (unit() && norm(j) == T(0) ? T(1) : norm(j)) - T(2) * product;
  }
  // u from the inner product with row j; a direct distance has u in place of products.
  __device__ T u(int64_t j, T product) const {
    if (is_direct(problem_.distance)) return product;
    if (!difference()) return T(-2) * product;
    return apart(j) ? T(2) : norm_ + norm(j) - T(2) * product;
  }
  // Below this u of a difference, products have lost its leading digits.
  __device__ T near_below(int64_t j) const {
    return static_cast<T>(kNearFraction) * (norm_ + norm(j));
  }
  __device__ T value(T u) const {
    return with_distance(problem_.distance, [=](auto d) { return decltype(d)::value(u); });
  }
  // u by exact differences, by a warp.
  __device__ T measure(int64_t j, int lane) const {
    return exact_u(problem_.distance, x(), r(j), problem_.d, lane);
  }
  __device__ const T* x() const { return static_cast<const T*>(problem_.x.rows) + i_ * problem_.d; }
  __device__ const T* r(int64_t j) const {
    return static_cast<const T*>(problem_.r.rows) + j * problem_.d;
  }

 private:
  __device__ bool unit() const { return has_unit_rows(problem_.distance); }

  const SlabProblem& problem_;
  const int64_t i_, label_;
  const T norm_;
};

// The same with labels of any rule.
template <class T>
class LabelledRow : public SlabRow<T> {
 public:
  __device__ LabelledRow(const SlabProblem& problem, const Labelling& labelling,
                         int64_t row_of_slab)
      : SlabRow<T>(problem, row_of_slab), problem_(problem), labelling_(labelling) {}

  // kNeither for the row itself.
  __device__ int kind(int64_t j) const {
    const int64_t words = labelling_.words;
    if (this->is_self(j)) return kNeither;
    return pair_kind(labelling_, problem_.x.labels + this->number() * words,
                     problem_.r.labels + j * words);
  }

 private:
  const SlabProblem& problem_;
  const Labelling& labelling_;
};

}  // namespace flashmetric::cuda
