// SPDX-License-Identifier: Apache-2.0
// nearest_beyond: a block looks, for every threshold of a row, for the best of the distances
// beyond. 2 kernels.
#include <distance_row.cuh>

namespace flashmetric::cuda {
namespace {

// Thresholds that a thread looks for at a time.
constexpr int kTogether = 4;

template <class T>
__global__ void __launch_bounds__(kSlabThreads) nearest_kernel(const NearestArgs args) {
  __shared__ Candidate<T> found[kSlabWarps][kWarp];
  // All distances of such a batch are equal, and no threshold is a restriction.
  const bool poisoned = any_bad(args.rows.bad, args.rows.bad_count);
  const DistanceRow<T> row(args.rows);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = (args.rows.begin + blockIdx.x) * args.count;
  const T* thresholds = static_cast<const T*>(args.thresholds) + first;
  // Seen from the far end the farthest are the nearest.
  const T sign = args.farthest ? T(-1) : T(1);
  for (int64_t begin = 0; begin < args.count; begin += kWarp) {
    const int together = static_cast<int>(args.count - begin < kWarp ? args.count - begin : kWarp);
    for (int group = 0; group < together; group += kTogether) {
      T limits[kTogether];
      Candidate<T> best[kTogether];
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        // Nothing is beyond NaN.
        limits[q] = group + q < together ? sign * thresholds[begin + group + q] : not_a_number<T>();
        if (poisoned) limits[q] = static_cast<T>(-1);
        best[q] = {T(0), -1};
      }
      for (int64_t j = threadIdx.x; j < row.m(); j += kSlabThreads) {
        const Candidate<T> candidate{sign * row[j], static_cast<int32_t>(j)};
#pragma unroll
        for (int q = 0; q < kTogether; ++q)
          if (candidate.value > limits[q] && candidate.beats(best[q])) best[q] = candidate;
      }
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        const Candidate<T> of_warp = warp_best(best[q]);
        if (lane == 0) found[warp][group + q] = of_warp;
      }
    }
    __syncthreads();
    const int k = static_cast<int>(threadIdx.x);
    if (k < together) {
      Candidate<T> best = found[0][k];
      for (int w = 1; w < kSlabWarps; ++w)
        if (found[w][k].beats(best)) best = found[w][k];
      args.index[first + begin + k] = best.index;
    }
    __syncthreads();  // before the next findings
  }
}

}  // namespace

template <class T>
cudaError_t nearest_beyond(const NearestArgs& args, int64_t rows, cudaStream_t stream) {
  nearest_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t nearest_beyond<float>(const NearestArgs&, int64_t, cudaStream_t);
template cudaError_t nearest_beyond<double>(const NearestArgs&, int64_t, cudaStream_t);

}  // namespace flashmetric::cuda
