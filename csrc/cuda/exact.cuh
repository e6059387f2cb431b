// SPDX-License-Identifier: Apache-2.0
// Exact distances of single pairs, one warp a pair: differences of the rows as they came. Lanes
// read neighbouring columns and add in a fixed order.
#pragma once

#include <flashmetric/cuda_kernels.h>

namespace flashmetric::cuda {

template <class S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class S>
using accumulate_t = typename Accumulate<S>::type;

// Calls f with a zero of the type that `scalar` names: with_scalar and double.
template <class F>
__host__ __device__ __forceinline__ void with_rows(Scalar scalar, F&& f) {
  if (scalar == Scalar::kDouble) return f(double{});
  with_scalar(scalar, f);
}

constexpr uint32_t kAllLanes = 0xffffffffu;

template <class T>
__device__ __forceinline__ T not_a_number() {
  return static_cast<T>(__uint_as_float(0x7fc00000u));
}

// Whether a preparing block found a row whose distances are not finite. In every thread of the
// block.
__device__ __forceinline__ bool any_bad(const uint32_t* bad, int count) {
  bool found = false;
  for (int t = static_cast<int>(threadIdx.x); t < count; t += static_cast<int>(blockDim.x))
    found = found || bad[t] != 0;
  return __syncthreads_or(found);
}

// Sum over the lanes of a warp, the same bits in each of them.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

// u of rows x and r (see formula.h), in every lane.
template <class S>
__device__ __forceinline__ accumulate_t<S> exact_u(Distance distance, const S* x, const S* r,
                                                   int64_t d, int lane) {
  using T = accumulate_t<S>;
  const bool difference = distance != Distance::kDot;
  const bool unit = distance == Distance::kCosine;
  T sum = 0, x_norm = 0, r_norm = 0;
  for (int64_t k = lane; k < d; k += kWarp) {
    const T a = static_cast<T>(x[k]), b = static_cast<T>(r[k]);
    const T t = a - b;
    sum += difference ? t * t : a * b;
    if (unit) {
      x_norm += a * a;
      r_norm += b * b;
    }
  }
  sum = warp_sum(sum);
  if (unit) {
    // The cosine of a zero row is 0 by definition, so its distance 1 and u = 2.
    const bool apart = warp_sum(x_norm) == T(0) || warp_sum(r_norm) == T(0);
    return apart ? T(2) : sum;
  }
  return difference ? sum : T(-2) * sum;
}

}  // namespace flashmetric::cuda
