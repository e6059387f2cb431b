// SPDX-License-Identifier: Apache-2.0
// row_top_k: every thread of a block holds the best of its share of a row; the best of those is
// next, and its thread looks for another. 2 kernels.
#include <distance_row.cuh>

namespace flashmetric::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kSlabThreads) top_k_kernel(const TopKArgs args) {
  // Two rounds' worth: those that read the one wait for nobody who writes the other.
  __shared__ Candidate<T> found[2][kSlabWarps];
  const DistanceRow<T> row(args.rows);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t* index = args.index + (args.rows.begin + blockIdx.x) * args.k;
  // Seen from the far end the farthest are the nearest.
  const T sign = args.farthest ? T(-1) : T(1);
  // The best of this thread's share that comes after `last`.
  const auto next = [&](const Candidate<T>& last) {
    Candidate<T> best{T(0), -1};
    for (int64_t j = threadIdx.x; j < row.m(); j += kSlabThreads) {
      const Candidate<T> candidate{sign * row[j], static_cast<int32_t>(j)};
      const bool wanted = candidate.value == candidate.value;
      if (wanted && (last.index < 0 || last.beats(candidate)) && candidate.beats(best))
        best = candidate;
    }
    return best;
  };

  Candidate<T> own = next({T(0), -1});
  int64_t rank = 0;
  for (; rank < args.k; ++rank) {
    Candidate<T>* findings = found[rank % 2];
    Candidate<T> best = warp_best(own);
    if (lane == 0) findings[warp] = best;
    __syncthreads();
    best = findings[0];
    for (int w = 1; w < kSlabWarps; ++w)
      if (findings[w].beats(best)) best = findings[w];
    if (best.index < 0) break;  // in every thread
    if (threadIdx.x == 0) index[rank] = best.index;
    if (own.index == best.index) own = next(best);
  }
  for (int64_t k = rank + threadIdx.x; k < args.k; k += kSlabThreads) index[k] = -1;
}

}  // namespace

template <class T>
cudaError_t row_top_k(const TopKArgs& args, int64_t rows, cudaStream_t stream) {
  top_k_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t row_top_k<float>(const TopKArgs&, int64_t, cudaStream_t);
template cudaError_t row_top_k<double>(const TopKArgs&, int64_t, cudaStream_t);

}  // namespace flashmetric::cuda
