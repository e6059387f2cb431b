// SPDX-License-Identifier: Apache-2.0
// Kernels and launchers of hardest: owner, rectangular and symmetric, each with one plane and two,
// and the finish.
#include <hardest.cuh>
#include <launch.cuh>

namespace flashmetric::cuda {
namespace {

enum class Part { kOwner, kRectangular, kSymmetric };

template <int kPlanes, Part kPart>
__global__ void __launch_bounds__(ShapesHere<kPlanes>::Wide::kThreads, 2)
    hardest_kernel(const HardestArgs args) {
  extern __shared__ __align__(128) char smem[];
  if constexpr (kPart == Part::kOwner) {
    hardest_owner<typename ShapesHere<kPlanes>::Narrow>(args, smem);
  } else {
    hardest_shared<typename ShapesHere<kPlanes>::Wide, kPart == Part::kSymmetric>(args, smem);
  }
}

// As many blocks per multiprocessor as leave registers for all of it: left to choose, ptxas spills.
__global__ void __launch_bounds__(kRowWarps* kWarp, 5)
    hardest_finish_kernel(const HardestArgs args) {
  __shared__ TripletSum scratch[kRowWarps * kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t n = args.problem.query.n, padded = round_up(n, kRowPadding);
  const int64_t warps = int64_t{gridDim.x} * kRowWarps;
  const bool poisoned = is_poisoned(args.problem, args.bad, args.bad_count);
  TripletSum sum;
  for (int64_t i = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; i < n; i += warps)
    finish_row(args, i, args.keys[i], args.keys[padded + i], poisoned, lane, sum);
  if (args.triplet.loss != nullptr)
    reduce_triplets<kRowWarps * kWarp>(args.triplet, poisoned, sum, scratch);
}

template <int kPlanes>
void (*kernel_for(const HardestPlan& plan))(const HardestArgs) {
  if (plan.owner) return hardest_kernel<kPlanes, Part::kOwner>;
  return plan.symmetric ? hardest_kernel<kPlanes, Part::kSymmetric>
                        : hardest_kernel<kPlanes, Part::kRectangular>;
}

}  // namespace

cudaError_t hardest(const HardestArgs& args, const HardestPlan& plan, int planes,
                    cudaStream_t stream) {
  const auto kernel = planes == 1 ? kernel_for<1>(plan) : kernel_for<2>(plan);
  return launch_tiles(kernel, args, plan.tile, stream);
}

cudaError_t hardest_finish(const HardestArgs& args, int grid, cudaStream_t stream) {
  hardest_finish_kernel<<<static_cast<unsigned>(grid), kRowWarps * kWarp, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace flashmetric::cuda
