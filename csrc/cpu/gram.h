// SPDX-License-Identifier: Apache-2.0
// Tiles of inner products (direct distances: of u): packing, the micro-kernel, and its transpose
// for the gradient.
#pragma once

#include <exact.h>

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

// One chain: out[r * ld + c] (+)= inner product of features [k, end) of a[r] and panel column c;
// for a direct distance D the sum of its terms.
template <class D, class T>
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
      for (int v = 0; v < kVecs; ++v) acc[r][v] = exact_step<D>(x, b[v], acc[r][v]);
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

// out[r * ld + c] = inner product of a[r] and column c of the panel; direct distances: u.
template <class D = Dot, class T>
FLASHMETRIC_INLINE void gram_tile(const T* const (&a)[Tile<T>::kRows], const T* panel, int64_t d,
                                  T* out, int64_t ld) {
  int64_t k = 0;
  do {
    const int64_t end = k + kChain < d ? k + kChain : d;
    gram_chain<D>(a, panel, k, end, out, ld);
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

// All tiles of rows [begin, end) with one panel, for kernels with much else in their registers: not
// inlined, for the compiler would keep the rows' pointers in memory.
template <class D, class T>
__attribute__((noinline)) void gram_panel(const Side<T>& side, int64_t begin, int64_t end,
                                          const T* panel, T* out, int64_t ld) {
  for (int64_t i = begin; i < end; i += Tile<T>::kRows) {
    const T* a[Tile<T>::kRows];
    tile_rows(side, i, end, a);
    gram_tile<D>(a, panel, side.d, out + (i - begin) * ld, ld);
  }
}

// Rows of x that subtract_product multiplies with at a time: with one tile's weights they fit the
// first-level cache.
constexpr int64_t kProductDepth = 96;

// Features [0, columns) of `depth` rows at a stride of d, side by side in kVecs vectors a row and
// padded with zeros: read in place, the rows of a power of two of features would share few sets of
// the cache.
template <class T, int kVecs>
void pack_features(const T* x, int64_t d, int64_t depth, int64_t columns, T* out) {
  constexpr int kLanes = Tile<T>::kLanes;
  for (int64_t k = 0; k < depth; ++k, x += d)
    for (int v = 0; v < kVecs; ++v, out += kLanes) {
      const int64_t left = columns - v * kLanes;
      (left >= kLanes ? Vec<T>::load(x + v * kLanes)
                      : Vec<T>::load_first(x + v * kLanes, static_cast<int>(left)))
          .store(out);
    }
}

// subtract_product for the columns that kVecs vectors hold and a depth that fits the cache.
template <class T, bool kTransposed, int kVecs>
__attribute__((noinline)) void subtract_panel(const T* h, int64_t ld, int64_t rows, int64_t depth,
                                              const T* x, int64_t d, int64_t columns, T* out) {
  constexpr int kRows = Tile<T>::kRows;
  constexpr int kLanes = Tile<T>::kLanes;
  const int64_t row_step = kTransposed ? 1 : ld;
  const int64_t k_step = kTransposed ? ld : 1;
  alignas(64) T packed[kProductDepth * kVecs * kLanes];
  pack_features<T, kVecs>(x, d, depth, columns, packed);
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    const int64_t valid = rows - r0 < kRows ? rows - r0 : kRows;
    Vec<T> acc[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec<T>(0);
    const T* weight[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) weight[r] = h + (r0 + (r < valid ? r : valid - 1)) * row_step;
    const T* features = packed;
    for (int64_t k = 0; k < depth; ++k, features += kVecs * kLanes) {
      Vec<T> b[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) b[v] = Vec<T>::load(features + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> w(weight[r][k * k_step]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(w, b[v], acc[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r >= valid) break;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        T* p = out + (r0 + r) * d + v * kLanes;
        const int64_t left = columns - v * kLanes;
        if (left >= kLanes) {
          (Vec<T>::load(p) - acc[r][v]).store(p);
        } else {
          const int lanes = static_cast<int>(left);
          (Vec<T>::load_first(p, lanes) - acc[r][v]).store_first(p, lanes);
        }
      }
    }
  }
}

// out[r, :] -= sum over k of h(r, k) x[k, :] for `rows` rows and `depth` k, where h(r, k) is
// h[r * ld + k], or h[k * ld + r] when kTransposed.
template <class T, bool kTransposed>
void subtract_product(const T* h, int64_t ld, int64_t rows, int64_t depth, const T* x, int64_t d,
                      T* out) {
  constexpr int64_t kLanes = Tile<T>::kLanes;
  constexpr int kVecs = Tile<T>::kVecs;
  for (int64_t c = 0; c < d; c += kVecs * kLanes) {
    const int64_t columns = d - c < kVecs * kLanes ? d - c : kVecs * kLanes;
    const auto panel = columns <= kLanes       ? subtract_panel<T, kTransposed, 1>
                       : columns <= 2 * kLanes ? subtract_panel<T, kTransposed, 2>
                                               : subtract_panel<T, kTransposed, kVecs>;
    for (int64_t k = 0; k < depth; k += kProductDepth) {
      const int64_t part = depth - k < kProductDepth ? depth - k : kProductDepth;
      panel(h + k * (kTransposed ? ld : 1), ld, rows, part, x + k * d + c, d, columns, out + c);
    }
  }
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
