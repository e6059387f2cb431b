// SPDX-License-Identifier: Apache-2.0
// A whole block of row_sum or row_grad: the sweep, and the end, where warps add up what they found
// and write their parts of the gradient.
#pragma once

#include <row_sum.cuh>

namespace flashmetric::cuda {

// Of one row, over all columns.
struct RowTotal {
  double sum[2];
  float slope[2], moment[2];
  int32_t kept[2], active[2];
  float weight[2];
};
static_assert(sizeof(RowTotal) == kRowTotalBytes, "the plan has room for it");

template <class T>
__device__ T quad_sum(T value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// What the column warps found, added in their order, in shared memory: totals[row].
template <class Shape, class Rows>
__device__ void merge_rows(const Rows& rows, int column_warp, RowTotal* totals) {
  for (int warp = 0; warp < Shape::kColWarps; ++warp) {
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      RowTotal own;
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        own.sum[kind] = quad_sum(rows.sums.sum[kind][h]);
        own.slope[kind] = quad_sum(rows.sums.slope[kind][h]);
        own.moment[kind] = quad_sum(rows.sums.moment[kind][h]);
        own.kept[kind] = quad_sum(rows.sums.kept[kind][h]);
        own.active[kind] = quad_sum(rows.sums.active[kind][h]);
        own.weight[kind] = quad_sum(rows.weight[kind][h]);
      }
      if (warp != column_warp || rows.pairs.lane() % 4 != 0) continue;
      RowTotal& total = totals[rows.pairs.local_row(h)];
      if (warp > 0) {
#pragma unroll
        for (int kind = 0; kind < 2; ++kind) {
          own.sum[kind] += total.sum[kind];
          own.slope[kind] += total.slope[kind];
          own.moment[kind] += total.moment[kind];
          own.kept[kind] += total.kept[kind];
          own.active[kind] += total.active[kind];
          own.weight[kind] += total.weight[kind];
        }
      }
      total = own;
    }
  }
  __syncthreads();
}

// Gathers the warps' parts of the gradient in shared memory, [kRows][kStride], and writes it.
template <class Shape, class Rows>
__device__ void write_gradient(const RowSumArgs& args, const Rows& rows, FeaturePart part,
                               const RowTotal* totals, bool poisoned, float* tile) {
  const PairProblem& problem = args.problem;
  constexpr int kStride = Shape::kKeep * kChunk + 4;  // spreads rows over the banks
  const int begin = part.begin * kChunk, width = part.count * kChunk, row0 = rows.pairs.row0();
  const int64_t n = problem.query.n, d = problem.d;
  const bool difference = is_difference(problem.distance), separate = args.grad != nullptr;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    // The sum of both is all with the negatives.
    if (kind == 0 && !separate) continue;
    __syncthreads();
    rows.back().store(kind, tile, kStride);
    __syncthreads();
    for (int t = static_cast<int>(threadIdx.x); t < Shape::kRows * width; t += Shape::kThreads) {
      const int local = t / width, f = t % width;
      if (row0 + local >= n || begin + f >= d) continue;
      const int64_t at = int64_t{row0 + local} * d + begin + f;
      const float weight = totals[local].weight[kind];
      with_scalar(problem.scalar, [&](auto type) {
        using S = decltype(type);
        const float x = float(static_cast<const S*>(problem.query.data)[at]);
        // No weight, no product: without any pair x may be NaN.
        const float own = difference && weight != 0.0f ? weight * x : 0.0f;
        float grad = 2.0f * (own - tile[local * kStride + f]);
        if (poisoned) grad = not_a_number<float>();
        if (separate) {
          args.grad[kind * n * d + at] = grad;
        } else {
          static_cast<S*>(args.grad_sum)[at] = static_cast<S>(grad);
        }
      });
    }
  }
}

// All of a block; calls write(row, total, whether the batch is poisoned) for each of its rows.
template <class Shape, SumPart kPart, class Write>
__device__ void sum_rows(const RowSumArgs& args, char* smem, Write&& write) {
  const PairProblem& problem = args.problem;
  const FeaturePart part =
      FeaturePart::of(static_cast<int>(blockIdx.y), Shape::kKeep, problem.chunks);
  const int row_tile = static_cast<int>(blockIdx.x);
  TileSweep<Shape> sweep(smem, problem.x, problem.r, problem.chunks, part.rotation(problem.chunks),
                         args.resident);
  RowSums<Shape, kPart> rows(args, sweep, row_tile, part,
                             smem + Shape::smem_bytes(args.resident, problem.chunks));
  sweep.run(row_tile, 0, static_cast<int>(divide_up(problem.ref.n, Shape::kCols)), rows);

  // The stages are free now.
  RowTotal* totals = reinterpret_cast<RowTotal*>(smem);
  const bool poisoned = is_poisoned(problem, args.bad, args.bad_count);
  merge_rows<Shape>(rows, sweep.warp_col() / Shape::kWarpCols, totals);
  const int r = static_cast<int>(threadIdx.x);
  if (r < Shape::kRows && rows.pairs.row0() + r < problem.query.n)
    write(rows.pairs.row0() + r, totals[r], poisoned);
  if constexpr (kPart != SumPart::kSums)
    write_gradient<Shape>(args, rows, part, totals, poisoned,
                          reinterpret_cast<float*>(totals + Shape::kRows));
}

}  // namespace flashmetric::cuda
