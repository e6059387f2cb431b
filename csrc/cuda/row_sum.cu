// SPDX-License-Identifier: Apache-2.0
// Kernels and launcher of row_sum: with and without gradient, each with one plane and two.
#include <launch.cuh>
#include <row_finish.cuh>

namespace flashmetric::cuda {
namespace {

__device__ void write_statistics(const RowSumArgs& args, int64_t i, const RowTotal& total,
                                 bool poisoned) {
  const int64_t n = args.problem.query.n;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    // Compare-and-skip rules would drop pairs with NaN.
    const bool spoiled = poisoned && has_pair(args.problem, i, kind);
    const float nan = not_a_number<float>();
    args.sums[kind * n + i] = spoiled ? nan : float(total.sum[kind]);
    args.counts[kind * n + i] = total.kept[kind];
    args.counts[(2 + kind) * n + i] = total.active[kind];
    args.slopes[kind * n + i] = spoiled ? nan : total.slope[kind];
    args.slopes[(2 + kind) * n + i] = spoiled ? nan : total.moment[kind];
  }
}

template <int kPlanes, SumPart kPart>
__global__ void __launch_bounds__(ShapesHere<kPlanes>::Sum::kThreads, 1)
    row_sum_kernel(const RowSumArgs args) {
  using Shape = typename ShapesHere<kPlanes>::Sum;
  extern __shared__ __align__(128) char smem[];
  sum_rows<Shape, kPart>(args, smem, [&](int64_t i, const RowTotal& total, bool poisoned) {
    if (blockIdx.y == 0) write_statistics(args, i, total, poisoned);
  });
}

}  // namespace

cudaError_t row_sum(const RowSumArgs& args, const TilePlan& plan, int planes, cudaStream_t stream) {
  constexpr SumPart kSums = SumPart::kSums, kBoth = SumPart::kSumsAndGrad;
  const bool grad = args.grad != nullptr;
  const auto kernel = planes == 1 ? (grad ? row_sum_kernel<1, kBoth> : row_sum_kernel<1, kSums>)
                                  : (grad ? row_sum_kernel<2, kBoth> : row_sum_kernel<2, kSums>);
  return launch_tiles(kernel, args, plan, stream);
}

}  // namespace flashmetric::cuda
