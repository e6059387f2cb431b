// SPDX-License-Identifier: Apache-2.0
// From weights on the pairs of a block to gradients of the rows of both sides. With H the block of
// weights h = 2 dL/du, grad(x_i) = sum_j h_ij (x_i - r_j): one matrix product plus the row sums of
// H times x_i. Blocks with few weights go pair by pair, near pairs by exact differences, and direct
// distances by a product of their own.
#pragma once

#include <block.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// With fewer weights than 1 / kFewPairs of a block, pair by pair beats the matrix product.
constexpr int64_t kFewPairs = 10;

// Calls f with a distance of the same gradient in u.
template <class F>
FLASHMETRIC_INLINE void with_gradient_form(Distance distance, F&& f) {
  if (distance == Distance::kCityblock) return f(Cityblock{});
  if (distance == Distance::kChi2) return f(Chi2{});
  if (distance == Distance::kDot) return f(Dot{});
  f(Sqeuclidean{});
}

// out[r, :] += sum over k of h(r, k) gradient(a_r, x_k), with h as in subtract_product.
template <class D, class T, bool kTransposed>
void direct_product(const T* h, int64_t ld, int64_t rows, int64_t depth, const T* a, const T* x,
                    int64_t d, T* out) {
  constexpr int kRows = Tile<T>::kRows;
  constexpr int kLanes = Tile<T>::kLanes;
  const int64_t row_step = kTransposed ? 1 : ld;
  const int64_t k_step = kTransposed ? ld : 1;
  for (int64_t c = 0; c < d; c += kLanes) {
    const int lanes = d - c < kLanes ? static_cast<int>(d - c) : kLanes;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      Vec<T> acc[kRows], own[kRows];
      const T* weight[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = r0 + r < rows ? r0 + r : rows - 1;
        acc[r] = Vec<T>(0);
        own[r] = Vec<T>::load_first(a + row * d + c, lanes);
        weight[r] = h + row * row_step;
      }
      for (int64_t k = 0; k < depth; ++k) {
        const Vec<T> b = Vec<T>::load_first(x + k * d + c, lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          acc[r] = fma(Vec<T>(weight[r][k * k_step]), D::gradient(own[r], b), acc[r]);
      }
      for (int64_t r = 0; r < kRows && r0 + r < rows; ++r) {
        T* p = out + (r0 + r) * d + c;
        (Vec<T>::load_first(p, lanes) + acc[r]).store_first(p, lanes);
      }
    }
  }
}

// Where gradients go: of positives and of negatives, or both to the same place; null: not wanted.
template <class T>
struct GradTargets {
  T* rows[2];
  T* columns[2];
};

template <class T>
class BackProduct {
 public:
  BackProduct(const PairBatch<T>& batch, const Block& block, const PairBlock<T>& pairs,
              const GradTargets<T>& targets, T* spare)
      : batch_(batch),
        block_(block),
        pairs_(pairs),
        targets_(targets),
        spare_(spare),
        split_(targets.rows[0] != targets.rows[1] || targets.columns[0] != targets.columns[1]) {
    for (int64_t c = 0; c < pairs.width(); ++c) col_sum_[c] = T(0);
  }

  bool wanted() const { return targets_.rows[0] != nullptr || targets_.columns[0] != nullptr; }

  // A row without pairs.
  void clear(int64_t i) {
    T* h = pairs_.line(i);
    for (int64_t c = 0; c < pairs_.width(); c += kLanes) Vec<T>(0).store(h + c);
    row_sum_[i - block_.row_begin] = T(0);
    if (split_)
      for (int64_t v = 0; v < pairs_.vecs(); ++v) positive_[i - block_.row_begin][v] = 0;
  }

  // Turns line(i) from distances into h, with `weight` [width] = dL/dd where `kinds` has a pair.
  void weigh(int64_t i, const Kinds<T>& kinds, const T* weight) {
    T* line = pairs_.line(i);
    if (split_)
      __builtin_memcpy(positive_[i - block_.row_begin], kinds.positive, sizeof(kinds.positive));
    with_distance(batch_.distance, [&](auto distance) {
      const Vec<T> twice(is_direct(batch_.distance) ? 1 : 2), zero(0);
      Vec<T> sum(0);
      int64_t count[2] = {0, 0};
      const bool none_apart = pairs_.none_apart(i);
      for (int64_t t = 0; t < kinds.live_count; ++t) {
        const int64_t v = kinds.live[t];
        T* p = line + v * kLanes;
        unsigned product = kinds.any(v);
        const Vec<T> slope = decltype(distance)::slope(Vec<T>::load(p));
        const Vec<T> du = Vec<T>::load(weight + v * kLanes) * slope;
        if (__builtin_expect(kinds.near[v] != 0, 0))
          near_vector(i, v, kinds.near[v], kinds.positive[v], du);
        product &= ~static_cast<unsigned>(kinds.near[v]);
        if (__builtin_expect(!none_apart, 0)) product &= ~pairs_.apart(i, v);
        const Vec<T> h = select(Vec<T>::mask(product), twice * du, zero);
        h.store(p);
        const unsigned some = ~equal(h, zero).bits() & product;
        Vec<T> summed = h;
        if (split_) {
          const unsigned second = some & ~static_cast<unsigned>(kinds.positive[v]);
          count[0] += __builtin_popcount(some & ~second);
          count[1] += __builtin_popcount(second);
          summed = select(Vec<T>::mask(second), h, zero);
        } else {
          count[1] += __builtin_popcount(some);
        }
        sum = sum + summed;
        T* column = col_sum_ + v * kLanes;
        (Vec<T>::load(column) + summed).store(column);
      }
      row_sum_[i - block_.row_begin] = sum.sum();
      count_[0] += count[0];
      count_[1] += count[1];
    });
  }

