// SPDX-License-Identifier: Apache-2.0
// Gradients of weighted log-sum-exps, one block at a time. The weight of a pair with logit l is
// e^(l - lse_i) g_i + e^(l - lse_j) g_j = e^(l - c) (e^(c - lse_i) g_i + e^(c - lse_j) g_j): one
// exponential per pair, unless the log-sum-exps of the block's rows and columns are too far apart.
#pragma once

#include <back_product.h>
#include <row_logits.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

template <class T>
class RowLseGradBlock {
 public:
  RowLseGradBlock(const RowLse<T>& op, const PairBatch<T>& batch, const Block& block,
                  const LseGradSide<T>& rows, const LseGradSide<T>& columns, T* tile)
      : op_(op),
        batch_(batch),
        block_(block),
        rows_(rows),
        columns_(columns),
        pairs_(batch, block, tile, op.kinds[0].form != Logit::kNone,
               op.kinds[1].form != Logit::kNone),
        back_(batch, block, pairs_, {{rows.grad, rows.grad}, {columns.grad, columns.grad}},
              tile + kMaxBlockRows * kMaxBlockRows) {}

  void run() {
    bool shared = true;
    for (int k = 0; k < 2; ++k) {
      prepare(k);
      shared = shared && (factors_[k].shared || op_.kinds[k].form == Logit::kNone);
    }
    const bool in_one = shared && in_one_loop(op_, batch_.distance);
    pairs_.fill();
    for (int64_t i = block_.row_begin; i < block_.row_end; ++i)
      if (!(in_one && pairs_.plain(i) ? one_loop(i) : row(i))) back_.clear(i);
    back_.apply();
  }

 private:
  static constexpr int kLanes = Tile<T>::kLanes;

  // e^(centre - lse) g of the rows and of the columns of the block.
  struct Factors {
    bool shared;
    T centre;
    alignas(64) T row[kMaxBlockRows];
    alignas(64) T column[kMaxBlockRows];
  };

