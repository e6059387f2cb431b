// SPDX-License-Identifier: Apache-2.0
// Arguments, launch numbers and launchers of the CUDA kernels for listed pairs.
#pragma once

#include <flashmetric/cuda_kernels.h>

namespace flashmetric::cuda {

// Pair t joins query row query_index[t] (null: t % n) and reference row ref_index[t]. -1 on either
// side: no pair. Any other number that names no row: every result that the pair is part of is NaN.
// An op that may not wait for the device cannot raise.
struct ListedPairs {
  const void* query;  // [n, d], contiguous
  const void* ref;    // [m, d], likewise; query in a self-batch
  int64_t n, m, d;    // n, m and count are below 2^31
  const int64_t* query_index;
  const int64_t* ref_index;
  int64_t count;
  Scalar scalar;
  Distance distance;
};

constexpr int kPairWarps = 8;
constexpr int kPairThreads = kPairWarps * kWarp;

struct PairDistanceArgs {
  ListedPairs pairs;
  void* out;  // [count], in the accumulate type
};
constexpr int64_t plan_pair_distance(int64_t pairs) { return divide_up(pairs, kPairWarps); }
cudaError_t pair_distance(const PairDistanceArgs& args, cudaStream_t stream);

// A list sorted by the row that each pair names on one side.
struct SortedPairs {
  const int32_t* rows;   // null: not sorted, the list is scanned
  const int64_t* pairs;  // pair of each entry
};

struct PairGradientArgs {
  ListedPairs pairs;
  bool self;
  bool ref_rows;  // whether there is a gradient of ref, a tensor of its own
  int32_t rows_per_block;
  SortedPairs by_query, by_ref;
  // In the accumulate type: distance of each pair, gradient of each, and two numbers, each in
  // memory of the device or null, that multiply all of the gradients.
  const void* value;
  const void* grad;
  const void* factor[2];
  void* grad_query;  // [n, d], in the type of the rows
  void* grad_ref;    // [m, d], likewise
};

// One warp keeps this many columns of a gradient in registers.
constexpr int kLaneColumns = 8;
constexpr int kPartColumns = kLaneColumns * kWarp;
static_assert(kPartColumns == kPairThreads, "one thread adds up one column of a block");

// A row with more entries than this is shared out among the warps of its block.
constexpr int64_t kLongRow = 64;

struct PairGradientPlan {
  bool sorted;
  int rows_per_block;
  int64_t grid_x;
  int64_t grid_y;
};

// Short lists are scanned anew for every row: one launch, where sorting takes some ten.
constexpr PairGradientPlan plan_pair_gradient(int64_t rows, int64_t pairs, int64_t d) {
  constexpr int64_t kScannedPairs = 4096;
  constexpr int64_t kScannedEntries = int64_t{1} << 24;
  const bool sorted = pairs > kScannedPairs || rows * pairs > kScannedEntries;
  const int rows_per_block = sorted ? kPairWarps : 1;
  return {sorted, rows_per_block, divide_up(rows, rows_per_block), divide_up(d, kPartColumns)};
}
cudaError_t pair_gradient(const PairGradientArgs& args, const PairGradientPlan& plan,
                          cudaStream_t stream);

}  // namespace flashmetric::cuda
