// SPDX-License-Identifier: Apache-2.0
// The kernel table of one instruction set (FLASHMETRIC_ISA) and one dtype.
#pragma once

#include <exact.h>
#include <gram.h>
#include <hardest.h>
#include <pair_sum.h>
#include <row_lse.h>
#include <row_lse_backward.h>
#include <row_sum.h>
#include <threshold_grad.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

template <class T>
void exact_entry(Distance distance, const T* x, T x_norm, const Side<T>& other, const int32_t* list,
                 int64_t count, T* u) {
  with_distance(distance, [&](auto d) { exact<decltype(d)>(x, x_norm, other, list, count, u); });
}

template <class T>
void accumulate_entry(Distance distance, const T* x, const Side<T>& other, const int32_t* list,
                      const T* coefficient, int64_t count, T* out) {
  with_distance(distance,
                [&](auto d) { accumulate<decltype(d)>(x, other, list, coefficient, count, out); });
}

// The distances that pair_sum has: row_sum has all.
template <class F>
FLASHMETRIC_INLINE void with_product_distance(Distance distance, F&& f) {
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

template <class T>
void pair_sum_entry(const PairSum<T>& op, const Side<T>& query, const Side<T>& ref,
                    const Block& block, const PairSumRows<T>& rows, const PairSumRows<T>& columns,
                    T* scratch) {
  with_product_distance(op.distance, [&](auto d) {
    with_formula(op.formula, [&](auto f) {
      using D = decltype(d);
      using F = decltype(f);
      if (op.positives) {
        BlockPairs<D, F, T, true>(op, query, ref, block, rows, columns, scratch).run();
      } else {
        BlockPairs<D, F, T, false>(op, query, ref, block, rows, columns, scratch).run();
      }
    });
  });
}

template <class T>
constexpr CpuKernels<T> make_kernels(const char* isa) {
  return {isa,
          Tile<T>::kCols,
          pack<T>,
          hardest<T>,
          exact_entry<T>,
          accumulate_entry<T>,
          pair_sum_entry<T>,
          count_pairs<T>,
          row_sum<T>,
          row_lse<T>,
          row_lse_backward<T>,
          kFewThresholds<T>,
          threshold_sum<T>,
          threshold_grad<T>,
          nearest_beyond<T>,
          list_candidates<T>};
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric

#define FLASHMETRIC_TEXT_OF(x) #x
#define FLASHMETRIC_TEXT(x) FLASHMETRIC_TEXT_OF(x)
