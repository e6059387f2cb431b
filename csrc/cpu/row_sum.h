// SPDX-License-Identifier: Apache-2.0
// Sums over the pairs of each row of functions f(scale d + offset), positives and negatives each
// with their own f, with the gradients of weighted sums: one block at a time, both kinds in one
// pass. Vectors of pairs whose f is known to be 0 from u alone are settled by a compare. In a
// self-batch a pair is evaluated once for both of its rows where they have the same scale and
// offset, else twice.
#pragma once

#include <back_product.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

template <class T>
class RowSumBlock {
 public:
  RowSumBlock(const RowSum<T>& op, const PairBatch<T>& batch, const Block& block,
              const RowSumSide<T>& rows, const RowSumSide<T>& columns, T* tile)
      : op_(op),
        batch_(batch),
        block_(block),
        rows_(rows),
        columns_(columns),
        pairs_(batch, block, tile, op.kinds[0].term != Term::kNone,
               op.kinds[1].term != Term::kNone),
        back_(batch, block, pairs_,
              {{rows.grad[0], rows.grad[1]}, {columns.grad[0], columns.grad[1]}},
              tile + kMaxBlockRows * kMaxBlockRows) {}

  void run() {
    pairs_.fill();
    for (int k = 0; k < 2; ++k)
      for (int64_t c = 0; c < pairs_.width(); ++c)
        partial_[k].sum[c] = partial_[k].slope[c] = partial_[k].moment[c] = partial_[k].active[c] =
            partial_[k].kept[c] = T(0);
    for (int64_t i = block_.row_begin; i < block_.row_end; ++i)
      if (!row(i) && back_.wanted()) back_.clear(i);
    if (columns_.sum != nullptr) merge_columns();
    if (back_.wanted()) back_.apply();
  }

 private:
  static constexpr int kLanes = Tile<T>::kLanes;

  // Sums of one kind by column, over the rows of the block.
  struct Partial {
    alignas(64) T sum[kMaxBlockRows];
    alignas(64) T slope[kMaxBlockRows];
    alignas(64) T moment[kMaxBlockRows];
    alignas(64) T active[kMaxBlockRows];
    alignas(64) T kept[kMaxBlockRows];
  };

  static FLASHMETRIC_INLINE void add(T* at, Vec<T> v) { (Vec<T>::load(at) + v).store(at); }

  // The u between which f of row i's pairs of one kind can differ from 0.
  struct Reach {
    const T *lows, *highs;  // of the columns, if theirs count, too; null: not known
    bool low_known, high_known;
    Vec<T> low, high;

    Reach(const RowTerm<T>& kind, int64_t i, bool columns)
        : lows(columns ? kind.low : nullptr),
          highs(columns ? kind.high : nullptr),
          low_known(kind.low != nullptr),
          high_known(kind.high != nullptr),
          low(low_known ? kind.low[i] : T(0)),
          high(high_known ? kind.high[i] : T(0)) {}

    FLASHMETRIC_INLINE unsigned bits(unsigned pairs, Vec<T> u, Vec<T> near_below, int64_t j) const {
      if (high_known) {
        const Vec<T> most = highs == nullptr ? high : max(high, Vec<T>::load(highs + j));
        pairs &= (less(u, most) | less(u, near_below)).bits();
      }
      if (low_known) {
        const Vec<T> least = lows == nullptr ? low : min(low, Vec<T>::load(lows + j));
        pairs &= (less(least, u) | less(u, near_below)).bits();
      }
      return pairs;
    }
  };

  bool row(int64_t i) {
    Kinds<T> kinds;
    if (!pairs_.label(i, kinds)) return false;
    const bool columns = batch_.self && !op_.uniform;
    const Reach first(op_.kinds[0], i, columns), second(op_.kinds[1], i, columns);
    const int64_t begin = block_.col_begin;
    const bool left = pairs_.measure(
        i, kinds,
        [&](Vec<T> u, Vec<T> near_below, int64_t v, unsigned& positive, unsigned& negative) {
          if (positive != 0) positive = first.bits(positive, u, near_below, begin + v * kLanes);
          negative = second.bits(negative, u, near_below, begin + v * kLanes);
        });
    if (!left) return false;
    pairs_.to_distance(i, kinds);
    if (back_.wanted())
      for (int64_t c = 0; c < pairs_.width(); c += kLanes) Vec<T>(0).store(weight_ + c);
    for (int k = 0; k < 2; ++k) {
      const RowTerm<T>& kind = op_.kinds[k];
      if (!some(k == 0 ? kinds.positive : kinds.negative)) continue;
      with_term(kind.term, [&](auto f) {
        using F = decltype(f);
        if (kind.bound == nullptr && !op_.slopes) {
          evaluate<F, false, true>(i, k, kinds);
        } else {
          evaluate<F, false, false>(i, k, kinds);
        }
        if (batch_.self && !op_.uniform) evaluate<F, true, false>(i, k, kinds);
      });
    }
    if (back_.wanted()) back_.weigh(i, kinds, weight_);
    return true;
  }

  bool some(const Bits* bits) const {
    unsigned any = 0;
    for (int64_t v = 0; v < pairs_.vecs(); ++v) any |= bits[v];
    return any != 0;
  }

