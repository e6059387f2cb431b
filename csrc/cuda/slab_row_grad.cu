// SPDX-License-Identifier: Apache-2.0
// The weights of the gradients of row_sum and row_lse on the slab engine. Both rows of a pair can
// have a share in the objective, each with numbers of its own. 2 kernels.
#include <slab_pairs.cuh>

namespace flashmetric::cuda {
namespace {

// h of a pair at distance d; 0 of pairs that are not wanted.
template <class T>
__device__ T weight_of(const SlabRowWeighArgs<T>& args, const LabelledRow<T>& row, int64_t j, T d) {
  const SlabRowPairs<T>& pairs = args.pairs;
  // A zero row is at a constant distance from every row.
  if (!(d == d) || row.apart(j)) return T(0);
  const int kind = row.kind(j);
  if (kind == kNeither || !args.wanted[kind]) return T(0);
  T w = 0;
  if (pairs.own.on) w += pair_weight(pairs.form, args.logits, pairs.own, kind, row.number(), d);
  if (pairs.other.on) w += pair_weight(pairs.form, args.logits, pairs.other, kind, j, d);
  const Distance distance = pairs.problem.distance;
  return w == T(0) ? T(0) : w * (is_direct(distance) ? T(1) : T(2)) * slope_at(distance, d);
}

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    slab_row_weigh_kernel(const SlabRowWeighArgs<T> args) {
  __shared__ double totals[kSlabWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const LabelledRow<T> row(args.pairs.problem, args.pairs.labelling, blockIdx.x);
  const int64_t m = row.m(), words = blockIdx.x * near_words(m);
  T* slab = args.slab + blockIdx.x * m;
  T* weights = args.weight + blockIdx.x * m;
  double total = 0;
  for (int64_t begin = warp * kWarp; begin < m; begin += kSlabThreads) {
    const int64_t j = begin + lane;
    const T h = j < m ? weight_of(args, row, j, slab[j]) : T(0);
    bool is_near = false;
    if (args.near != nullptr) {
      const uint32_t marks = args.near[words + begin / kWarp];
      is_near = (marks >> lane & 1) != 0 && h != T(0);
      const uint32_t wanted = __ballot_sync(kAllLanes, is_near);
      if (lane == 0) args.near_wanted[words + begin / kWarp] = wanted;
    }
    if (j >= m) continue;
    // Near pairs of the other kind keep their distances.
    if (is_near) slab[j] = h;
    weights[j] = is_near ? T(0) : h;
    if (!is_near) total += static_cast<double>(h);
  }
  total = warp_sum(total);
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (int w = 0; w < kSlabWarps; ++w) total += totals[w];
  args.total[blockIdx.x] = total;
}

}  // namespace

template <class T>
cudaError_t slab_row_weigh(const SlabRowWeighArgs<T>& args, int64_t rows, cudaStream_t stream) {
  slab_row_weigh_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t slab_row_weigh(const SlabRowWeighArgs<float>&, int64_t, cudaStream_t);
template cudaError_t slab_row_weigh(const SlabRowWeighArgs<double>&, int64_t, cudaStream_t);

}  // namespace flashmetric::cuda
