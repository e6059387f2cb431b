// SPDX-License-Identifier: Apache-2.0
// Gradient of sums below thresholds. The weight of a pair in a hinge is the sum of the weights of
// all thresholds above its distance: one search in the row's thresholds, whose sums from the end
// are in a table. In a self-batch a pair has the thresholds of both of its rows: of its column,
// every lane searches in another row.
#pragma once

#include <back_product.h>
#include <threshold.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

template <class F, class T>
class ThresholdGradBlock {
 public:
  ThresholdGradBlock(const ThresholdGrad<T>& op, const PairBatch<T>& batch, const Block& block,
                     T* tile)
      : op_(op),
        block_(block),
        pairs_(batch, block, tile, op.positives, !op.positives),
        back_(batch, block, pairs_, {{op.grad_query, op.grad_query}, {op.grad_ref, op.grad_ref}},
              nullptr) {}

  void run() {
    pairs_.fill();
    for (int64_t i = block_.row_begin; i < block_.row_end; ++i)
      if (!row(i)) back_.clear(i);
    back_.apply();
  }

 private:
  static constexpr bool kHinge = __is_same(F, Hinge);
  static constexpr int kLanes = Vec<T>::kLanes;

  bool row(int64_t i) {
    Kinds<T> kinds;
    if (!pairs_.label(i, kinds)) return false;
    pairs_.measure(i, kinds);
    pairs_.to_distance(i, kinds);
    const T* d = pairs_.line(i);
    const Vec<T> highest(op_.highest[i]), zero(0);
    const RowSearch<T> search(op_.thresholds.row(i), kHinge ? op_.thresholds.length : 1);
    bool any = false;
    for (int64_t v = 0; v < pairs_.vecs(); ++v) {
      const int64_t c = v * kLanes, j = block_.col_begin + c;
      const auto wanted = Vec<T>::mask(kinds.any(v));
      Vec<T> weight(0);
      if (wanted.any()) {
        const Vec<T> x = Vec<T>::load(d + c);
        if (reached(x, highest, wanted)) weight = of_row(i, x, wanted, search);
        if (op_.symmetric && reached(x, Vec<T>::load(op_.highest + j), wanted))
          weight = weight + of_column(j, x, wanted);
        weight = select(wanted, zero - weight, zero);
        any = any || (~equal(weight, zero) & wanted).any();
      }
      weight.store(weight_ + c);
    }
    if (any) back_.weigh(i, kinds, weight_);
    return any;
  }

  // Whether a pair of the vector can be below a threshold at all, or need not be.
  static FLASHMETRIC_INLINE bool reached(Vec<T> d, Vec<T> highest, typename Vec<T>::M wanted) {
    return !is_zero_above<F>() || (less(d, highest) & wanted).any();
  }

  FLASHMETRIC_INLINE Vec<T> of_row(int64_t i, Vec<T> d, typename Vec<T>::M wanted,
                                   const RowSearch<T>& search) const {
    const T* weight = op_.weight + i * op_.thresholds.length;
    if constexpr (kHinge) {
      if (!(~less(d, Vec<T>(op_.lowest[i])) & wanted).any()) return Vec<T>(op_.total[i]);
      return search.template count_below<true>(d).read(weight);
    } else {
      const T* t = op_.thresholds.row(i);
      Vec<T> sum(0);
      for (int64_t k = 0; k < op_.thresholds.count; ++k)
        if (weight[k] != T(0)) sum = fma(Vec<T>(weight[k]), F::slope(Vec<T>(t[k]) - d), sum);
      return sum;
    }
  }

  FLASHMETRIC_INLINE Vec<T> of_column(int64_t j, Vec<T> d, typename Vec<T>::M wanted) const {
    const int32_t length = op_.thresholds.length;
    const T* t = op_.thresholds.row(j);
    const T* weight = op_.weight + j * length;
    Index<T> at = Index<T>::strided(length);
    if constexpr (kHinge) {
      if (!(~less(d, Vec<T>::load(op_.lowest + j)) & wanted).any())
        return Vec<T>::load(op_.total + j);
      skip_below<true>(t, length, d, at);
      return at.read(weight);
    } else {
      Vec<T> sum(0);
      for (int64_t k = 0; k < op_.thresholds.count; ++k)
        sum = fma(at.read(weight + k), F::slope(at.read(t + k) - d), sum);
      return sum;
    }
  }

  const ThresholdGrad<T>& op_;
  const Block& block_;
  const PairBlock<T> pairs_;
  BackProduct<T> back_;
  alignas(64) T weight_[kMaxBlockRows];  // dL/dd of one row
};

template <class T>
void threshold_grad(const PairBatch<T>& batch, const Block& block, const ThresholdGrad<T>& op,
                    T* tile) {
  with_threshold_term(op.term, [&](auto term) {
    ThresholdGradBlock<decltype(term), T>(op, batch, block, tile).run();
  });
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
