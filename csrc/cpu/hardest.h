// SPDX-License-Identifier: Apache-2.0
// Hardest pairs from tiles of inner products: per row the running minimum of a key over rows of
// other classes (nearest negative, key bias(r) - 2 x.r) and, where wanted, over rows of its own
// class (farthest positive, the key negated), for both sides of a block at once. x's own bias is a
// constant of its row, so the keys leave it out.
#pragma once

#include <gram.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// Takes over the smallest of the keys that beat or tie a row's minimum; of equals, the first.
template <class T>
FLASHMETRIC_INLINE void improve(Vec<T> keys, typename Vec<T>::M hit, int64_t col, T* key,
                                int32_t* index) {
  const Vec<T> candidates = select(hit, keys, Vec<T>(__builtin_inff()));
  const T lowest = candidates.min();
  const auto lanes = equal(candidates, Vec<T>(lowest)) & hit;
  const int32_t j = static_cast<int32_t>(col) + __builtin_ctz(lanes.bits());
  if (lowest < *key || j < *index) {
    *key = lowest;
    *index = j;
  }
}

// Minima of one panel's columns over the rows of one block.
template <class T>
struct ColumnMinima {
  alignas(64) T key[Tile<T>::kCols];
  alignas(64) T row[Tile<T>::kCols];  // within the block: exact in any floating type

  void reset() {
    for (int c = 0; c < Tile<T>::kCols; ++c) {
      key[c] = static_cast<T>(__builtin_inff());
      row[c] = T(0);
    }
  }

  void merge(int64_t row_begin, int64_t col, int64_t width, Nearest<T> out) const {
    for (int64_t c = 0; c < width; ++c) {
      const int32_t candidate = static_cast<int32_t>(row_begin + int64_t(row[c]));
      T& best = out.key[col + c];
      int32_t& index = out.index[col + c];
      if (key[c] < best || (key[c] == best && candidate < index)) {
        best = key[c];
        index = candidate;
      }
    }
  }
};

template <class T>
struct Where {
  int64_t row, rows;  // first row of the tile, how many are valid
  int64_t col;        // first column of the panel
  int64_t row_begin;  // first row of the block
  bool diagonal;
};

// One kind of pair of one tile. kSign is +1 for negatives and -1 for positives.
template <class T, bool kColumns, int kSign>
FLASHMETRIC_INLINE void nearest_tile(const T* tile, const Side<T>& query, const Side<T>& ref,
                                     const Where<T>& at, Nearest<T> rows, ColumnMinima<T>& minima) {
  constexpr int kLanes = Tile<T>::kLanes;
  const Vec<T> scale(-2 * kSign), sign(kSign);
#pragma GCC unroll 4
  for (int v = 0; v < Tile<T>::kVecs; ++v) {
    const int64_t c = v * kLanes;
    const Vec<T> bias = sign * Vec<T>::load(ref.bias + at.col + c);
    Vec<T> col_best, col_from;
    if constexpr (kColumns) {
      col_best = Vec<T>::load(minima.key + c);
      col_from = Vec<T>::load(minima.row + c);
    }
    for (int64_t r = 0; r < at.rows; ++r) {
      const int64_t i = at.row + r;
      const Vec<T> s = Vec<T>::load(tile + r * Tile<T>::kCols + c);
      auto eligible = Vec<T>::differs(ref.classes + at.col + c, query.classes[i]);
      if constexpr (kSign < 0) {
        eligible = ~eligible;
        const int64_t own = i - at.col - c;
        if (at.diagonal && own >= 0 && own < kLanes)
          eligible = eligible & ~(Vec<T>::from(static_cast<int>(own)) &
                                  ~Vec<T>::from(static_cast<int>(own) + 1));
      }
      const Vec<T> key = fma(scale, s, bias);
      const auto hit = less_equal(key, Vec<T>(rows.key[i])) & eligible;
      if (__builtin_expect(hit.any(), 0))
        improve<T>(key, hit, at.col + c, rows.key + i, rows.index + i);
      if constexpr (kColumns) {
        const Vec<T> from_col = fma(scale, s, sign * Vec<T>(query.bias[i]));
        const auto lower = less(from_col, col_best) & eligible;
        col_best = select(lower, from_col, col_best);
        col_from = select(lower, Vec<T>(i - at.row_begin), col_from);
      }
    }
    if constexpr (kColumns) {
      col_best.store(minima.key + c);
      col_from.store(minima.row + c);
    }
  }
}

