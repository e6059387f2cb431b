// SPDX-License-Identifier: Apache-2.0
// The search for hardest pairs: per row the largest key among positives and the smallest among
// negatives, key = bias(column) - 2 x.r; of a symmetric problem each product serves both its rows.
#pragma once

#include <finish.cuh>
#include <tile.cuh>

namespace flashmetric::cuda {

// The best candidate so far; smaller values win, and the first of equals does.
struct Best {
  float value;
  int32_t index;

  // Not by default member initializers: of a two-dimensional local array of this type nvcc 13.0
  // initialized the first row only and zeroed the others.
  __device__ __forceinline__ void clear() {
    value = __builtin_huge_valf();
    index = -1;
  }
  __device__ __forceinline__ void offer(bool eligible, float candidate, int32_t at) {
    const bool better = eligible && candidate < value;
    value = better ? candidate : value;
    index = better ? at : index;
  }
  // `index` counts from `base`.
  __device__ __forceinline__ uint64_t key(int base) const {
    return index < 0 ? kNoKey
                     : make_key(__float_as_uint(value), static_cast<uint32_t>(base + index));
  }
};

// Keys are merged as 64-bit minima: see make_key.
__device__ __forceinline__ uint64_t lane_min(uint64_t key, int mask) {
  const uint64_t other = __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(key), mask);
  return other < key ? other : key;
}

// The epilogue: offers each product of a tile to its row and, kSymmetric, to its column.
template <class Shape, bool kSymmetric>
class HardestRows {
 public:
  using Sweep = TileSweep<Shape>;
  static constexpr int kRowBlocks = Shape::kRowBlocks;
  static constexpr int kColBlocks = Shape::kColBlocks;
  static constexpr int kColumns = kColBlocks * 2;  // of one thread
  static constexpr int kGroup = 2;                 // as many of them at a time: registers

  __device__ HardestRows(const HardestArgs& args, const Sweep& sweep, int row_tile)
      : args_(args), sweep_(sweep), row_tile_(row_tile) {
#pragma unroll
    for (int a = 0; a < kRowBlocks; ++a)
#pragma unroll
      for (int k = 0; k < 4; ++k) best_[k / 2][a][k % 2].clear();
  }

  __device__ void operator()(const typename Sweep::Products& products, int col_tile) {
    // A tile on the diagonal holds both orders of its pairs, so its columns need no turn.
    // The launcher refuses more rows than an int32_t numbers.
    const int row0 = row_tile_ * Shape::kRows, col0 = col_tile * Shape::kCols;
    const bool diagonal =
        args_.problem.self && col0 < row0 + Shape::kRows && row0 < col0 + Shape::kCols;
    if (diagonal) {
      visit<true, false>(products, row0, col0);
    } else {
      visit<false, kSymmetric>(products, row0, col0);
    }
  }

  // The best key of the row of block `a`, half `h`, in all four lanes that share it.
  __device__ uint64_t row_key(int kind, int a, int h) const {
    return lane_min(lane_min(best_[kind][a][h].key(0), 1), 2);
  }
  __device__ int local_row(int a, int h) const {
    return sweep_.warp_row() + a * 16 + acc_row(sweep_.lane(), h * 2);
  }

 private:
  template <bool kDiagonal, bool kColumnsToo>
  __device__ void visit(const typename Sweep::Products& products, int row0, int col0) {
#pragma unroll
    for (int first = 0; first < kColumns; first += kGroup) {
      RowMeta other[kGroup];
#pragma unroll
      for (int c = 0; c < kGroup; ++c) other[c] = sweep_.col_meta(local_col(first + c));
      Best column[2][kGroup];
#pragma unroll
      for (int c = 0; c < 2 * kGroup; ++c) column[c / kGroup][c % kGroup].clear();
#pragma unroll
      for (int a = 0; a < kRowBlocks; ++a)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // Keeps the loads of later rows from being moved up here, where registers are short.
          asm volatile("" ::: "memory");
          const RowMeta own = sweep_.row_meta(local_row(a, h));
          const float factor = -2.0f * own.scale;
#pragma unroll
          for (int c = 0; c < kGroup; ++c) {
            const int j = col0 + local_col(first + c);
            const float product =
                products.v[a][(first + c) / 2][h * 2 + (first + c) % 2] * other[c].scale;
            const bool same = own.label == other[c].label;
            const bool itself = kDiagonal && row0 + local_row(a, h) == j;
            const float key = fmaf(product, factor, other[c].bias);
            best_[0][a][h].offer(same && !itself, -key, j);
            best_[1][a][h].offer(!same, key, j);
            if constexpr (kColumnsToo) {
              // Offsets known to the compiler cost no registers.
              const int offset = a * 16 + h * 8;
              const float column_key = fmaf(product, factor, own.bias);
              column[0][c].offer(same, -column_key, offset);
              column[1][c].offer(!same, column_key, offset);
            }
          }
        }
      if constexpr (kColumnsToo) flush_columns(column, row0 + local_row(0, 0), col0, first);
    }
  }

  __device__ int local_col(int c) const {
    return sweep_.warp_col() + c / 2 * 8 + acc_col(sweep_.lane(), c % 2);
  }

  // Eight lanes share each column. The first exchanges halve their number of columns, down to one;
  // the others find the best of the lanes that have the same one left.
  __device__ void flush_columns(const Best (&column)[2][kGroup], int first_row, int col0,
                                int first) const {
    const int64_t padded = round_up(args_.problem.query.n, kRowPadding);
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      uint64_t keys[kGroup];
#pragma unroll
      for (int c = 0; c < kGroup; ++c) keys[c] = column[kind][c].key(first_row);
      int mine = first;
#pragma unroll
      for (int half = kGroup / 2, mask = 16; half > 0; half /= 2, mask /= 2) {
        const bool upper = (sweep_.lane() & mask) != 0;
        mine += upper ? half : 0;
#pragma unroll
        for (int c = 0; c < half; ++c) {
          const uint64_t keep = upper ? keys[half + c] : keys[c];
          const uint64_t give = upper ? keys[c] : keys[half + c];
          const uint64_t got =
              __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(give), mask);
          keys[c] = got < keep ? got : keep;
        }
      }
      uint64_t key = keys[0];
