// SPDX-License-Identifier: Apache-2.0
// The slab engine's search: rows of a slab of inner products -> hardest pairs and their distances;
// and the reduction of triplet losses. 8 kernels: slab_rows for each dtype, the others for float
// and double.
#include <candidate.cuh>
#include <slab_row.cuh>

namespace flashmetric::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kRowWarps* kWarp, 8) slab_rows_kernel(const SlabRowsArgs args) {
  using T = accumulate_t<S>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp;
  bool bad = false;
  for (int64_t i = warp; i < args.n; i += int64_t{gridDim.x} * kRowWarps) {
    const S* x = static_cast<const S*>(args.raw) + i * args.d;
    T norm = 0;
    for (int64_t k = lane; k < args.d; k += kWarp) {
      const T value = static_cast<T>(x[k]);
      norm += value * value;
      if (args.rows != nullptr) static_cast<T*>(args.rows)[i * args.d + k] = value;
    }
    norm = warp_sum(norm);
    if (lane == 0) static_cast<T*>(args.norms)[i] = norm;
    // A squared distance is at most four times the larger squared norm.
    bad = bad || !isfinite(T(4) * norm);
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) args.bad[blockIdx.x] = bad;
}

// Of what every warp of the block found; the same in every thread.
template <class T>
__device__ void block_best(Candidate<T> (&best)[2], Candidate<T> (&found)[2][kSlabWarps]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  __syncthreads();  // earlier findings have been read
#pragma unroll
  for (int kind = 0; kind < 2; ++kind)
    if (lane == 0) found[kind][warp] = best[kind];
  __syncthreads();
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    best[kind] = found[kind][0];
    for (int w = 1; w < kSlabWarps; ++w)
      if (found[kind][w].beats(best[kind])) best[kind] = found[kind][w];
  }
}

// The search of one block for one row. Kind 0 are positives, of which the farthest wins: their
// values are negated.
template <class T>
class RowSearch {
 public:
  __device__ RowSearch(const SlabHardestArgs& args)
      : args_(args),
        row_(args.problem, blockIdx.x),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        warp_(static_cast<int>(threadIdx.x) / kWarp) {}

  // By keys of the products.
  __device__ void by_keys(Candidate<T> (&best)[2]) const {
    const T* products = static_cast<const T*>(args_.products) + blockIdx.x * row_.m();
    best[0] = best[1] = {T(0), -1};
    for (int64_t j = threadIdx.x; j < row_.m(); j += kSlabThreads) {
      if (row_.is_self(j)) continue;
      const bool same = row_.same(j);
      const T key = row_.key(j, products[j]);
      const Candidate<T> candidate{same ? -key : key, static_cast<int32_t>(j)};
      if (same && candidate.beats(best[0])) best[0] = candidate;
      if (!same && candidate.beats(best[1])) best[1] = candidate;
    }
    best[0] = warp_best(best[0]);
    best[1] = warp_best(best[1]);
  }

  // By exact differences, as far as `wanted`: the value is then the distance.
  __device__ void by_distance(const bool (&wanted)[2], Candidate<T> (&best)[2]) const {
    if (wanted[0]) best[0] = {T(0), -1};
    if (wanted[1]) best[1] = {T(0), -1};
    for (int64_t begin = warp_ * kWarp; begin < row_.m(); begin += kSlabThreads) {
      const int64_t own = begin + lane_;
      const bool inside = own < row_.m() && !row_.is_self(own);
      const bool same = inside && row_.same(own);
      uint32_t left = __ballot_sync(kAllLanes, inside && (same ? wanted[0] : wanted[1]));
      const uint32_t positives = __ballot_sync(kAllLanes, same);
      while (left != 0) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        left &= left - 1;
        const bool positive = positives >> bit & 1;
        const T distance = row_.value(row_.measure(begin + bit, lane_));
        const Candidate<T> candidate{positive ? -distance : distance,
                                     static_cast<int32_t>(begin + bit)};
        if (positive && candidate.beats(best[0])) best[0] = candidate;
        if (!positive && candidate.beats(best[1])) best[1] = candidate;
      }
    }
  }

  // Measures a winner; whether the keys of such pairs could be trusted. One warp.
  __device__ bool trustworthy(int kind, Candidate<T>& winner) const {
    if (winner.index < 0) return true;
    const T u = row_.measure(winner.index, lane_);
    const T distance = row_.value(u);
    winner.value = kind == 0 ? -distance : distance;
    return !row_.difference() || !(u < row_.near_below(winner.index));
  }

  __device__ void write(int kind, const Candidate<T>& best, bool poisoned) const {
    const int64_t at = kind * args_.problem.x.n + row_.number();
    T distance = kind == 0 ? -best.value : best.value;
    // The true winner is unknown, and a finite loss with a NaN gradient would hide that.
    if (poisoned) distance = not_a_number<T>();
    args_.index[at] = best.index;
    static_cast<T*>(args_.distance)[at] = best.index < 0 ? T(0) : distance;
  }

 private:
  const SlabHardestArgs& args_;
  const SlabRow<T> row_;
  const int lane_, warp_;
};

