// SPDX-License-Identifier: Apache-2.0
// Log-sum-exps over the pairs of each row, one block at a time. Where a number is known that no
// logit exceeds and none falls short of by more than the range of exp, one exponential per pair
// serves its row and its column. Otherwise each side keeps running maxima, one per lane, and takes
// an exponential of its own.
#pragma once

#include <row_logits.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

FLASHMETRIC_INLINE double exp_of(double x) { return __builtin_exp(x); }

// Adds a block's sums, relative to e^top, to a row's.
FLASHMETRIC_INLINE void merge_lse(const LseSide& side, int64_t at, double top, double sum,
                                  double moment) {
  if (!(top > side.top[at])) {
    if (top == side.top[at]) {
      side.sum[at] += sum;
      side.moment[at] += moment;
    } else if (sum != 0) {
      const double factor = exp_of(top - side.top[at]);
      side.sum[at] += sum * factor;
      side.moment[at] += moment * factor;
    }
    return;
  }
  const double factor = side.top[at] == -__builtin_inf() ? 0 : exp_of(side.top[at] - top);
  side.sum[at] = side.sum[at] * factor + sum;
  side.moment[at] = side.moment[at] * factor + moment;
  side.top[at] = top;
}

// Running sums of one exponential per lane, relative to the lane's largest logit so far.
template <class T>
struct LaneSums {
  Vec<T> top, sum, moment;

  FLASHMETRIC_INLINE void add(typename Vec<T>::M kept, Vec<T> logit, Vec<T> d) {
    const Vec<T> zero(0), lowest(-__builtin_inff());
    const Vec<T> candidate = select(kept, logit, lowest);
    const auto higher = greater(candidate, top);
    if (higher.any()) {
      // Lanes without any logit so far hold zeros: what they are multiplied with does not matter.
      const Vec<T> next = select(higher, candidate, top);
      const auto old = greater(top, lowest) & higher;
      const Vec<T> factor = select(old, exp(top - next), Vec<T>(1));
      sum = sum * factor;
      moment = moment * factor;
      top = next;
    }
    // A logit of -inf adds nothing, also where all are.
    const auto adds = kept & greater(candidate, lowest);
    const Vec<T> e = select(adds, exp(candidate - top), zero);
    sum = sum + e;
    moment = fma(e, select(adds, d, zero), moment);
  }
};

template <class T>
class RowLseBlock {
 public:
  RowLseBlock(const RowLse<T>& op, const PairBatch<T>& batch, const Block& block,
              const LseSide& rows, const LseSide* columns, T* tile)
      : op_(op),
        batch_(batch),
        block_(block),
        rows_(rows),
        columns_(columns),
        pairs_(batch, block, tile, op.kinds[0].form != Logit::kNone,
               op.kinds[1].form != Logit::kNone),
        one_loop_(in_one_loop(op, batch.distance) && shared_or_absent(0) && shared_or_absent(1)) {}

  void run() {
    pairs_.fill();
    for (int k = 0; k < 2; ++k)
      for (int64_t c = 0; c < pairs_.width(); ++c) {
        partial_[k].top[c] = T(-__builtin_inff());
        partial_[k].sum[c] = partial_[k].moment[c] = partial_[k].kept[c] = T(0);
      }
    for (int64_t i = block_.row_begin; i < block_.row_end; ++i) row(i);
    if (columns_ != nullptr) merge_columns();
  }

 private:
  static constexpr int kLanes = Tile<T>::kLanes;

  struct Partial {
    alignas(64) T top[kMaxBlockRows];
    alignas(64) T sum[kMaxBlockRows];
    alignas(64) T moment[kMaxBlockRows];
    alignas(64) T kept[kMaxBlockRows];
  };

  static FLASHMETRIC_INLINE void add(T* at, Vec<T> v) { (Vec<T>::load(at) + v).store(at); }

  bool shared(int k) const {
    const T top = op_.kinds[k].top;
    return op_.uniform && top - top == T(0);
  }

