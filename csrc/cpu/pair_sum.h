// SPDX-License-Identifier: Apache-2.0
// Sum over positives or negatives of a pointwise function of the distance, with its gradient, one
// block at a time: the block of inner products stays in the second-level cache, is turned in place
// into weights h = 2 d(loss)/du, and is multiplied with the rows of the other side while still
// there. With H the block of weights: grad(x_i) = sum_j h_ij (x_i - r_j), so one matrix product
// plus the row sums of H times x_i.
#pragma once

#include <exact.h>
#include <gram.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// With fewer active pairs than 1 / kSparse of a block, pair by pair beats the matrix product.
constexpr int64_t kSparse = 10;

// Column-side partial results of one block.
template <class T>
struct Columns {
  alignas(64) T sum[kMaxBlockRows];
  alignas(64) T active[kMaxBlockRows];
  alignas(64) T weight[kMaxBlockRows];
};

template <class D, class F, class T, bool kPositive>
class BlockPairs {
 public:
  BlockPairs(const PairSum<T>& op, const Side<T>& query, const Side<T>& ref, const Block& block,
             const PairSumRows<T>& rows, const PairSumRows<T>& columns, T* scratch)
      : op_(op),
        query_(query),
        ref_(ref),
        block_(block),
        rows_(rows),
        columns_(columns),
        h_(scratch),
        reach_(D::inverse(op.margin)) {
    width_ = (block.col_end - block.col_begin + kCols - 1) / kCols * kCols;
    // The test in u must not lose a pair that the test in d would keep: widen it by rounding.
    const T slack = sizeof(T) == 4 ? T(1e-5) : T(1e-13);
    reach_ += slack * (reach_ < T(0) ? -reach_ : reach_);
  }

  void run() {
    gram();
    for (int64_t c = 0; c < width_; ++c)
      partial_.sum[c] = partial_.active[c] = partial_.weight[c] = T(0);
    int64_t active = 0;
    for (int64_t i = block_.row_begin; i < block_.row_end; ++i) active += weigh_row(i);
    if (active == 0) return;
    const int64_t cols = block_.col_end - block_.col_begin;
    for (int64_t c = 0; c < cols; ++c) {
      if (columns_.sum != nullptr) columns_.sum[block_.col_begin + c] += partial_.sum[c];
      if (columns_.active != nullptr)
        columns_.active[block_.col_begin + c] += static_cast<int64_t>(partial_.active[c]);
    }
    if (rows_.grad == nullptr && columns_.grad == nullptr) return;
    if (active * kSparse < (block_.row_end - block_.row_begin) * cols) {
      apply_sparse();
    } else {
      apply_dense();
    }
  }

 private:
  static constexpr int kLanes = Tile<T>::kLanes;
  static constexpr int kCols = Tile<T>::kCols;
  static constexpr int kRows = Tile<T>::kRows;

  T* h_row(int64_t i) const { return h_ + (i - block_.row_begin) * width_; }

  // What makes a loss: positives that are too far, negatives that are too near.
  template <class V>
  FLASHMETRIC_INLINE V violation(V d) const {
    return kPositive ? d - V(op_.margin) : V(op_.margin) - d;
  }

  // The pairs of row i that may be active or need exact differences, by u alone: everything else is
  // settled with one compare.
  FLASHMETRIC_INLINE typename Vec<T>::M candidates(Vec<T> u, Vec<T> near_below, int64_t i,
                                                   int64_t j) const {
    const auto other = Vec<T>::differs(ref_.classes + j, query_.classes[i]);
    if constexpr (kPositive) return ~other;
    const Vec<T> reach(reach_);
    return less(u, D::kDifference ? max(reach, near_below) : reach) & other;
  }

  // First column that row i uses.
  int64_t col_start(int64_t i) const { return block_.diagonal ? i + 1 : block_.col_begin; }

  void gram() {
    for (int64_t j = block_.col_begin; j < block_.col_end; j += kCols) {
      const int64_t last =
          block_.diagonal && j + kCols < block_.row_end ? j + kCols : block_.row_end;
      for (int64_t i = block_.row_begin; i < last; i += kRows) {
        const T* a[kRows];
        tile_rows(query_, i, block_.row_end, a);
        gram_tile(a, ref_.panels + j * ref_.d, ref_.d, h_row(i) + (j - block_.col_begin), width_);
      }
    }
  }