// Blocks per multiprocessor that still leave registers enough.
template <class T>
constexpr int kHardestBlocks = sizeof(T) == 8 ? 2 : 3;

template <class T>
__global__ void __launch_bounds__(kSlabThreads, kHardestBlocks<T>)
    slab_hardest_kernel(const SlabHardestArgs args) {
  __shared__ Candidate<T> found[2][kSlabWarps];
  __shared__ bool trusted[2];
  const bool poisoned = any_bad(args.problem.bad, args.problem.bad_count);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const RowSearch<T> search(args);
  Candidate<T> best[2];
  bool again[2] = {true, true};
  if (args.products != nullptr) {
    search.by_keys(best);
    block_best(best, found);
    __syncthreads();  // all have read the findings of the warps
    if (warp < 2) {
      Candidate<T> winner = warp == 0 ? best[0] : best[1];
      const bool trust = search.trustworthy(warp, winner);
      if (threadIdx.x % kWarp == 0) {
        found[warp][0] = winner;
        trusted[warp] = trust || poisoned;
      }
    }
    __syncthreads();
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      best[kind] = found[kind][0];
      again[kind] = !trusted[kind];
    }
  }
  if (again[0] || again[1]) {
    search.by_distance(again, best);
    block_best(best, found);
  }
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) search.write(kind, best[kind], poisoned);
}

template <class T>
__global__ void __launch_bounds__(kTripletThreads)
    triplet_finish_kernel(const TripletFinishArgs<T> args) {
  __shared__ double losses[kTripletThreads];
  __shared__ int32_t counts[kTripletThreads];
  const int thread = static_cast<int>(threadIdx.x);
  double loss = 0;
  int32_t counted = 0;
  bool poisoned = false;
  for (int64_t i = thread; i < args.n; i += kTripletThreads) {
    const TripletTerm<T> term = args.rule.term(args.index[i] >= 0, args.index[args.n + i] >= 0,
                                               args.distance[i], args.distance[args.n + i]);
    loss += static_cast<double>(term.loss);
    counted += term.counted;
    poisoned = poisoned || term.poisoned;
    args.slope[i] = term.slope;
    args.slope[args.n + i] = -term.slope;
  }
  losses[thread] = loss;
  counts[thread] = counted;
  poisoned = __syncthreads_or(poisoned);
  for (int half = kTripletThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      losses[thread] += losses[thread + half];
      counts[thread] += counts[thread + half];
    }
    __syncthreads();
  }
  if (thread == 0) {
    const double divisor = args.rule.divisor(counts[0]);
    *args.loss = poisoned ? not_a_number<T>() : static_cast<T>(losses[0] / divisor);
    *args.scale = static_cast<T>(1 / divisor);
  }
  if (!poisoned) return;
  // Also where only a skipped anchor met the NaN.
  for (int64_t i = thread; i < 2 * args.n; i += kTripletThreads) args.slope[i] = not_a_number<T>();
}

}  // namespace

cudaError_t slab_rows(const SlabRowsArgs& args, Scalar scalar, int grid, cudaStream_t stream) {
  with_rows(scalar, [&](auto type) {
    slab_rows_kernel<decltype(type)>
        <<<static_cast<unsigned>(grid), kRowWarps * kWarp, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

template <class T>
cudaError_t slab_hardest(const SlabHardestArgs& args, int64_t rows, cudaStream_t stream) {
  slab_hardest_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t slab_hardest<float>(const SlabHardestArgs&, int64_t, cudaStream_t);
template cudaError_t slab_hardest<double>(const SlabHardestArgs&, int64_t, cudaStream_t);

template <class T>
cudaError_t triplet_finish(const TripletFinishArgs<T>& args, cudaStream_t stream) {
  triplet_finish_kernel<T><<<1, kTripletThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t triplet_finish<float>(const TripletFinishArgs<float>&, cudaStream_t);
template cudaError_t triplet_finish<double>(const TripletFinishArgs<double>&, cudaStream_t);

}  // namespace flashmetric::cuda