  bool shared_or_absent(int k) const { return op_.kinds[k].form == Logit::kNone || shared(k); }

  // shared_row() for both kinds, from products on.
  void one_loop(int64_t i) {
    with_linear_distance(batch_.distance, [&](auto distance) {
      using D = decltype(distance);
      RowPartial positives(*this, 0, i), negatives(*this, 1, i);
      pairs_.for_each_vector(i, [&](int64_t v, Vec<T> u, unsigned positive, unsigned negative,
                                    unsigned) __attribute__((always_inline)) {
        const Vec<T> d = D::value(u);
        if (positive != 0) positives.add(positive, d, v * kLanes);
        if (negative != 0) negatives.add(negative, d, v * kLanes);
      });
      positives.merge();
      negatives.merge();
      return true;
    });
  }

  // Sums of one row and kind, and what they add to those of the columns.
  class RowPartial {
   public:
    RowPartial(RowLseBlock& block, int k, int64_t i)
        : side_(block.rows_),
          at_(k * block.rows_.n + i),
          top_(block.op_.kinds[k].top),
          power_(block.op_.kinds[k], top_, i),
          columns_(block.columns_ != nullptr),
          column_sum_(block.partial_[k].sum),
          column_moment_(block.partial_[k].moment) {}

    FLASHMETRIC_INLINE void add(unsigned bits, Vec<T> d, int64_t c) {
      const Vec<T> zero(0);
      const auto kept = Vec<T>::mask(bits);
      const Vec<T> e = select(kept, power_(d), zero), ed = select(kept, e * d, zero);
      sum_ = sum_ + e;
      moment_ = moment_ + ed;
      any_ |= bits;
      if (!columns_) return;
      RowLseBlock::add(column_sum_ + c, e);
      RowLseBlock::add(column_moment_ + c, ed);
    }

    void merge() const {
      if (any_ == 0) return;
      merge_lse(side_, at_, static_cast<double>(top_), static_cast<double>(sum_.sum()),
                static_cast<double>(moment_.sum()));
    }

   private:
    const LseSide& side_;
    const int64_t at_;
    const T top_;
    const AffinePower<T> power_;
    const bool columns_;
    T *const column_sum_, *const column_moment_;
    Vec<T> sum_ = Vec<T>(0), moment_ = Vec<T>(0);
    unsigned any_ = 0;
  };

  void row(int64_t i) {
    if (one_loop_ && pairs_.plain(i)) {
      one_loop(i);
      return;
    }
    Kinds<T> kinds;
    if (!measure_row(pairs_, i, kinds)) return;
    for (int k = 0; k < 2; ++k) {
      if (op_.kinds[k].form == Logit::kNone) continue;
      const Bits* bits = k == 0 ? kinds.positive : kinds.negative;
      with_logits<false>(op_, k, i, [&](const auto& logits) {
        if (shared(k)) return shared_row(i, k, bits, logits);
        row_side(i, k, bits, logits);
        if (columns_ != nullptr && op_.uniform) column_side(i, k, bits, logits);
      });
      if (columns_ != nullptr && !op_.uniform)
        with_logits<true>(op_, k, i, [&](const auto& logits) { column_side(i, k, bits, logits); });
    }
  }

  // One exponential for both sides.
  template <class Logits>
  void shared_row(int64_t i, int k, const Bits* bits, const Logits& logits) {
    const Vec<T> top(op_.kinds[k].top), zero(0);
    const T* line = pairs_.line(i);
    T* column_sum = partial_[k].sum;
    T* column_moment = partial_[k].moment;
    const bool columns = columns_ != nullptr;
    Vec<T> sum(0), moment(0);
    unsigned any = 0;
    for (int64_t v = 0; v < pairs_.vecs(); ++v) {
      if (bits[v] == 0) continue;
      any = 1;
      const int64_t c = v * kLanes;
      const Vec<T> d = Vec<T>::load(line + c);
      const auto kept = Vec<T>::mask(bits[v]);
      const Vec<T> e = select(kept, exp(logits.value(logits.z(d, 0)) - top), zero);
      const Vec<T> ed = select(kept, e * d, zero);
      sum = sum + e;
      moment = moment + ed;
      if (!columns) continue;
      add(column_sum + c, e);
      add(column_moment + c, ed);
    }
    if (any != 0)
      merge_lse(rows_, k * rows_.n + i, static_cast<double>(op_.kinds[k].top),
                static_cast<double>(sum.sum()), static_cast<double>(moment.sum()));
  }

