// SPDX-License-Identifier: Apache-2.0
// What the consumers of distances share: one row of them, and thresholds.
#pragma once

#include <flashmetric/cuda_select.h>
#include <candidate.cuh>

namespace flashmetric::cuda {

// The distances of the block's row; NaN is no candidate.
template <class T>
class DistanceRow {
 public:
  __device__ explicit DistanceRow(const DistanceRows& rows)
      : at_(static_cast<const T*>(rows.slab) + blockIdx.x * rows.m), m_(rows.m) {}

  __device__ int64_t m() const { return m_; }
  __device__ T operator[](int64_t j) const { return at_[j]; }

  // In every thread of the block.
  __device__ bool has_candidates() const {
    bool found = false;
    for (int64_t j = threadIdx.x; j < m_; j += kSlabThreads) found = found || at_[j] == at_[j];
    return __syncthreads_or(found);
  }

 private:
  const T* at_;
  const int64_t m_;
};

__device__ __forceinline__ bool is_padding(double threshold) {
  return threshold == -static_cast<double>(__int_as_float(0x7f800000));
}

// The lowest number that is not below the threshold: d is below both or neither.
__device__ __forceinline__ float limit_of(double threshold, float) {
  return __double2float_ru(threshold);
}
__device__ __forceinline__ double limit_of(double threshold, double) { return threshold; }

template <class F>
__device__ __forceinline__ auto with_threshold_term(Term term, F&& f) {
  switch (term) {
    case Term::kHinge:
      return f(Hinge{});
    case Term::kSquaredHinge:
      return f(SquaredHinge{});
    case Term::kSoftplus:
      return f(Softplus{});
    default:
      return f(SquaredSigmoid{});
  }
}

// The first of `count` ascending numbers that f(number) says true of; count: none.
template <class F>
__device__ __forceinline__ int64_t first_of(int64_t count, F&& f) {
  int64_t begin = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    const bool found = f(begin + half);
    begin = found ? begin : begin + half + 1;
    count = found ? half : count - half - 1;
  }
  return begin;
}

}  // namespace flashmetric::cuda