  // weigh() vector by vector, of a row without pairs apart and where both kinds go to one place.
  class RowWeights {
   public:
    RowWeights(BackProduct& back, int64_t i) : back_(back), i_(i), line_(back.pairs_.line(i)) {}

    // du = dL/du, 0 where there is no pair.
    FLASHMETRIC_INLINE void add(int64_t v, Vec<T> du, unsigned near) {
      Vec<T> h = du + du;
      if (__builtin_expect(near != 0, 0)) {
        back_.near_vector(i_, v, near, near, du);
        h = select(Vec<T>::mask(~near), h, Vec<T>(0));
      }
      h.store(line_ + v * kLanes);
      count_ += __builtin_popcount(~equal(h, Vec<T>(0)).bits() & kAll);
      sum_ = sum_ + h;
      T* column = back_.col_sum_ + v * kLanes;
      (Vec<T>::load(column) + h).store(column);
    }

    void finish() {
      back_.row_sum_[i_ - back_.block_.row_begin] = sum_.sum();
      back_.count_[1] += count_;
    }

   private:
    BackProduct& back_;
    const int64_t i_;
    T* const line_;
    Vec<T> sum_ = Vec<T>(0);
    int64_t count_ = 0;
  };

  // Adds what the weights give.
  void apply() {
    T* h = pairs_.line(block_.row_begin);
    if (count_[0] > 0 && count_[1] > 0) {
      // What goes pair by pair goes first, and leaves zeros.
      if (few(0)) {
        apply_one(0, h, true);
        apply_one(1, h, false);
      } else {
        if (!few(1)) separate(h);
        apply_one(1, few(1) ? h : spare_, few(1));
        apply_one(0, h, false);
      }
    } else if (count_[0] > 0) {
      apply_one(0, h, false);
    } else if (count_[1] > 0) {
      apply_one(1, h, false);
    }
  }

 private:
  static constexpr int kLanes = Tile<T>::kLanes;

  bool few(int kind) const {
    return count_[kind] * kFewPairs <
           (block_.row_end - block_.row_begin) * (block_.col_end - block_.col_begin);
  }

  // `mixed`: h holds both kinds, of which this one is to be cleared.
  void apply_one(int kind, T* h, bool mixed) {
    with_gradient_form(batch_.distance, [&](auto distance) {
      using D = decltype(distance);
      if (few(kind)) {
        apply_sparse<D>(kind, h, mixed);
      } else {
        apply_dense<D>(kind, h);
      }
    });
  }

