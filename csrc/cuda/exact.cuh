// SPDX-License-Identifier: Apache-2.0
// Exact distances of single pairs, one warp a pair: differences of the rows as they came. Lanes
// read neighbouring columns and add in a fixed order.
#pragma once

#include <flashmetric/cuda_kernels.h>
#include <flashmetric/kernels.h>

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

// In the type of the tile engine's arithmetic: a product with the double would be one of doubles.
constexpr float kNearFraction = static_cast<float>(flashmetric::kNearFraction);

// Whether there are distances that are not finite. In every thread of the block.
__device__ __forceinline__ bool is_poisoned(const PairProblem& problem, const uint32_t* bad,
                                            int count) {
  const bool has_pairs = problem.ref.n > (problem.self ? 1 : 0);
  return any_bad(bad, has_pairs ? count : 0);
}

// Sum over the lanes of a warp, the same bits in each of them.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

// u of rows x and r (see distance.h), in every lane.
template <class S>
__device__ __forceinline__ accumulate_t<S> exact_u(Distance distance, const S* x, const S* r,
                                                   int64_t d, int lane) {
  using T = accumulate_t<S>;
  const bool difference = is_difference(distance), unit = has_unit_rows(distance);
  T sum = 0, x_norm = 0, r_norm = 0;
  for (int64_t k = lane; k < d; k += kWarp) {
    const T a = static_cast<T>(x[k]), b = static_cast<T>(r[k]);
    const T t = a - b;
    if (distance == Distance::kCityblock) {
      sum += Cityblock::term(a, b);
    } else if (distance == Distance::kChi2) {
      sum += Chi2::term(a, b);
    } else {
      sum += difference ? t * t : a * b;
    }
    if (unit) {
      x_norm += a * a;
      r_norm += b * b;
    }
  }
  sum = warp_sum(sum);
  if (unit) {
    // A zero row is at u = 2 from every row by definition.
    const bool apart = warp_sum(x_norm) == T(0) || warp_sum(r_norm) == T(0);
    return apart ? T(2) : sum;
  }
  return distance == Distance::kDot ? T(-2) * sum : sum;
}

// Calls f with the functor of a distance that inner products yield: with_distance without the
// direct ones, which the tile engine does not serve.
template <class F>
__device__ __forceinline__ auto with_product_distance(Distance distance, F&& f) {
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
    default:
      return f(Dot{});
  }
}

}  // namespace flashmetric::cuda
