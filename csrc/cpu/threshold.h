// SPDX-License-Identifier: Apache-2.0
// Sums over pairs of functions of how far they are below thresholds: K of them per query row.
//
// A hinge needs no work per pair and threshold. The pairs of a row are sorted out first: those from
// the highest threshold on add nothing, those below the lowest the same to all thresholds. The rest
// is packed, compared with all thresholds if these are few, else put into bins by a search; bins
// become sums when all pairs are seen. All other functions are evaluated threshold by threshold.
#pragma once

#include <select.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// Up to here comparing pairs with all thresholds of a hinge beats a search and a bin for each.
template <class T>
constexpr int64_t kFewThresholds = SmallTable<T>::kSize >= 16 ? Vec<T>::kLanes : 24;

// The functions that have thresholds.
template <class F>
FLASHMETRIC_INLINE void with_threshold_term(Term term, F&& f) {
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

// The pairs of one row and block that have to be compared with its thresholds.
template <class T>
struct Packed {
  static constexpr int kLanes = Vec<T>::kLanes;
  alignas(64) T d[kMaxBlockRows + kLanes];
  int64_t count = 0;

  FLASHMETRIC_INLINE void add(Vec<T> v, typename Vec<T>::M which) {
    count += pack_lanes(v, which, d + count);
  }
  // Whole vectors: what is infinitely far is below no threshold.
  FLASHMETRIC_INLINE void pad() { Vec<T>(__builtin_inff()).store(d + count); }
};

template <class F>
constexpr bool is_zero_above() {
  return __is_same(F, Hinge) || __is_same(F, SquaredHinge);
}

template <class F, class T>
class ThresholdRow {
 public:
  ThresholdRow(const ThresholdSum<T>& op, int64_t i)
      : op_(op),
        row_(i),
        t_(op.thresholds.row(i)),
        count_(op.thresholds.count),
        first_(op.first[op.thresholds.row_stride == 0 ? 0 : i]) {}

  void run(const T* d, const Kinds<T>& kinds, int64_t vecs) {
    if (first_ == count_) return;
    pack(d, kinds, vecs);
    if (packed_.count == 0) return;
    packed_.pad();
    if (op_.binned) {
      fill_bins();
      return;
    }
    int64_t k = first_;
    if constexpr (is_zero_above<F>())
      for (; k + 4 <= count_; k += 4) sum_terms<4>(k);
    for (; k < count_; ++k) sum_terms<1>(k);
  }

 private:
  static constexpr bool kHinge = __is_same(F, Hinge);
  static constexpr int kLanes = Vec<T>::kLanes;

  void pack(const T* d, const Kinds<T>& kinds, int64_t vecs) {
    const Vec<T> lowest(t_[first_]), highest(t_[count_ - 1]), zero(0);
    Vec<T> base_sum(0);
    int64_t base_below = 0;
    for (int64_t v = 0; v < vecs; ++v) {
      if (kinds.any(v) == 0) continue;
      const Vec<T> x = Vec<T>::load(d + v * kLanes);
      auto which = Vec<T>::mask(kinds.any(v));
      if constexpr (is_zero_above<F>()) which = which & less(x, highest);
      if constexpr (kHinge) {
        const auto below = which & less(x, lowest);
        if (below.any()) {
          base_sum = base_sum + select(below, lowest - x, zero);
          base_below += __builtin_popcount(below.bits());
          which = which & ~below;
        }
      }
      if (which.any()) packed_.add(x, which);
    }
    if (kHinge && base_below != 0) {
      op_.base_sum[row_] += static_cast<double>(base_sum.sum());
      op_.base_below[row_] += base_below;
    }
  }

  // Thresholds [k, k + kAtOnce): several chains of additions hide each other's latency.
  template <int kAtOnce>
  FLASHMETRIC_INLINE void sum_terms(int64_t k) {
    const Vec<T> zero(0), one(1);
    Vec<T> t[kAtOnce], sum[kAtOnce], slope[kAtOnce], below[kAtOnce];
#pragma GCC unroll 4
    for (int q = 0; q < kAtOnce; ++q) {
      t[q] = Vec<T>(t_[k + q]);
      sum[q] = slope[q] = below[q] = zero;
    }
    for (int64_t c = 0; c < packed_.count; c += kLanes) {
      const Vec<T> d = Vec<T>::load(packed_.d + c);
#pragma GCC unroll 4
      for (int q = 0; q < kAtOnce; ++q) {
        const Vec<T> z = t[q] - d;
        sum[q] = sum[q] + F::value(z);
        if constexpr (!kHinge) slope[q] = slope[q] + F::slope(z);
        below[q] = select(greater(z, zero), below[q] + one, below[q]);
      }
    }
    const int64_t at = row_ * count_ + k;
#pragma GCC unroll 4
    for (int q = 0; q < kAtOnce; ++q) {
      op_.sum[at + q] += static_cast<double>(sum[q].sum());
      if constexpr (!kHinge) op_.slope[at + q] += static_cast<double>(slope[q].sum());
      op_.below[at + q] += static_cast<int64_t>(below[q].sum());
    }
  }

  void fill_bins() {
    const RowSearch<T> search(t_, op_.thresholds.length);
    int32_t bin[kMaxBlockRows + kLanes];
    for (int64_t c = 0; c < packed_.count; c += kLanes)
      search.template count_below<true>(Vec<T>::load(packed_.d + c)).store(bin + c);
    double* sum = op_.sum + row_ * count_;
    int64_t* below = op_.below + row_ * count_;
    for (int64_t c = 0; c < packed_.count; ++c) {
      sum[bin[c]] += static_cast<double>(packed_.d[c]);
      ++below[bin[c]];
    }
  }

  const ThresholdSum<T>& op_;
  const int64_t row_;
  const T* t_;
  const int64_t count_, first_;
  Packed<T> packed_;
};

template <class T>
void threshold_sum(const PairBatch<T>& batch, const Block& block, const ThresholdSum<T>& op,
                   T* tile) {
  for_rows(batch, block, op.positives, tile,
           [&](int64_t i, const PairBlock<T>& pairs, const Kinds<T>& kinds) {
             with_threshold_term(op.term, [&](auto term) {
               ThresholdRow<decltype(term), T>(op, i).run(pairs.line(i), kinds, pairs.vecs());
             });
           });
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
