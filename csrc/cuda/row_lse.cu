// SPDX-License-Identifier: Apache-2.0
// Kernels and launcher of row_lse: with one plane and two.
#include <launch.cuh>
#include <row_lse.cuh>

namespace flashmetric::cuda {
namespace {

// Of one row and kind, over all columns.
struct LseTotal {
  RunningLse running;
  int32_t count;
};
static_assert(2 * sizeof(LseTotal) <= kRowTotalBytes, "the plan has room for it");

__device__ RunningLse quad_merge(RunningLse own) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const RunningLse other{__shfl_xor_sync(kAllLanes, own.top, mask),
                           __shfl_xor_sync(kAllLanes, own.sum, mask),
                           __shfl_xor_sync(kAllLanes, own.moment, mask)};
    own.merge(other);
  }
  return own;
}

// What the column warps found, merged in their order, in shared memory: totals[row * 2 + kind].
template <class Shape>
__device__ void merge_rows(const RowLse<Shape>& rows, int column_warp, LseTotal* totals) {
  for (int warp = 0; warp < Shape::kColWarps; ++warp) {
    __syncthreads();
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int kind = t / 2, k = t % 2;
      LseTotal own{quad_merge(rows.running[kind][k]), rows.count[kind][k]};
      own.count += __shfl_xor_sync(kAllLanes, own.count, 1);
      own.count += __shfl_xor_sync(kAllLanes, own.count, 2);
      if (warp != column_warp || rows.pairs.lane() % 4 != 0) continue;
      LseTotal& total = totals[rows.pairs.local_row(k) * 2 + kind];
      if (warp > 0) {
        own.running.merge(total.running);
        own.count += total.count;
      }
      total = own;
    }
  }
  __syncthreads();
}

__device__ void write_row(const RowLseArgs& args, int64_t i, int kind, const LseTotal& total,
                          bool poisoned) {
  const int64_t at = kind * args.problem.query.n + i;
  const bool wanted = args.form.term[kind] != Term::kNone;
  const RunningLse& running = total.running;
  float lse = -__builtin_huge_valf(), mean = 0.0f;
  if (poisoned && wanted && has_pair(args.problem, i, kind)) {
    lse = mean = not_a_number<float>();
  } else if (total.count > 0) {
    lse = running.top + logf(running.sum);
    mean = running.moment / running.sum;
  }
  args.lse[at] = lse;
  args.mean[at] = mean;
  args.counts[at] = total.count;
}

template <int kPlanes>
__global__ void __launch_bounds__(ShapesHere<kPlanes>::Sum::kThreads, 1)
    row_lse_kernel(const RowLseArgs args) {
  using Shape = typename ShapesHere<kPlanes>::Sum;
  extern __shared__ __align__(128) char smem[];
  const PairProblem& problem = args.problem;
  const int row_tile = static_cast<int>(blockIdx.x);
  TileSweep<Shape> sweep(smem, problem.x, problem.r, problem.chunks, 0, args.resident);
  RowLse<Shape> rows(args, sweep, row_tile);
  sweep.run(row_tile, 0, static_cast<int>(divide_up(problem.ref.n, Shape::kCols)), rows);

  // The stages are free now.
  LseTotal* totals = reinterpret_cast<LseTotal*>(smem);
  const bool poisoned = is_poisoned(problem, args.bad, args.bad_count);
  merge_rows(rows, sweep.warp_col() / Shape::kWarpCols, totals);
  const int row = static_cast<int>(threadIdx.x) / 2, kind = static_cast<int>(threadIdx.x) % 2;
  if (row < Shape::kRows && rows.pairs.row0() + row < problem.query.n)
    write_row(args, rows.pairs.row0() + row, kind, totals[row * 2 + kind], poisoned);
}

}  // namespace

cudaError_t row_lse(const RowLseArgs& args, const TilePlan& plan, int planes, cudaStream_t stream) {
  return launch_tiles(planes == 1 ? row_lse_kernel<1> : row_lse_kernel<2>, args, plan, stream);
}

}  // namespace flashmetric::cuda
