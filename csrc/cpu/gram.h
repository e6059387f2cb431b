// SPDX-License-Identifier: Apache-2.0
// Tiles of inner products: packing, the micro-kernel, and its transpose for the gradient.
#pragma once

#include <simd.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// An inner product is summed in chains of this many features, whose sums are then added: one chain
// over thousands of features would lose as many bits as the difference of near rows has.
constexpr int64_t kChain = 256;

// The squared norm of a row is summed exactly as gram_tile sums the product of that row with
// itself: exact duplicates get u = 0 to the bit.
template <class T>
void pack(const T* x, int64_t n, int64_t d, int64_t begin, int64_t end, T* panels, T* norms) {
  constexpr int kCols = Tile<T>::kCols;
  constexpr int kLanes = Tile<T>::kLanes;
  constexpr int64_t kFeatures = 16;  // one cache line of a row at a time
  for (int64_t p = begin; p < end; p += kCols) {
    T* panel = panels + p * d;
    const int64_t rows = n - p < kCols ? n - p : kCols;
    for (int64_t k0 = 0; k0 < d; k0 += kFeatures) {
      const int64_t k1 = k0 + kFeatures < d ? k0 + kFeatures : d;
      for (int64_t j = 0; j < rows; ++j) {
        const T* row = x + (p + j) * d;
        for (int64_t k = k0; k < k1; ++k) panel[k * kCols + j] = row[k];
      }
      for (int64_t j = rows; j < kCols; ++j)
        for (int64_t k = k0; k < k1; ++k) panel[k * kCols + j] = T(0);
    }
    for (int64_t j = 0; j < kCols; j += kLanes) {
      Vec<T> total(0);
      for (int64_t k0 = 0; k0 < d; k0 += kChain) {
        Vec<T> chain(0);
        for (int64_t k = k0; k < d && k < k0 + kChain; ++k) {
          const Vec<T> v = Vec<T>::load(panel + k * kCols + j);
          chain = fma(v, v, chain);
        }
        total = total + chain;
      }
      total.store(norms + p + j);
    }
  }
}

// One chain: out[r * ld + c] (+)= inner product of features [k, end) of a[r] and panel column c.
template <class T>
FLASHMETRIC_INLINE void gram_chain(const T* const (&a)[Tile<T>::kRows], const T* panel, int64_t k,
                                   int64_t end, T* out, int64_t ld) {
  constexpr int kRows = Tile<T>::kRows;
  constexpr int kVecs = Tile<T>::kVecs;
  constexpr int kLanes = Tile<T>::kLanes;
  const bool first = k == 0;
  Vec<T> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec<T>(0);
  panel += k * kVecs * kLanes;
  for (; k < end; ++k) {
    Vec<T> b[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) b[v] = Vec<T>::load(panel + v * kLanes);
    panel += kVecs * kLanes;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> x(a[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      T* p = out + r * ld + v * kLanes;
      (first ? acc[r][v] : Vec<T>::load(p) + acc[r][v]).store(p);
    }
}

// out[r * ld + c] = inner product of a[r] and column c of the panel.
template <class T>
FLASHMETRIC_INLINE void gram_tile(const T* const (&a)[Tile<T>::kRows], const T* panel, int64_t d,
                                  T* out, int64_t ld) {
  int64_t k = 0;
  do {
    const int64_t end = k + kChain < d ? k + kChain : d;
    gram_chain(a, panel, k, end, out, ld);
    k = end;
  } while (k < d);
}

// Pointers to the tile's rows; rows past the end repeat the last one (their results are not used).
template <class T>
FLASHMETRIC_INLINE void tile_rows(const Side<T>& side, int64_t i, int64_t end,
                                  const T* (&a)[Tile<T>::kRows]) {
#pragma GCC unroll 8
  for (int r = 0; r < Tile<T>::kRows; ++r)
    a[r] = side.rows + (i + r < end ? i + r : end - 1) * side.d;
}

// out[r, :] -= sum over k of h(r, k) x[k, :] for `rows` rows and `depth` k, where h(r, k) is
// h[r * ld + k], or h[k * ld + r] when kTransposed.
template <class T, bool kTransposed>
void subtract_product(const T* h, int64_t ld, int64_t rows, int64_t depth, const T* x, int64_t d,
                      T* out) {
  constexpr int kRows = Tile<T>::kRows;
  constexpr int kVecs = Tile<T>::kVecs;
  constexpr int kLanes = Tile<T>::kLanes;
  const int64_t row_step = kTransposed ? 1 : ld;
  const int64_t k_step = kTransposed ? ld : 1;
  for (int64_t c = 0; c < d; c += kVecs * kLanes) {
    const int64_t left = d - c;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const int64_t valid = rows - r0 < kRows ? rows - r0 : kRows;
      Vec<T> acc[kRows][kVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec<T>(0);
      const T* first[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) first[r] = h + (r0 + (r < valid ? r : valid - 1)) * row_step;
      if (left >= kVecs * kLanes) {
        for (int64_t k = 0; k < depth; ++k) {
          Vec<T> b[kVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) b[v] = Vec<T>::load(x + k * d + c + v * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const Vec<T> w(first[r][k * k_step]);
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(w, b[v], acc[r][v]);
          }
        }
      } else {
        for (int v = 0; v * kLanes < left; ++v) {
          const int lanes =
              left - v * kLanes < kLanes ? static_cast<int>(left - v * kLanes) : kLanes;
          for (int64_t k = 0; k < depth; ++k) {
            const Vec<T> b = Vec<T>::load_first(x + k * d + c + v * kLanes, lanes);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
              acc[r][v] = fma(Vec<T>(first[r][k * k_step]), b, acc[r][v]);
          }
        }
      }
      for (int64_t r = 0; r < valid; ++r)
        for (int v = 0; v < kVecs && v * kLanes < left; ++v) {
          T* p = out + (r0 + r) * d + c + v * kLanes;
          const int lanes =
              left - v * kLanes < kLanes ? static_cast<int>(left - v * kLanes) : kLanes;
          (Vec<T>::load_first(p, lanes) - acc[r][v]).store_first(p, lanes);
        }
    }
  }
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
