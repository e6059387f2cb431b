// SPDX-License-Identifier: Apache-2.0
// Tiles of 64 x 64 outputs by blocks of 256 threads, 4 x 4 to each: how plain products and direct
// distances load their operands and add up.
#pragma once

#include <exact.cuh>
#include <slab.cuh>

namespace flashmetric::cuda {

constexpr int kSide = kProductSide;
constexpr int kOwn = kProductTile / kSide;    // outputs of a thread along either side
constexpr int kPadded = kProductTile + kOwn;  // spreads the stores of a transposed load over banks
// Depth that floats sum in one chain: their error then does not grow with the depth.
constexpr int kChain = 256;
template <class T>
constexpr bool kChains = sizeof(T) == 4;
constexpr int kLoads = kProductTile * kProductDepth / kProductThreads;
static_assert(kChain % kProductDepth == 0, "chains end between steps");

// Rows of one operand as [depth][row].
template <class T>
using Tile = T[kProductDepth][kPadded];

// From [rows, k], whose neighbours are neighbours in depth.
template <class T>
__device__ __forceinline__ void load_rows(const T* from, int64_t rows, int64_t row, int64_t k,
                                          int64_t begin, Tile<T>& to) {
#pragma unroll
  for (int q = 0; q < kLoads; ++q) {
    const int at = static_cast<int>(threadIdx.x) + q * kProductThreads;
    const int depth = at % kProductDepth, i = at / kProductDepth;
    const bool inside = row + i < rows && begin + depth < k;
    to[depth][i] = inside ? from[(row + i) * k + begin + depth] : T(0);
  }
}

// From [k, columns].
template <class T>
__device__ __forceinline__ void load_columns(const T* from, int64_t columns, int64_t column,
                                             int64_t k, int64_t begin, Tile<T>& to) {
#pragma unroll
  for (int q = 0; q < kLoads; ++q) {
    const int at = static_cast<int>(threadIdx.x) + q * kProductThreads;
    const int depth = at / kProductTile, i = at % kProductTile;
    const bool inside = column + i < columns && begin + depth < k;
    to[depth][i] = inside ? from[(begin + depth) * columns + column + i] : T(0);
  }
}

template <class T>
__device__ __forceinline__ void close_chain(T (&sum)[kOwn][kOwn], T (&total)[kOwn][kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      total[i][j] += sum[i][j];
      sum[i][j] = T(0);
    }
}

// A thread's part of the tile whose first output is at (row, column).
template <class T>
__device__ __forceinline__ void store_tile(const ProductArgs& args, int64_t row, int64_t column,
                                           const T (&total)[kOwn][kOwn]) {
  const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t at_row = row + y * kOwn + i;
    if (at_row >= args.m) break;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t at = column + x * kOwn + j;
      if (at < args.n) static_cast<T*>(args.out)[at_row * args.n + at] = total[i][j];
    }
  }
}

}  // namespace flashmetric::cuda
