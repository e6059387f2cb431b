// SPDX-License-Identifier: Apache-2.0
// Listed pairs by exact differences: no cancellation, whatever the norms.
#pragma once

#include <simd.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

template <class D, class T>
FLASHMETRIC_INLINE Vec<T> exact_step(Vec<T> x, Vec<T> y, Vec<T> sum) {
  if constexpr (D::kDifference) {
    const Vec<T> t = x - y;
    return fma(t, t, sum);
  } else if constexpr (D::kDirect) {
    return sum + D::term(x, y);
  } else {
    return fma(x, y, sum);
  }
}

// u of x against kPairs rows at once, so that a load of x serves several of them.
template <class D, class T, int kPairs>
FLASHMETRIC_INLINE void exact_rows(const T* x, const T* const (&y)[kPairs], int64_t d,
                                   T (&u)[kPairs]) {
  constexpr int kLanes = Vec<T>::kLanes;
  Vec<T> sum[kPairs];
#pragma GCC unroll 4
  for (int t = 0; t < kPairs; ++t) sum[t] = Vec<T>(0);
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    const Vec<T> a = Vec<T>::load(x + k);
#pragma GCC unroll 4
    for (int t = 0; t < kPairs; ++t) sum[t] = exact_step<D>(a, Vec<T>::load(y[t] + k), sum[t]);
  }
  if (k < d) {
    const int left = static_cast<int>(d - k);
    const Vec<T> a = Vec<T>::load_first(x + k, left);
#pragma GCC unroll 4
    for (int t = 0; t < kPairs; ++t)
      sum[t] = exact_step<D>(a, Vec<T>::load_first(y[t] + k, left), sum[t]);
  }
#pragma GCC unroll 4
  for (int t = 0; t < kPairs; ++t)
    u[t] = D::kDifference || D::kDirect ? sum[t].sum() : T(-2) * sum[t].sum();
}

template <class D, class T, int kPairs>
FLASHMETRIC_INLINE void exact_list(const T* x, T x_norm, const Side<T>& other, const int32_t* list,
                                   T* u) {
  const T* y[kPairs];
  T result[kPairs];
#pragma GCC unroll 4
  for (int t = 0; t < kPairs; ++t) y[t] = other.rows + int64_t(list[t]) * other.d;
  exact_rows<D>(x, y, other.d, result);
  for (int t = 0; t < kPairs; ++t) {
    // The cosine of a zero row is 0 by definition, so its distance 1 and u = 2.
    const bool zero = D::kUnitRows && (x_norm == T(0) || other.norms[list[t]] == T(0));
    u[t] = zero ? T(2) : result[t];
  }
}

template <class D, class T>
void exact(const T* x, T x_norm, const Side<T>& other, const int32_t* list, int64_t count, T* u) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) exact_list<D, T, 4>(x, x_norm, other, list + t, u + t);
  for (; t < count; ++t) exact_list<D, T, 1>(x, x_norm, other, list + t, u + t);
}

template <class D, class T>
void accumulate(const T* x, const Side<T>& other, const int32_t* list, const T* coefficient,
                int64_t count, T* out) {
  constexpr int kLanes = Vec<T>::kLanes;
  const int64_t whole = other.d / kLanes * kLanes;
  const int left = static_cast<int>(other.d - whole);
  for (int64_t t = 0; t < count; ++t) {
    const T* y = other.rows + int64_t(list[t]) * other.d;
    const T factor = D::kDirect ? T(1) : D::kDifference ? T(2) : T(-2);
    const Vec<T> weight(factor * coefficient[t]);
    const auto step = [&](Vec<T> a, Vec<T> b, Vec<T> sum) {
      if constexpr (D::kDirect) {
        return fma(weight, D::gradient(a, b), sum);
      } else {
        return fma(weight, D::kDifference ? a - b : b, sum);
      }
    };
    for (int64_t k = 0; k < whole; k += kLanes)
      step(Vec<T>::load(x + k), Vec<T>::load(y + k), Vec<T>::load(out + k)).store(out + k);
    if (left > 0)
      step(Vec<T>::load_first(x + whole, left), Vec<T>::load_first(y + whole, left),
           Vec<T>::load_first(out + whole, left))
          .store_first(out + whole, left);
  }
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