  // What e^(l - centre) loses to underflow is below e^-40 of a row's weights.
  void prepare(int k) {
    Factors& f = factors_[k];
    constexpr double kSpread = sizeof(T) == 4 ? 40 : 600;
    T low = T(__builtin_inff()), high = -low;
    const auto extend = [&](const LseGradSide<T>& side, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && side.weight != nullptr; ++i) {
        const T lse = side.lse[k * side.padded + i];
        if (lse == T(__builtin_inff())) continue;
        low = lse < low ? lse : low;
        high = lse > high ? lse : high;
      }
    };
    extend(rows_, block_.row_begin, block_.row_end);
    extend(columns_, block_.col_begin, block_.col_end);
    // Without a log-sum-exp there is no weight either.
    f.centre = high > -__builtin_inff() ? high : T(0);
    f.shared = op_.uniform && !(high - low >= T(kSpread));
    if (!f.shared) return;
    const auto set = [&](const LseGradSide<T>& side, int64_t begin, int64_t size, T* out) {
      for (int64_t c = 0; c < size; c += kLanes) {
        Vec<T> factor(0);
        if (side.weight != nullptr) {
          const int left = size - c < kLanes ? static_cast<int>(size - c) : kLanes;
          const Vec<T> lse = Vec<T>::load_first(side.lse + k * side.padded + begin + c, left);
          const Vec<T> weight = Vec<T>::load_first(side.weight + k * side.padded + begin + c, left);
          factor = exp(Vec<T>(f.centre) - lse) * weight;
        }
        factor.store(out + c);
      }
    };
    set(rows_, block_.row_begin, block_.row_end - block_.row_begin, f.row);
    set(columns_, block_.col_begin, block_.col_end - block_.col_begin, f.column);
    // Past the last column, where a panel ends.
    for (int64_t c = (block_.col_end - block_.col_begin + kLanes - 1) / kLanes * kLanes;
         c < pairs_.width(); c += kLanes)
      Vec<T>(0).store(f.column + c);
  }

  // shared_row() for both kinds and what weigh() makes of it, from products on.
  bool one_loop(int64_t i) {
    return with_linear_distance(batch_.distance, [&](auto distance) {
      using D = decltype(distance);
      const RowShare positives(*this, 0, i), negatives(*this, 1, i);
      typename BackProduct<T>::RowWeights out(back_, i);
      const bool paired =
          pairs_.for_each_vector(i, [&](int64_t v, Vec<T> u, unsigned positive, unsigned negative,
                                        unsigned near) __attribute__((always_inline)) {
            const Vec<T> d = D::value(u);
            Vec<T> weight(0);
            if (negative != 0) weight = negatives(negative, d, v * kLanes);
            if (positive != 0) weight = weight + positives(positive, d, v * kLanes);
            out.add(v, weight * D::slope(d), near);
          });
      if (paired) out.finish();
      return paired;
    });
  }

  // dL/dd of the pairs of one row and kind.
  class RowShare {
   public:
    RowShare(const RowLseGradBlock& block, int k, int64_t i)
        : power_(block.op_.kinds[k], block.factors_[k].centre, i),
          slope_(block.op_.kinds[k].scale[i]),
          own_(block.factors_[k].row[i - block.block_.row_begin]),
          columns_(block.factors_[k].column) {}

    FLASHMETRIC_INLINE Vec<T> operator()(unsigned bits, Vec<T> d, int64_t c) const {
      const Vec<T> factor = slope_ * (own_ + Vec<T>::load(columns_ + c));
      return select(Vec<T>::mask(bits), power_(d) * factor, Vec<T>(0));
    }

   private:
    const AffinePower<T> power_;
    const Vec<T> slope_, own_;
    const T* const columns_;
  };

  bool row(int64_t i) {
    Kinds<T> kinds;
    if (!measure_row(pairs_, i, kinds)) return false;
    for (int64_t c = 0; c < pairs_.width(); c += kLanes) Vec<T>(0).store(weight_ + c);
    for (int k = 0; k < 2; ++k) {
      if (op_.kinds[k].form == Logit::kNone) continue;
      const Bits* bits = k == 0 ? kinds.positive : kinds.negative;
      with_logits<false>(op_, k, i, [&](const auto& logits) {
        if (factors_[k].shared) return shared_row(i, k, bits, logits);
        if (rows_.weight != nullptr) side<false>(i, k, bits, logits);
        if (columns_.weight != nullptr && op_.uniform) side<true>(i, k, bits, logits);
      });
      if (columns_.weight != nullptr && !op_.uniform)
        with_logits<true>(op_, k, i, [&](const auto& logits) { side<true>(i, k, bits, logits); });
    }
    back_.weigh(i, kinds, weight_);
    return true;
  }

  template <class Logits>
  void shared_row(int64_t i, int k, const Bits* bits, const Logits& logits) {
    const Factors& f = factors_[k];
    const Vec<T> centre(f.centre), own(f.row[i - block_.row_begin]);
    const T* line = pairs_.line(i);
    for (int64_t v = 0; v < pairs_.vecs(); ++v) {
      if (bits[v] == 0) continue;
      const int64_t c = v * kLanes;
      const Vec<T> z = logits.z(Vec<T>::load(line + c), 0);
      const Vec<T> share = exp(logits.value(z) - centre) * (own + Vec<T>::load(f.column + c));
      add(Vec<T>::mask(bits[v]), logits.slope(z, 0) * share, c);
    }
  }

  // What the sums of one side give.
  template <bool kColumnSum, class Logits>
  void side(int64_t i, int k, const Bits* bits, const Logits& logits) {
    const LseGradSide<T>& side = kColumnSum ? columns_ : rows_;
    const T* lse = side.lse + k * side.padded;
    const T* weight = side.weight + k * side.padded;
    const Vec<T> row_lse(kColumnSum ? T(0) : lse[i]), row_weight(kColumnSum ? T(0) : weight[i]);
    const T* line = pairs_.line(i);
    for (int64_t v = 0; v < pairs_.vecs(); ++v) {
      if (bits[v] == 0) continue;
      const int64_t c = v * kLanes, j = block_.col_begin + c;
      const Vec<T> d = Vec<T>::load(line + c), z = logits.z(d, j);
      const Vec<T> from = kColumnSum ? Vec<T>::load(lse + j) : row_lse;
      const Vec<T> by = kColumnSum ? Vec<T>::load(weight + j) : row_weight;
      add(logits.kept(bits[v], d, j), logits.slope(z, j) * (exp(logits.value(z) - from) * by), c);
    }
  }

  FLASHMETRIC_INLINE void add(typename Vec<T>::M kept, Vec<T> weight, int64_t c) {
    (Vec<T>::load(weight_ + c) + select(kept, weight, Vec<T>(0))).store(weight_ + c);
  }

  const RowLse<T>& op_;
  const PairBatch<T>& batch_;
  const Block& block_;
  const LseGradSide<T>& rows_;
  const LseGradSide<T>& columns_;
  const PairBlock<T> pairs_;
  BackProduct<T> back_;
  Factors factors_[2];
  alignas(64) T weight_[kMaxBlockRows];  // dL/dd of one row
};

template <class T>
void row_lse_backward(const RowLse<T>& op, const PairBatch<T>& batch, const Block& block,
                      const LseGradSide<T>& rows, const LseGradSide<T>& columns, T* tile) {
  RowLseGradBlock<T>(op, batch, block, rows, columns, tile).run();
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