  // Moves the weights of negatives to the spare block.
  void separate(T* h) {
    const int64_t rows = block_.row_end - block_.row_begin, width = pairs_.width();
    const Vec<T> zero(0);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < pairs_.vecs(); ++v) {
        T* p = h + r * width + v * kLanes;
        const auto positive = Vec<T>::mask(positive_[r][v]);
        const Vec<T> all = Vec<T>::load(p);
        select(positive, zero, all).store(spare_ + r * width + v * kLanes);
        select(positive, all, zero).store(p);
      }
  }

  // Applied at once: a matrix product would lose x_i - r_j again.
  __attribute__((noinline)) void near_vector(int64_t i, int64_t v, unsigned near, unsigned positive,
                                             Vec<T> du) {
    T of[kLanes];
    du.store(of);
    const int32_t row = static_cast<int32_t>(i);
    const int64_t d = batch_.query.d;
    for (unsigned bits = near; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      const int kind = (positive >> lane & 1) != 0 ? 0 : 1;
      const int64_t j = block_.col_begin + v * kLanes + lane;
      const int32_t col = static_cast<int32_t>(j);
      if (targets_.rows[kind] != nullptr)
        accumulate<Sqeuclidean>(batch_.query.rows + i * d, batch_.ref, &col, of + lane, 1,
                                targets_.rows[kind] + i * d);
      if (targets_.columns[kind] != nullptr)
        accumulate<Sqeuclidean>(batch_.ref.rows + j * d, batch_.query, &row, of + lane, 1,
                                targets_.columns[kind] + j * d);
    }
  }

  template <class D>
  void apply_sparse(int kind, T* h, bool mixed) {
    int32_t list[kMaxBlockRows];
    T coefficient[kMaxBlockRows];
    const T half = D::kDirect ? T(1) : T(0.5);
    const int64_t d = batch_.query.d;
    for (int64_t i = block_.row_begin; i < block_.row_end; ++i, h += pairs_.width()) {
      int64_t count = 0;
      for (int64_t v = 0; v < pairs_.vecs(); ++v) {
        unsigned wanted = kAll;
        if (mixed) {
          const unsigned positive = positive_[i - block_.row_begin][v];
          wanted &= kind == 0 ? positive : ~positive;
          if (wanted == 0) continue;
        }
        unsigned bits = ~equal(Vec<T>::load(h + v * kLanes), Vec<T>(0)).bits() & wanted;
        for (; bits != 0; bits &= bits - 1) {
          const int64_t c = v * kLanes + __builtin_ctz(bits);
          list[count] = static_cast<int32_t>(block_.col_begin + c);
          coefficient[count++] = half * h[c];
          if (mixed) h[c] = T(0);
        }
      }
      if (targets_.rows[kind] != nullptr)
        accumulate<D>(batch_.query.rows + i * d, batch_.ref, list, coefficient, count,
                      targets_.rows[kind] + i * d);
      const int32_t row = static_cast<int32_t>(i);
      if (targets_.columns[kind] != nullptr)
        for (int64_t t = 0; t < count; ++t)
          accumulate<D>(batch_.ref.rows + list[t] * d, batch_.query, &row, coefficient + t, 1,
                        targets_.columns[kind] + list[t] * d);
    }
  }

  template <class D>
  void apply_dense(int kind, const T* h) {
    const int64_t d = batch_.query.d, width = pairs_.width();
    const int64_t rows = block_.row_end - block_.row_begin;
    const int64_t cols = block_.col_end - block_.col_begin;
    const T* x = batch_.query.rows + block_.row_begin * d;
    const T* y = batch_.ref.rows + block_.col_begin * d;
    T* of_rows =
        targets_.rows[kind] == nullptr ? nullptr : targets_.rows[kind] + block_.row_begin * d;
    T* of_columns =
        targets_.columns[kind] == nullptr ? nullptr : targets_.columns[kind] + block_.col_begin * d;
    if constexpr (D::kDirect) {
      if (of_rows != nullptr) direct_product<D, T, false>(h, width, rows, cols, x, y, d, of_rows);
      if (of_columns != nullptr)
        direct_product<D, T, true>(h, width, cols, rows, y, x, d, of_columns);
    } else {
      if (of_rows != nullptr) subtract_product<T, false>(h, width, rows, cols, y, d, of_rows);
      if (of_columns != nullptr) subtract_product<T, true>(h, width, cols, rows, x, d, of_columns);
      if (D::kDifference) {
        if (kind == 0) sum_weights(h, rows);
        if (of_rows != nullptr) scale_rows(row_sum_, rows, x, d, of_rows);
        if (of_columns != nullptr) scale_rows(col_sum_, cols, y, d, of_columns);
      }
    }
  }

  void sum_weights(const T* h, int64_t rows) {
    const int64_t width = pairs_.width();
    for (int64_t c = 0; c < width; c += kLanes) Vec<T>(0).store(col_sum_ + c);
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> sum(0);
      for (int64_t c = 0; c < width; c += kLanes) {
        const Vec<T> w = Vec<T>::load(h + r * width + c);
        sum = sum + w;
        (Vec<T>::load(col_sum_ + c) + w).store(col_sum_ + c);
      }
      row_sum_[r] = sum.sum();
    }
  }

  static void scale_rows(const T* weight, int64_t rows, const T* x, int64_t d, T* out) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < d; ++k) out[r * d + k] += weight[r] * x[r * d + k];
  }

  static constexpr unsigned kAll = (1u << kLanes) - 1;

  const PairBatch<T>& batch_;
  const Block& block_;
  const PairBlock<T>& pairs_;
  const GradTargets<T> targets_;
  T* const spare_;  // kMaxBlockRows^2 elements
  const bool split_;
  // Where kinds have separate gradients, weights of positives and of negatives; otherwise the
  // latter stands for both kinds. Sums of the latter only.
  int64_t count_[2] = {0, 0};
  alignas(64) T row_sum_[kMaxBlockRows];
  alignas(64) T col_sum_[kMaxBlockRows];
  Bits positive_[kMaxBlockRows][Kinds<T>::kVecs];  // where kinds have separate gradients
};

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
