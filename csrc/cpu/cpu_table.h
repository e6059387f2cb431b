// SPDX-License-Identifier: Apache-2.0
// The kernel table of one instruction set (FLASHMETRIC_ISA) and one dtype.
#pragma once

#include <exact.h>
#include <gram.h>
#include <hardest.h>
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

template <class T>
constexpr CpuKernels<T> make_kernels(const char* isa) {
  return {isa,
          Tile<T>::kCols,
          pack<T>,
          hardest<T>,
          list_closest<T>,
          exact_entry<T>,
          accumulate_entry<T>,
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