  template <class Logits>
  void row_side(int64_t i, int k, const Bits* bits, const Logits& logits) {
    const T* line = pairs_.line(i);
    const Vec<T> zero(0), lowest(-__builtin_inff());
    LaneSums<T> sums{lowest, zero, zero};
    int64_t kept_count = 0;
    for (int64_t v = 0; v < pairs_.vecs(); ++v) {
      if (bits[v] == 0) continue;
      const int64_t c = v * kLanes;
      const Vec<T> d = Vec<T>::load(line + c);
      const auto kept = logits.kept(bits[v], d, 0);
      kept_count += __builtin_popcount(kept.bits());
      sums.add(kept, logits.value(logits.z(d, 0)), d);
    }
    const int64_t at = k * rows_.n + i;
    if (rows_.kept != nullptr) rows_.kept[at] += kept_count;
    const T top = sums.top.max();
    if (top == T(-__builtin_inff())) return;
    const Vec<T> factor = select(greater(sums.top, lowest), exp(sums.top - Vec<T>(top)), zero);
    merge_lse(rows_, at, static_cast<double>(top), static_cast<double>((sums.sum * factor).sum()),
              static_cast<double>((sums.moment * factor).sum()));
  }

  template <class Logits>
  void column_side(int64_t i, int k, const Bits* bits, const Logits& logits) {
    const T* line = pairs_.line(i);
    Partial& partial = partial_[k];
    for (int64_t v = 0; v < pairs_.vecs(); ++v) {
      if (bits[v] == 0) continue;
      const int64_t c = v * kLanes, j = block_.col_begin + c;
      const Vec<T> d = Vec<T>::load(line + c);
      const auto kept = logits.kept(bits[v], d, j);
      if (columns_->kept != nullptr) add(partial.kept + c, select(kept, Vec<T>(1), Vec<T>(0)));
      LaneSums<T> sums{Vec<T>::load(partial.top + c), Vec<T>::load(partial.sum + c),
                       Vec<T>::load(partial.moment + c)};
      sums.add(kept, logits.value(logits.z(d, j)), d);
      sums.top.store(partial.top + c);
      sums.sum.store(partial.sum + c);
      sums.moment.store(partial.moment + c);
    }
  }

  void merge_columns() const {
    for (int k = 0; k < 2; ++k) {
      if (op_.kinds[k].form == Logit::kNone) continue;
      const Partial& p = partial_[k];
      for (int64_t c = 0; c < block_.col_end - block_.col_begin; ++c) {
        const int64_t at = k * columns_->n + block_.col_begin + c;
        if (columns_->kept != nullptr) columns_->kept[at] += static_cast<int64_t>(p.kept[c]);
        if (p.sum[c] == T(0)) continue;
        merge_lse(*columns_, at, static_cast<double>(shared(k) ? op_.kinds[k].top : p.top[c]),
                  static_cast<double>(p.sum[c]), static_cast<double>(p.moment[c]));
      }
    }
  }

  const RowLse<T>& op_;
  const PairBatch<T>& batch_;
  const Block& block_;
  const LseSide& rows_;
  const LseSide* columns_;
  const PairBlock<T> pairs_;
  const bool one_loop_;
  Partial partial_[2];
};

template <class T>
void row_lse(const RowLse<T>& op, const PairBatch<T>& batch, const Block& block,
             const LseSide& rows, const LseSide* columns, T* tile) {
  RowLseBlock<T>(op, batch, block, rows, columns, tile).run();
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