  // Turns row i of the block from inner products into weights; returns its active pairs.
  int64_t weigh_row(int64_t i) {
    T* h = h_row(i);
    const Vec<T> bias(query_.bias[i]), weight(op_.weight[i]), zero(0);
    const bool zero_row = D::kUnitRows && query_.norms[i] == T(0);
    Vec<T> sum(0), h_sum(0);
    int64_t active_count = 0;
    for (int64_t c = 0; c < width_; c += kLanes) {
      const int64_t j = block_.col_begin + c;
      const int64_t skip = col_start(i) - j;
      if (skip >= kLanes) {
        zero.store(h + c);
        continue;
      }
      const Vec<T> norms = bias + Vec<T>::load(ref_.bias + j);
      Vec<T> u = fma(Vec<T>(-2), Vec<T>::load(h + c), norms);
      const Vec<T> near_below = Vec<T>(D::kDifference ? kNearFraction : 0) * norms;
      // A zero row is at cosine distance 1 from every row, to the bit, and has no gradient. Padding
      // keeps its infinite u.
      typename Vec<T>::M apart;
      if constexpr (D::kUnitRows) {
        apart = less(u, Vec<T>(__builtin_inff()));
        if (!zero_row) apart = apart & equal(Vec<T>::load(ref_.norms + j), zero);
        u = select(apart, Vec<T>(2), u);
      }
      auto candidate = candidates(u, near_below, i, j);
      if (skip > 0) candidate = candidate & Vec<T>::from(static_cast<int>(skip));
      if (!candidate.any()) {
        zero.store(h + c);
        continue;
      }
      const Vec<T> d = D::value(u);
      const Vec<T> z = violation(d);
      const auto active = candidate & greater(z, zero);
      unsigned near_bits = 0;
      Vec<T> loss = select(active, F::value(z), zero);
      const Vec<T> pair_weight = op_.symmetric ? weight + Vec<T>::load(op_.weight + j) : weight;
      const Vec<T> sign(kPositive ? 2 : -2);
      Vec<T> du = select(active, sign * F::slope(z) * D::slope(d) * pair_weight, zero);
      if constexpr (D::kUnitRows) du = select(apart, zero, du);
      Vec<T> one = select(active, Vec<T>(1), zero);
      if constexpr (D::kDifference) {
        const auto near = candidate & less(u, near_below);
        near_bits = near.bits();
        loss = select(near, zero, loss);
        du = select(near, zero, du);
        one = select(near, zero, one);
      }
      du.store(h + c);
      sum = sum + loss;
      h_sum = h_sum + du;
      active_count += __builtin_popcount(active.bits() & ~near_bits);
      (Vec<T>::load(partial_.sum + c) + loss).store(partial_.sum + c);
      (Vec<T>::load(partial_.active + c) + one).store(partial_.active + c);
      (Vec<T>::load(partial_.weight + c) + du).store(partial_.weight + c);
      for (; near_bits != 0; near_bits &= near_bits - 1) near_pair(i, j + __builtin_ctz(near_bits));
    }
    if (rows_.sum != nullptr) rows_.sum[i] += static_cast<double>(sum.sum());
    if (rows_.active != nullptr) rows_.active[i] += active_count;
    row_weight_[i - block_.row_begin] = h_sum.sum();
    return active_count;
  }

  // One pair by exact differences, applied at once: a matrix product would lose x_i - r_j again.
  void near_pair(int64_t i, int64_t j) {
    const int32_t col = static_cast<int32_t>(j), row = static_cast<int32_t>(i);
    T u;
    exact<D>(query_.rows + i * query_.d, query_.norms[i], ref_, &col, 1, &u);
    const T d = D::value(u);
    const T z = violation(d);
    if (!(z > T(0))) return;
    const double loss = static_cast<double>(F::value(z));
    if (rows_.sum != nullptr) rows_.sum[i] += loss;
    if (columns_.sum != nullptr) columns_.sum[j] += loss;
    if (rows_.active != nullptr) ++rows_.active[i];
    if (columns_.active != nullptr) ++columns_.active[j];
    const T pair_weight = op_.symmetric ? op_.weight[i] + op_.weight[j] : op_.weight[i];
    const T du = (kPositive ? T(1) : T(-1)) * F::slope(z) * D::slope(d) * pair_weight;
    const T* x = query_.rows + i * query_.d;
    const T* y = ref_.rows + j * ref_.d;
    if (rows_.grad != nullptr) accumulate<D>(x, ref_, &col, &du, 1, rows_.grad + i * query_.d);
    if (columns_.grad != nullptr)
      accumulate<D>(y, query_, &row, &du, 1, columns_.grad + j * ref_.d);
  }

  void apply_sparse() {
    int32_t list[kMaxBlockRows];
    T half_weight[kMaxBlockRows];
    for (int64_t i = block_.row_begin; i < block_.row_end; ++i) {
      const T* h = h_row(i);
      int64_t count = 0;
      for (int64_t c = 0; c < width_; ++c) {
        if (h[c] == T(0)) continue;
        list[count] = static_cast<int32_t>(block_.col_begin + c);
        half_weight[count++] = T(0.5) * h[c];
      }
      if (rows_.grad != nullptr)
        accumulate<D>(query_.rows + i * query_.d, ref_, list, half_weight, count,
                      rows_.grad + i * query_.d);
      const int32_t row = static_cast<int32_t>(i);
      if (columns_.grad != nullptr)
        for (int64_t t = 0; t < count; ++t)
          accumulate<D>(ref_.rows + list[t] * ref_.d, query_, &row, half_weight + t, 1,
                        columns_.grad + list[t] * ref_.d);
    }
  }

  void apply_dense() {
    const int64_t d = query_.d;
    const int64_t rows = block_.row_end - block_.row_begin;
    const int64_t cols = block_.col_end - block_.col_begin;
    const T* x = query_.rows + block_.row_begin * d;
    const T* y = ref_.rows + block_.col_begin * d;
    if (rows_.grad != nullptr) {
      T* grad = rows_.grad + block_.row_begin * d;
      subtract_product<T, false>(h_, width_, rows, cols, y, d, grad);
      if (D::kDifference) scale_rows(row_weight_, rows, x, d, grad);
    }
    if (columns_.grad != nullptr) {
      T* grad = columns_.grad + block_.col_begin * d;
      subtract_product<T, true>(h_, width_, cols, rows, x, d, grad);
      if (D::kDifference) scale_rows(partial_.weight, cols, y, d, grad);
    }
  }

  static void scale_rows(const T* weight, int64_t rows, const T* x, int64_t d, T* out) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < d; ++k) out[r * d + k] += weight[r] * x[r * d + k];
  }

  const PairSum<T>& op_;
  const Side<T>& query_;
  const Side<T>& ref_;
  const Block& block_;
  const PairSumRows<T>& rows_;
  const PairSumRows<T>& columns_;
  T* h_;
  T reach_;
  int64_t width_;
  Columns<T> partial_;
  T row_weight_[kMaxBlockRows];
};

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