template <class T, bool kColumns, bool kPositives>
void hardest_block(const Side<T>& query, const Side<T>& ref, const Block& block,
                   const Extremes<T>& rows, const Extremes<T>& columns) {
  constexpr int kRows = Tile<T>::kRows;
  constexpr int kCols = Tile<T>::kCols;
  alignas(64) T tile[kRows * kCols];
  ColumnMinima<T> negative, positive;
  for (int64_t j = block.col_begin; j < block.col_end; j += kCols) {
    if constexpr (kColumns) {
      negative.reset();
      positive.reset();
    }
    // In a diagonal block every pair appears on both sides of the diagonal; finding a minimum
    // twice does no harm, but rows past the panel's last column have nothing new.
    const int64_t row_end = block.diagonal && j + kCols < block.row_end ? j + kCols : block.row_end;
    for (int64_t i = block.row_begin; i < row_end; i += kRows) {
      const T* a[kRows];
      tile_rows(query, i, block.row_end, a);
      gram_tile(a, ref.panels + j * ref.d, ref.d, tile, kCols);
      const int64_t valid = block.row_end - i < kRows ? block.row_end - i : kRows;
      const Where<T> at{i, valid, j, block.row_begin, block.diagonal};
      nearest_tile<T, kColumns, 1>(tile, query, ref, at, rows.negative, negative);
      if constexpr (kPositives)
        nearest_tile<T, kColumns, -1>(tile, query, ref, at, rows.positive, positive);
    }
    if constexpr (kColumns) {
      const int64_t width = block.col_end - j < kCols ? block.col_end - j : kCols;
      negative.merge(block.row_begin, j, width, columns.negative);
      if constexpr (kPositives) positive.merge(block.row_begin, j, width, columns.positive);
    }
  }
}

template <class T>
void hardest(const Side<T>& query, const Side<T>& ref, const Block& block, const Extremes<T>& rows,
             const Extremes<T>* columns) {
  const bool positives = rows.positive.key != nullptr;
  if (columns != nullptr) {
    (positives ? hardest_block<T, true, true> : hardest_block<T, true, false>)(query, ref, block,
                                                                               rows, *columns);
  } else {
    (positives ? hardest_block<T, false, true> : hardest_block<T, false, false>)(query, ref, block,
                                                                                 rows, rows);
  }
}

// How far above the lowest key of row i the key of the truly nearest reference can be. Both keys
// are inner products and squared norms of rows hardly longer than x; each is off by at most 3.2
// times the squared norm of x times half an epsilon per rounding.
template <class T>
T key_tolerance(const Side<T>& query, int64_t i) {
  const int64_t chain = query.d < kChain ? query.d : kChain;
  const T roundings = static_cast<T>(chain + query.d / kChain + 4);
  // The least normal number: products below it are rounded to its multiples.
  const T least = sizeof(T) == 4 ? static_cast<T>(__FLT_MIN__) : static_cast<T>(__DBL_MIN__);
  const T epsilon =
      sizeof(T) == 4 ? static_cast<T>(__FLT_EPSILON__) : static_cast<T>(__DBL_EPSILON__);
  return roundings * (5 * epsilon * query.norms[i] + least);
}

template <class T>
void list_closest(const Side<T>& query, const Side<T>& ref, int64_t begin, int64_t end,
                  const Closest<T>& op) {
  constexpr int kRows = Tile<T>::kRows;
  constexpr int kCols = Tile<T>::kCols;
  constexpr int kLanes = Tile<T>::kLanes;
  alignas(64) T tile[kRows * kCols];
  for (int64_t t = 0; t < op.count; ++t) op.listed[t] = 0;
  for (int64_t j = begin; j < end; j += kCols) {
    for (int64_t first = 0; first < op.count; first += kRows) {
      const int64_t valid = op.count - first < kRows ? op.count - first : kRows;
      const T* a[kRows];
      for (int r = 0; r < kRows; ++r)
        a[r] = query.rows + op.rows[first + (r < valid ? r : valid - 1)] * query.d;
      gram_tile(a, ref.panels + j * ref.d, ref.d, tile, kCols);
      for (int64_t t = first; t < first + valid; ++t) {
        const int64_t i = op.rows[t];
        const Vec<T> highest(op.key[i] + key_tolerance(query, i));
        int32_t* list = op.list + t * op.capacity;
        for (int64_t c = 0; c < kCols; c += kLanes) {
          const Vec<T> s = Vec<T>::load(tile + (t - first) * kCols + c);
          const Vec<T> key = fma(Vec<T>(-2), s, Vec<T>::load(ref.bias + j + c));
          const auto close =
              less_equal(key, highest) & Vec<T>::differs(ref.classes + j + c, query.classes[i]);
          // Padding has an infinite key.
          for (unsigned bits = close.bits(); __builtin_expect(bits != 0, 0); bits &= bits - 1)
            list[op.listed[t]++] = static_cast<int32_t>(j + c) + __builtin_ctz(bits);
        }
      }
    }
  }
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
