// SPDX-License-Identifier: Apache-2.0
// What the epilogues that reduce the pairs of each row share: which pairs of a warp's part of a
// tile are positives, negatives or near, and their distances.
#pragma once

#include <flashmetric/cuda_rows.h>
#include <exact.cuh>
#include <tile.cuh>

namespace flashmetric::cuda {

// Whether row i is in a pair of a kind, whatever the bounds. For batches that are not finite only.
__device__ inline bool has_pair(const PairProblem& problem, int64_t i, int kind) {
  const Labelling& labelling = problem.labelling;
  const int64_t* x = problem.query.labels + i * labelling.words;
  for (int64_t j = 0; j < problem.ref.n; ++j) {
    if (problem.self && i == j) continue;
    if (pair_kind(labelling, x, problem.ref.labels + j * labelling.words) == kind) return true;
  }
  return false;
}

// Pairs of one thread as bits: element e of block b is bit b * 4 + e.
struct PairMasks {
  uint32_t kind[2];  // positives, negatives
  uint32_t near;     // of either kind: to be measured by exact differences

  // Elements 0, 1 of the blocks are of one row, 2, 3 of another.
  __device__ static constexpr uint32_t of_row(int k) { return 0x33333333u << (2 * k); }
  // The pairs of a kind whose products settle them.
  __device__ uint32_t settled(int k) const { return kind[k] & ~near; }
  // For other warps: who is near, and who is a positive.
  __device__ uint32_t list() const { return near | kind[0] << 16; }
};

// A pair of a list, the same in all lanes.
struct ListedPair {
  int lane, element;  // who has it
  int kind;
};

template <class Shape>
class PairTile {
 public:
  using Sweep = TileSweep<Shape>;
  using Products = typename Sweep::Products;
  static constexpr int kColBlocks = Shape::kColBlocks;
  static constexpr int kElements = kColBlocks * 4;
  static_assert(Shape::kRowBlocks == 1, "a warp has one block of rows");
  static_assert(kElements <= 16, "a list holds the elements of a thread twice");

  __device__ PairTile(const PairProblem& problem, const Sweep& sweep, int row_tile)
      : problem_(problem),
        sweep_(sweep),
        row0_(row_tile * Shape::kRows),
        near_floor_(is_difference(problem.distance) ? 0.0f : -__builtin_huge_valf()) {}

  // Row k = 0, 1 of the thread, and element e of block b, within the tile.
  __device__ int local_row(int k) const {
    return sweep_.warp_row() + acc_row(sweep_.lane(), k * 2);
  }
  __device__ int column(int b, int e) const {
    return sweep_.warp_col() + b * 8 + acc_col(sweep_.lane(), e);
  }
  // Of the batch. Rows of padding share the numbers of the last row: they have no pairs.
  __device__ int64_t row(int k) const {
    const int64_t i = row0_ + local_row(k);
    return i < problem_.query.n ? i : problem_.query.n - 1;
  }
  __device__ int row0() const { return row0_; }
  __device__ int lane() const { return sweep_.lane(); }