  // Row i's pairs of one kind, as pairs of the row (and, if uniform, of the columns, too) or
  // kByColumn: of the columns. kPlain: there are no bounds, and slopes are not wanted.
  template <class F, bool kByColumn, bool kPlain>
  void evaluate(int64_t i, int k, const Kinds<T>& kinds) {
    const RowTerm<T>& kind = op_.kinds[k];
    const Bits* bits = k == 0 ? kinds.positive : kinds.negative;
    const T* line = pairs_.line(i);
    Partial& partial = partial_[k];
    const bool stats = rows_.sum != nullptr, slopes = !kPlain && stats && op_.slopes;
    const bool both = batch_.self && op_.uniform, columns = stats && (kByColumn || both);
    const Vec<T> row_scale(kind.scale[i]), row_offset(kind.offset[i]), zero(0), one(1);
    const Vec<T> row_bound(kind.bound == nullptr ? T(0) : kind.bound[i]);
    const Vec<T> row_weight(kind.weight == nullptr ? T(0) : kind.weight[i]);
    const bool bounded = !kPlain && kind.bound != nullptr, weighed = kind.weight != nullptr;
    // Counts of a row of a block are exact in any floating type.
    Vec<T> sum(0), slope_sum(0), moment(0), active_sum(0), kept_sum(0);
    for (int64_t t = 0; t < kinds.live_count; ++t) {
      const int64_t v = kinds.live[t];
      if (bits[v] == 0) continue;
      const int64_t c = v * kLanes, j = block_.col_begin + c;
      const Vec<T> d = Vec<T>::load(line + c);
      const Vec<T> scale = kByColumn ? Vec<T>::load(kind.scale + j) : row_scale;
      const Vec<T> z = fma(scale, d, kByColumn ? Vec<T>::load(kind.offset + j) : row_offset);
      auto kept = Vec<T>::mask(bits[v]);
      if (bounded) {
        const Vec<T> bound = kByColumn ? Vec<T>::load(kind.bound + j) : row_bound;
        kept = kept & (k == 0 ? greater(d, bound) : less(d, bound));
        const Vec<T> counted = select(kept, one, zero);
        kept_sum = kept_sum + counted;
        if (kByColumn) add(partial.kept + c, counted);
      }
      const Vec<T> slope = select(kept, F::slope(z), zero);
      if (stats) {
        const Vec<T> value = select(kept, F::value(z), zero);
        const Vec<T> active = select(greater(value, zero), one, zero);
        sum = sum + value;
        active_sum = active_sum + active;
        if (columns) {
          add(partial.sum + c, value);
          add(partial.active + c, active);
        }
        if (slopes) {
          const Vec<T> by_scale = select(kept, slope * d, zero);
          slope_sum = slope_sum + slope;
          moment = moment + by_scale;
          if (columns) {
            add(partial.slope + c, slope);
            add(partial.moment + c, by_scale);
          }
        }
      }
      if (weighed) {
        const Vec<T> weight = kByColumn ? Vec<T>::load(kind.weight + j)
                              : both    ? row_weight + Vec<T>::load(kind.weight + j)
                                        : row_weight;
        const Vec<T> dd = select(kept, scale * slope * weight, zero);
        add(weight_ + c, dd);
      }
    }
    if (kByColumn || !stats) return;
    const int64_t at = k * rows_.n + i;
    rows_.sum[at] += static_cast<double>(sum.sum());
    rows_.active[at] += static_cast<int64_t>(active_sum.sum());
    if (rows_.kept != nullptr) rows_.kept[at] += static_cast<int64_t>(kept_sum.sum());
    if (!slopes) return;
    rows_.slope[at] += static_cast<double>(slope_sum.sum());
    rows_.moment[at] += static_cast<double>(moment.sum());
  }

  void merge_columns() const {
    for (int k = 0; k < 2; ++k) {
      if (op_.kinds[k].term == Term::kNone) continue;
      const Partial& p = partial_[k];
      for (int64_t c = 0; c < block_.col_end - block_.col_begin; ++c) {
        const int64_t at = k * columns_.n + block_.col_begin + c;
        columns_.sum[at] += static_cast<double>(p.sum[c]);
        columns_.active[at] += static_cast<int64_t>(p.active[c]);
        if (columns_.kept != nullptr) columns_.kept[at] += static_cast<int64_t>(p.kept[c]);
        if (!op_.slopes) continue;
        columns_.slope[at] += static_cast<double>(p.slope[c]);
        columns_.moment[at] += static_cast<double>(p.moment[c]);
      }
    }
  }

  const RowSum<T>& op_;
  const PairBatch<T>& batch_;
  const Block& block_;
  const RowSumSide<T>& rows_;
  const RowSumSide<T>& columns_;
  const PairBlock<T> pairs_;
  BackProduct<T> back_;
  Partial partial_[2];
  alignas(64) T weight_[kMaxBlockRows];  // dL/dd of one row
};

template <class T>
void row_sum(const RowSum<T>& op, const PairBatch<T>& batch, const Block& block,
             const RowSumSide<T>& rows, const RowSumSide<T>& columns, T* tile) {
  RowSumBlock<T>(op, batch, block, rows, columns, tile).run();
}

template <class T>
void count_pairs(const PairBatch<T>& batch, const Block& block, int64_t* positives,
                 int64_t* negatives) {
  const PairBlock<T> pairs(batch, block, nullptr);
  Kinds<T> kinds;
  for (int64_t i = block.row_begin; i < block.row_end; ++i) {
    if (!pairs.label(i, kinds)) continue;
    for (int64_t v = 0; v < pairs.vecs(); ++v) {
      positives[i] += __builtin_popcount(kinds.positive[v]);
      negatives[i] += __builtin_popcount(kinds.negative[v]);
    }
  }
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