#pragma unroll
      for (int mask = 16 / kGroup; mask >= 4; mask /= 2) key = lane_min(key, mask);
      constexpr int kOthers = 32 / kGroup - 4;  // lanes that hold the same key
      if ((sweep_.lane() & kOthers) == 0 && key != kNoKey)
        atomicMin(reinterpret_cast<unsigned long long*>(args_.keys) + kind * padded + col0 +
                      local_col(mine),
                  static_cast<unsigned long long>(key));
    }
  }

  const HardestArgs& args_;
  const Sweep& sweep_;
  const int row_tile_;
  Best best_[2][kRowBlocks][2];  // positives (by their negated key), negatives
};

// Shares of the tiles: rows and columns are merged into args.keys.
template <class Shape, bool kSymmetric>
__device__ void hardest_shared(const HardestArgs& args, char* smem) {
  TileSweep<Shape> sweep(smem, args.problem.x, args.problem.r, args.problem.chunks, 0,
                         args.resident);
  const int64_t padded = round_up(args.problem.query.n, kRowPadding);
  // plan_hardest refuses more tiles than an int numbers.
  const int end = static_cast<int>(share(args.order.count(), blockIdx.x + 1, gridDim.x));
  for (int t = static_cast<int>(share(args.order.count(), blockIdx.x, gridDim.x)); t < end;) {
    const Segment segment = args.order.segment(t, end);
    const int row_tile = static_cast<int>(segment.row_tile);
    HardestRows<Shape, kSymmetric> rows(args, sweep, row_tile);
    sweep.run(row_tile, static_cast<int>(segment.col_begin), static_cast<int>(segment.col_end),
              rows);
#pragma unroll
    for (int kind = 0; kind < 2; ++kind)
#pragma unroll
      for (int a = 0; a < Shape::kRowBlocks; ++a)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint64_t key = rows.row_key(kind, a, h);
          if (sweep.lane() % 4 == 0 && key != kNoKey)
            atomicMin(reinterpret_cast<unsigned long long*>(args.keys) + kind * padded +
                          segment.row_tile * Shape::kRows + rows.local_row(a, h),
                      static_cast<unsigned long long>(key));
        }
    t += static_cast<int>(segment.col_end - segment.col_begin);
  }
}

// One tile of rows against all columns, and on to the end.
template <class Shape>
__device__ void hardest_owner(const HardestArgs& args, char* smem) {
  constexpr int kWarps = Shape::kThreads / kWarp;
  const int64_t row0 = int64_t{blockIdx.x} * Shape::kRows;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  TileSweep<Shape> sweep(smem, args.problem.x, args.problem.r, args.problem.chunks, 0,
                         args.resident);
  const int row_tile = static_cast<int>(blockIdx.x);
  HardestRows<Shape, false> rows(args, sweep, row_tile);
  sweep.run(row_tile, 0, static_cast<int>(args.order.col_tiles), rows);

  // The stages are free now.
  uint64_t* keys = reinterpret_cast<uint64_t*>(smem);  // [column warps][2][rows]
#pragma unroll
  for (int kind = 0; kind < 2; ++kind)
#pragma unroll
    for (int a = 0; a < Shape::kRowBlocks; ++a)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint64_t key = rows.row_key(kind, a, h);
        const int column_warp = sweep.warp_col() / Shape::kWarpCols;
        if (sweep.lane() % 4 == 0)
          keys[(column_warp * 2 + kind) * Shape::kRows + rows.local_row(a, h)] = key;
      }
  const bool poisoned = is_poisoned(args.problem, args.bad, args.bad_count);  // a barrier, too
  const auto merged = [&](int kind, int r) {
    uint64_t key = kNoKey;
#pragma unroll
    for (int w = 0; w < Shape::kColWarps; ++w) {
      const uint64_t other = keys[(w * 2 + kind) * Shape::kRows + r];
      key = other < key ? other : key;
    }
    return key;
  };
  TripletSum sum;
  for (int r = warp; r < Shape::kRows && row0 + r < args.problem.query.n; r += kWarps)
    finish_row(args, row0 + r, merged(0, r), merged(1, r), poisoned, sweep.lane(), sum);
  if (args.triplet.loss == nullptr) return;
  __syncthreads();
  reduce_triplets<Shape::kThreads>(args.triplet, poisoned, sum,
                                   reinterpret_cast<TripletSum*>(smem));
}

}  // namespace flashmetric::cuda
