// SPDX-License-Identifier: Apache-2.0
// Hardest negatives: the running minimum of bias(r) - 2 x.r over rows of other classes, for both
// sides of a block at once. x's own bias is a constant of its row, so the key leaves it out.
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

template <class T, bool kColumns>
FLASHMETRIC_INLINE void nearest_tile(const T* tile, const Side<T>& query, const Side<T>& ref,
                                     int64_t i, int64_t row_begin, int64_t valid, int64_t j,
                                     Nearest<T> rows, T* col_key, T* col_row) {
  constexpr int kLanes = Tile<T>::kLanes;
  const Vec<T> minus_two(-2);
#pragma GCC unroll 4
  for (int v = 0; v < Tile<T>::kVecs; ++v) {
    const int64_t c = v * kLanes;
    const Vec<T> bias = Vec<T>::load(ref.bias + j + c);
    Vec<T> col_best, col_from;
    if constexpr (kColumns) {
      col_best = Vec<T>::load(col_key + c);
      col_from = Vec<T>::load(col_row + c);
    }
    for (int64_t r = 0; r < valid; ++r) {
      const Vec<T> s = Vec<T>::load(tile + r * Tile<T>::kCols + c);
      const auto negative = Vec<T>::differs(ref.classes + j + c, query.classes[i + r]);
      const Vec<T> key = fma(minus_two, s, bias);
      const auto hit = less_equal(key, Vec<T>(rows.key[i + r])) & negative;
      if (__builtin_expect(hit.any(), 0))
        improve<T>(key, hit, j + c, rows.key + i + r, rows.index + i + r);
      if constexpr (kColumns) {
        const Vec<T> from_col = fma(minus_two, s, Vec<T>(query.bias[i + r]));
        const auto lower = less(from_col, col_best) & negative;
        col_best = select(lower, from_col, col_best);
        col_from = select(lower, Vec<T>(i + r - row_begin), col_from);
      }
    }
    if constexpr (kColumns) {
      col_best.store(col_key + c);
      col_from.store(col_row + c);
    }
  }
}

template <class T, bool kColumns>
void nearest_block(const Side<T>& query, const Side<T>& ref, const Block& block, Nearest<T> rows,
                   Nearest<T> columns) {
  constexpr int kRows = Tile<T>::kRows;
  constexpr int kCols = Tile<T>::kCols;
  alignas(64) T tile[kRows * kCols];
  alignas(64) T col_key[kCols];
  alignas(64) T col_row[kCols];  // row within the block: exact in any floating type
  for (int64_t j = block.col_begin; j < block.col_end; j += kCols) {
    if constexpr (kColumns)
      for (int c = 0; c < kCols; ++c) {
        col_key[c] = static_cast<T>(__builtin_inff());
        col_row[c] = T(0);
      }
    // In a diagonal block every pair appears on both sides of the diagonal; finding a minimum
    // twice does no harm, but rows past the panel's last column have nothing new.
    const int64_t row_end = block.diagonal && j + kCols < block.row_end ? j + kCols : block.row_end;
    for (int64_t i = block.row_begin; i < row_end; i += kRows) {
      const T* a[kRows];
      tile_rows(query, i, block.row_end, a);
      gram_tile(a, ref.panels + j * ref.d, ref.d, tile, kCols);
      const int64_t valid = block.row_end - i < kRows ? block.row_end - i : kRows;
      nearest_tile<T, kColumns>(tile, query, ref, i, block.row_begin, valid, j, rows, col_key,
                                col_row);
    }
    if constexpr (kColumns) {
      const int64_t width = block.col_end - j < kCols ? block.col_end - j : kCols;
      for (int64_t c = 0; c < width; ++c) {
        const int32_t row = static_cast<int32_t>(block.row_begin + int64_t(col_row[c]));
        T& key = columns.key[j + c];
        int32_t& index = columns.index[j + c];
        if (col_key[c] < key || (col_key[c] == key && row < index && index >= 0)) {
          key = col_key[c];
          index = row;
        }
      }
    }
  }
}

template <class T>
void nearest_negative(const Side<T>& query, const Side<T>& ref, const Block& block, Nearest<T> rows,
                      Nearest<T> columns) {
  if (columns.key != nullptr) {
    nearest_block<T, true>(query, ref, block, rows, columns);
  } else {
    nearest_block<T, false>(query, ref, block, rows, columns);
  }
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