  // Replaces the products by u. Returns whether any pair of the warp's part is a positive, near, or
  // a negative with u below the limit of its row.
  __device__ bool classify(Products& products, int col0, const float (&limit)[2],
                           PairMasks& masks) const {
    uint32_t same = 0, known = 0, near = 0, low = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const RowMeta own = sweep_.row_meta(local_row(k));
      const bool row_known = own.label != kIgnoredLabel;
#pragma unroll
      for (int b = 0; b < kColBlocks; ++b) {
        // Keeps later loads from being moved up here, where registers are short.
        asm volatile("" ::: "memory");
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t bit = 1u << (b * 4 + k * 2 + e);
          const RowMeta other = sweep_.col_meta(column(b, e));
          const float size = own.bias + other.bias;
          float& u = products.v[0][b][k * 2 + e];
          u = fmaf(u * own.scale, -2.0f * other.scale, size);
          near |= u < fmaf(size, kNearFraction, near_floor_) ? bit : 0;
          low |= u < limit[k] ? bit : 0;
          same |= own.label == other.label ? bit : 0;
          known |= row_known && other.label != kIgnoredLabel ? bit : 0;
        }
      }
    }
    if (problem_.self) known &= ~diagonal(col0);
    masks.kind[0] = same & known;
    masks.kind[1] = known & ~same;
    if (!problem_.labelling.simple()) by_rule(col0, known, masks);
    masks.near = near & (masks.kind[0] | masks.kind[1]);
    return __any_sync(kAllLanes, (masks.kind[0] | masks.near | (low & masks.kind[1])) != 0);
  }

  // Replaces u by the distance.
  template <class D>
  __device__ void measure(Products& products) const {
#pragma unroll
    for (int b = 0; b < kColBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& u = products.v[0][b][e];
        if (D::kUnitRows && is_flat(b, e)) u = 2.0f;
        u = D::value(u);
      }
  }

  // Whether the pair is with a zero row, which is at the same distance from every unit row.
  __device__ bool is_flat(int b, int e) const {
    return sweep_.row_meta(local_row(e / 2)).scale == 0.0f ||
           sweep_.col_meta(column(b, e)).scale == 0.0f;
  }

  // Calls f(pair) for each of the near pairs in the lanes' lists.
  template <class F>
  __device__ void for_each_near(uint32_t list, F&& f) const {
    uint32_t near = list & 0xffffu;
    while (const uint32_t lanes = __ballot_sync(kAllLanes, near != 0)) {
      ListedPair pair;
      pair.lane = __ffs(static_cast<int>(lanes)) - 1;
      const int first = __ffs(static_cast<int>(near)) - 1;
      const int kind = list >> (16 + first % 16) & 1 ? 0 : 1;
      pair.element = __shfl_sync(kAllLanes, first, pair.lane);
      pair.kind = __shfl_sync(kAllLanes, kind, pair.lane);
      if (sweep_.lane() == pair.lane) near &= near - 1;
      f(pair);
    }
  }

  // Number of its row, and of its reference in the list of the column warp with that first column
  // (none given: this warp).
  __device__ int64_t row_of(const ListedPair& pair) const {
    return row0_ + sweep_.warp_row() + acc_row(pair.lane, pair.element % 4);
  }
  __device__ int64_t ref_of(const ListedPair& pair, int col0) const {
    return ref_of(pair, sweep_.warp_col(), col0);
  }
  __device__ int64_t ref_of(const ListedPair& pair, int warp_col, int col0) const {
    return col0 + warp_col + pair.element / 4 * 8 + acc_col(pair.lane, pair.element % 4);
  }

 private:
  // Pairs of a row with itself.
  __device__ uint32_t diagonal(int col0) const {
    uint32_t mask = 0;
    if (col0 >= row0_ + Shape::kRows || row0_ >= col0 + Shape::kCols) return mask;
#pragma unroll
    for (int b = 0; b < kColBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        mask |= col0 + column(b, e) == row0_ + local_row(e / 2) ? 1u << (b * 4 + e) : 0;
    return mask;
  }

  // Kinds by other rules than the equality of one word.
  __device__ void by_rule(int col0, uint32_t known, PairMasks& masks) const {
    const int64_t words = problem_.labelling.words;
    masks.kind[0] = masks.kind[1] = 0;
#pragma unroll 1
    for (int t = 0; t < kElements; ++t) {
      if ((known >> t & 1) == 0) continue;
      const int64_t i = row0_ + local_row(t % 4 / 2), j = col0 + column(t / 4, t % 4);
      const int kind = pair_kind(problem_.labelling, problem_.query.labels + i * words,
                                 problem_.ref.labels + j * words);
      masks.kind[0] |= uint32_t{kind == kPositive} << t;
      masks.kind[1] |= uint32_t{kind == kNegative} << t;
    }
  }

  const PairProblem& problem_;
  const Sweep& sweep_;
  const int row0_;
  const float near_floor_;
};

}  // namespace flashmetric::cuda
