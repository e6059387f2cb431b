// SPDX-License-Identifier: Apache-2.0
// Arguments, launch numbers and launchers of the slab engine's kernels. T is the accumulate type.
#pragma once

#include <flashmetric/cuda_kernels.h>

namespace flashmetric::cuda {

constexpr int kSlabWarps = 8;
constexpr int kSlabThreads = kSlabWarps * kWarp;

// Elements of a slab of the N x M matrix: what stays in the second-level cache of a large chip.
constexpr int64_t kSlabElements = int64_t{1} << 22;
constexpr int64_t kMaxSlabRows = 65536;  // with many columns or few, a grid is high enough

constexpr int64_t plan_slab_rows(int64_t n, int64_t m, int64_t d) {
  const int64_t width = m > d ? m : d;
  const int64_t fit = kSlabElements / (width < 1 ? 1 : width);
  const int64_t rows = fit > kMaxSlabRows ? kMaxSlabRows
                       : fit > 64         ? fit / 64 * 64
                       : fit < 1          ? 1
                                          : fit;
  return rows < n ? rows : n;
}

// Widens rows to the accumulate type and finds their squared norms. One warp a row.
struct SlabRowsArgs {
  const void* raw;  // [n, d]
  int64_t n, d;
  void* rows;     // [n, d]; null: raw has the accumulate type already
  void* norms;    // [n]
  uint32_t* bad;  // [grid]: whether any of a block's rows is not finite
};
cudaError_t slab_rows(const SlabRowsArgs& args, Scalar scalar, int grid, cudaStream_t stream);

// out = a b, or a b^T. All contiguous. Sums in a fixed order.
struct ProductArgs {
  const void* a;  // [m, k]
  const void* b;  // [k, n]; transposed: [n, k]
  void* out;      // [m, n]
  int64_t m, n, k;
};
constexpr int kProductTile = 64, kProductDepth = 16;
constexpr int kProductSide = 16;  // threads along each side of a tile
constexpr int kProductThreads = kProductSide * kProductSide;

struct ProductPlan {
  int64_t grid_x, grid_y;
};
constexpr ProductPlan plan_product(int64_t m, int64_t n) {
  return {divide_up(n, kProductTile), divide_up(m, kProductTile)};
}
template <class T>
cudaError_t slab_product(const ProductArgs& args, bool transposed, cudaStream_t stream);

struct SlabSide {
  const void* rows;   // [n, d] of T
  const void* norms;  // [n] of T
  const int64_t* labels;
  int64_t n;
};

struct SlabProblem {
  SlabSide x, r;  // r is x in a self-batch
  int64_t d;
  Distance distance;
  bool self;
  int64_t begin;        // first row of x in this slab
  const uint32_t* bad;  // of the rows of both sides
  int32_t bad_count;
};

// One block a row.
struct SlabHardestArgs {
  SlabProblem problem;
  const void* products;  // [rows of the slab, m] of T; null: all pairs by exact differences
  int64_t* index;        // [2, n]
  void* distance;        // [2, n] of T
};
template <class T>
cudaError_t slab_hardest(const SlabHardestArgs& args, int64_t rows, cudaStream_t stream);

// The reduced loss of triplets and its derivative. One block.
template <class T>
struct TripletFinishArgs {
  const int64_t* index;  // [2, n]
  const T* distance;     // [2, n]
  int64_t n;
  TripletRule<T> rule;
  T* loss;   // 0-d
  T* slope;  // [2, n]
  T* scale;  // 0-d
};
constexpr int kTripletThreads = 1024;
template <class T>
cudaError_t triplet_finish(const TripletFinishArgs<T>& args, cudaStream_t stream);

// Marks of the near pairs of a row, a bit each.
constexpr int64_t near_words(int64_t m) { return divide_up(m, kWarp); }

// A block writes a row of a gradient, or the part of it that its threads have a column each for.
constexpr int kSlabColumns = kSlabThreads / kWarp;  // of a lane
constexpr int64_t plan_gradient_parts(int64_t d) { return d < 1 ? 1 : divide_up(d, kSlabThreads); }

}  // namespace flashmetric::cuda
