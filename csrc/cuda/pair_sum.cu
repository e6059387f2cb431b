// SPDX-License-Identifier: Apache-2.0
// Kernels and launcher of pair_sum: with and without gradient, each with one plane and two.
#include <launch.cuh>
#include <pair_sum.cuh>

#include <type_traits>

namespace flashmetric::cuda {
namespace {

// Of one row, over all columns.
struct RowTotal {
  double sum[2];
  int64_t active[2];
  int64_t positives;
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
__device__ void merge_rows(const Rows& rows, int column_warp, int lane, RowTotal* totals) {
  for (int warp = 0; warp < Shape::kColWarps; ++warp) {
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      RowTotal own;
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        own.sum[kind] = quad_sum(rows.sums.sum[kind][h]);
        own.active[kind] = quad_sum(rows.sums.active[kind][h]);
        own.weight[kind] = quad_sum(rows.sums.weight[kind][h]);
      }
      own.positives = quad_sum(rows.sums.positives[h]);
      if (warp != column_warp || lane % 4 != 0) continue;
      RowTotal& total = totals[rows.local_row(h)];
      if (warp > 0) {
#pragma unroll
        for (int kind = 0; kind < 2; ++kind) {
          own.sum[kind] += total.sum[kind];
          own.active[kind] += total.active[kind];
          own.weight[kind] += total.weight[kind];
        }
        own.positives += total.positives;
      }
      total = own;
    }
  }
  __syncthreads();
}

__device__ void write_sums(const PairSumArgs& args, int64_t i, const RowTotal& total,
                           bool poisoned) {
  const int64_t n = args.problem.query.n;
  const int64_t others = args.problem.ref.n - (args.problem.self ? 1 : 0);
  const int64_t count[2] = {total.positives, others - total.positives};
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    // Compare-and-skip rules would drop pairs with NaN.
    const bool spoiled = poisoned && count[kind] > 0;
    args.sums[kind * n + i] = spoiled ? not_a_number<float>() : float(total.sum[kind]);
    args.counts[kind * n + i] = count[kind];
    args.counts[(2 + kind) * n + i] = total.active[kind];
  }
}

// Gathers the warps' parts of the gradient in shared memory, [kRows][kStride], and writes it.
template <class Shape, class Rows>
__device__ void write_gradient(const PairSumArgs& args, const Rows& rows, int row0,
                               FeaturePart part, const RowTotal* totals, bool poisoned,
                               float* tile) {
  const PairProblem& problem = args.problem;
  constexpr int kStride = Shape::kKeep * kChunk + 4;  // spreads rows over the banks
  const int begin = part.begin * kChunk, width = part.count * kChunk;
  const int64_t n = problem.query.n, d = problem.d;
  const bool difference = problem.distance != Distance::kDot, separate = args.grad != nullptr;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    __syncthreads();
    rows.back().store(kind, tile, kStride, kind == 1 && !separate);
    __syncthreads();
    if (kind == 0 && !separate) continue;
    for (int t = static_cast<int>(threadIdx.x); t < Shape::kRows * width; t += Shape::kThreads) {
      const int local = t / width, f = t % width;
      if (row0 + local >= n || begin + f >= d) continue;
      const int64_t at = int64_t{row0 + local} * d + begin + f;
      const RowTotal& total = totals[local];
      const float weight = separate ? total.weight[kind] : total.weight[0] + total.weight[1];
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

template <int kPlanes, bool kGrad>
__global__ void __launch_bounds__(ShapesHere<kPlanes>::Sum::kThreads, 1)
    pair_sum_kernel(const PairSumArgs args) {
  using Shape = typename ShapesHere<kPlanes>::Sum;
  extern __shared__ __align__(128) char smem[];
  const PairProblem& problem = args.problem;
  const FeaturePart part =
      FeaturePart::of(static_cast<int>(blockIdx.y), Shape::kKeep, problem.chunks);
  const int row_tile = static_cast<int>(blockIdx.x);
  TileSweep<Shape> sweep(smem, problem.x, problem.r, problem.chunks, part.rotation(problem.chunks),
                         args.resident);
  PairSumRows<Shape, kGrad> rows(args, sweep, row_tile, part,
                                 smem + Shape::smem_bytes(args.resident, problem.chunks));
  sweep.run(row_tile, 0, static_cast<int>(divide_up(problem.ref.n, Shape::kCols)), rows);

  // The stages are free now.
  RowTotal* totals = reinterpret_cast<RowTotal*>(smem);
  const int column_warp = sweep.warp_col() / Shape::kWarpCols;
  const bool poisoned = is_poisoned(problem, args.bad, args.bad_count);
  merge_rows<Shape>(rows, column_warp, sweep.lane(), totals);
  const int row0 = row_tile * Shape::kRows;
  if (args.sums != nullptr && blockIdx.y == 0) {
    const int r = static_cast<int>(threadIdx.x);
    if (r < Shape::kRows && row0 + r < problem.query.n)
      write_sums(args, row0 + r, totals[r], poisoned);
  }
  if constexpr (kGrad)
    write_gradient<Shape>(args, rows, row0, part, totals, poisoned,
                          reinterpret_cast<float*>(totals + Shape::kRows));
}

}  // namespace

cudaError_t pair_sum(const PairSumArgs& args, const TilePlan& plan, int planes,
                     cudaStream_t stream) {
  const bool grad = args.grad != nullptr || args.grad_sum != nullptr;
  const auto kernel = planes == 1 ? (grad ? pair_sum_kernel<1, true> : pair_sum_kernel<1, false>)
                                  : (grad ? pair_sum_kernel<2, true> : pair_sum_kernel<2, false>);
  return launch_tiles(kernel, args, plan, stream);
}

}  // namespace flashmetric::cuda
