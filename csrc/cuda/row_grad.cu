// SPDX-License-Identifier: Apache-2.0
// Kernels and launcher of the gradients of weighted row sums and of log-sum-exps: with one plane
// and two.
#include <launch.cuh>
#include <row_finish.cuh>

namespace flashmetric::cuda {
namespace {

template <int kPlanes>
__global__ void __launch_bounds__(ShapesHere<kPlanes>::Sum::kThreads, 1)
    row_grad_kernel(const RowSumArgs args) {
  using Shape = typename ShapesHere<kPlanes>::Sum;
  extern __shared__ __align__(128) char smem[];
  sum_rows<Shape, SumPart::kGrad>(args, smem, [](int64_t, const RowTotal&, bool) {});
}

}  // namespace

cudaError_t row_grad(const RowSumArgs& args, const TilePlan& plan, int planes,
                     cudaStream_t stream) {
  return launch_tiles(planes == 1 ? row_grad_kernel<1> : row_grad_kernel<2>, args, plan, stream);
}

}  // namespace flashmetric::cuda
