// SPDX-License-Identifier: Apache-2.0
// Arguments and launchers of the kernels that look at the distances of one kind of pair, row by row
// of a slab: sums below thresholds, selection, and gradients. T is the accumulate type. One block a
// row, but for the direct distances.
#pragma once

#include <slab.cuh>

namespace flashmetric::cuda {

// In place of inner products, for the distances that none yields. All contiguous.
struct DirectArgs {
  ProductArgs product;  // out = u of the rows of a [m, k] and b [n, k]
  Distance distance;
};
template <class T>
cudaError_t slab_direct(const DirectArgs& args, cudaStream_t stream);

// out [m, n] = sum over j of a_ij times the gradient of u(x_i, b_j) in x_i; a is [m, k], b [k, n].
struct DirectPullArgs {
  ProductArgs product;
  const void* x;  // [m, n]
  Distance distance;
};
template <class T>
cudaError_t slab_direct_pull(const DirectPullArgs& args, cudaStream_t stream);

// In place of a kind: pairs of either.
constexpr int32_t kBothKinds = 3;

// Distances from products, or from u where they are direct.
struct SlabDistanceArgs {
  SlabProblem problem;
  Labelling labelling;
  int32_t kind;
  // [rows, m] of T, in place. NaN marks what is no pair of the kind; in a batch that is not finite
  // all others are 0.
  void* slab;
  uint32_t*
      near;  // [rows, near_words(m)]: bits of the pairs measured by exact differences; or null
};
template <class T>
cudaError_t slab_distance(const SlabDistanceArgs& args, int64_t rows, cudaStream_t stream);

// Gradients of a slab's rows from the weights h of the pairs, sum over j of h_ij (x_i - r_j) for
// differences, see slab_gradient.
struct SlabGradientArgs {
  SlabProblem problem;
  const void* near_weight;  // [rows, m] of T: h of near pairs
  const uint32_t* near;     // null: there are none
  const double* total;      // [rows]: sum over j of the other h
  const void* pulled;       // [rows, d] of T: sum over j of those h times r_j, or times du/dx
  void* grad;               // [n, d]
};
cudaError_t slab_gradient(const SlabGradientArgs& args, Scalar grad_scalar, int64_t rows,
                          cudaStream_t stream);

// What the consumers of distances read.
struct DistanceRows {
  const void* slab;  // [rows, m] of T, from slab_distance
  int64_t m;
  int64_t begin;  // first row of the batch in this slab
  const uint32_t* bad;
  int32_t bad_count;
};

// With more thresholds than this, sums of a hinge are found by sorting the distances.
constexpr int64_t kSweptThresholds = 64;

struct ThresholdSumArgs {
  DistanceRows rows;
  Term term;
  const double* thresholds;  // [n or 1, count]
  int64_t row_stride;        // 0: one row of them for all
  int64_t count;
  double* sums;     // [n, count]
  int64_t* counts;  // likewise
  double* slopes;   // likewise
};
template <class T>
cudaError_t threshold_sum(const ThresholdSumArgs& args, int64_t rows, cudaStream_t stream);

// Thresholds and weights of all rows, one row after the other for each of the `count`, so that the
// rows of neighbouring pairs are neighbours.
struct ThresholdTable {
  const void* limit;   // [count, limit_rows] of T
  const void* weight;  // [count, n] of T; of a hinge: sums over this and all later thresholds
  int64_t limit_rows;  // n or 1
  int64_t n, count;
};
struct ThresholdTableArgs {
  ThresholdTable table;
  bool hinge;
  const double* thresholds;  // [limit_rows, count]
  const double* grad;        // [n, count]
};
// One warp a row.
template <class T>
cudaError_t threshold_table(const ThresholdTableArgs& args, int grid, cudaStream_t stream);

// Weights of the gradient from distances: h = factor * slope * (weight by the thresholds of row i
// where `own`, plus that by those of row j where `other`).
struct ThresholdWeighArgs {
  SlabProblem problem;
  Term term;
  ThresholdTable table;
  bool own, other;
  void* slab;            // [rows, m] of T: distances in, h of near pairs out
  const uint32_t* near;  // or null
  void* weight;          // [rows, m] of T: h of the other pairs
  double* total;         // [rows]: their sum
};
template <class T>
cudaError_t threshold_weigh(const ThresholdWeighArgs& args, int64_t rows, cudaStream_t stream);

struct NearestArgs {
  DistanceRows rows;
  bool farthest;
  const void* thresholds;  // [n, count] of T
  int64_t count;
  int64_t* index;  // [n, count]
};
template <class T>
cudaError_t nearest_beyond(const NearestArgs& args, int64_t rows, cudaStream_t stream);

struct TopKArgs {
  DistanceRows rows;
  bool farthest;
  int64_t k;
  int64_t* index;  // [n, k]
};
template <class T>
cudaError_t row_top_k(const TopKArgs& args, int64_t rows, cudaStream_t stream);

}  // namespace flashmetric::cuda
