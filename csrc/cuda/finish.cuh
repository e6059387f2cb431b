// SPDX-License-Identifier: Apache-2.0
// The end of a search for hardest pairs: the winners' exact distances, a second look where the keys
// cannot be trusted, and the triplet loss. One warp a row.
#pragma once

#include <exact.cuh>

namespace flashmetric::cuda {

struct Found {
  int64_t index;
  float u;
};

template <class S>
class RowFinish {
 public:
  __device__ RowFinish(const HardestArgs& args, int lane)
      : args_(args), problem_(args.problem), lane_(lane) {}

  // Positives of row i are kind 0, negatives kind 1.
  __device__ Found find(int64_t i, int kind, uint64_t key, bool poisoned) const {
    if (poisoned) return {first_candidate(i, kind), not_a_number<float>()};
    Found found{key_index(key), 0.0f};
    if (found.index < 0) return found;
    found.u = measure(i, found.index);
    return args_.exact || !trustworthy(i, found) ? search(i, kind) : found;
  }

 private:
  __device__ const S* query(int64_t i) const {
    return static_cast<const S*>(problem_.query.data) + i * problem_.d;
  }
  __device__ const S* ref(int64_t j) const {
    return static_cast<const S*>(problem_.ref.data) + j * problem_.d;
  }
  __device__ float measure(int64_t i, int64_t j) const {
    return exact_u(problem_.distance, query(i), ref(j), problem_.d, lane_);
  }
  __device__ bool candidate(int64_t i, int64_t j, int kind) const {
    const bool same = problem_.query.labels[i] == problem_.ref.labels[j];
    return same == (kind == 0) && !(problem_.self && i == j);
  }

  // Among rows this much closer to each other than to the origin the keys may have picked the wrong
  // one.
  __device__ bool trustworthy(int64_t i, Found found) const {
    if (problem_.distance == Distance::kDot) return true;
    return found.u >= kNearFraction * (problem_.x.meta[i].bias + problem_.r.meta[found.index].bias);
  }

  // By exact differences over all candidates. Compared are the distances themselves: two squares
  // can have one root.
  __device__ Found search(int64_t i, int kind) const {
    Found best{-1, 0.0f};
    float best_value = 0.0f;
    for (int64_t j = 0; j < problem_.ref.n; ++j) {
      if (!candidate(i, j, kind)) continue;
      const float u = measure(i, j);
      const float value =
          with_product_distance(problem_.distance, [&](auto d) { return decltype(d)::value(u); });
      if (best.index < 0 || (kind == 0 ? value > best_value : value < best_value)) {
        best = {j, u};
        best_value = value;
      }
    }
    return best;
  }

  // With rows that are not finite no key may have compared at all.
  __device__ int64_t first_candidate(int64_t i, int kind) const {
    for (int64_t begin = 0; begin < problem_.ref.n; begin += kWarp) {
      const int64_t j = begin + lane_;
      const uint32_t hits = __ballot_sync(kAllLanes, j < problem_.ref.n && candidate(i, j, kind));
      if (hits != 0) return begin + __ffs(static_cast<int>(hits)) - 1;
    }
    return -1;
  }

  const HardestArgs& args_;
  const PairProblem& problem_;
  const int lane_;
};

// What a thread adds up over its rows.
struct TripletSum {
  double loss = 0.0;
  int64_t counted = 0;
};

// Finishes row i from its two keys; lane 0 writes.
__device__ inline void finish_row(const HardestArgs& args, int64_t i, uint64_t positive,
                                  uint64_t negative, bool poisoned, int lane, TripletSum& sum) {
  const int64_t n = args.problem.query.n;
  Found found[2];
  float distance[2];
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    Found f{-1, 0.0f};
    with_scalar(args.problem.scalar, [&](auto type) {
      const RowFinish<decltype(type)> row(args, lane);
      f = row.find(i, kind, kind == 0 ? positive : negative, poisoned);
    });
    found[kind] = f;
    distance[kind] =
        f.index < 0 ? 0.0f
                    : with_product_distance(
                          args.problem.distance, [&](auto d) { return decltype(d)::value(f.u); });
    if (lane == 0) {
      args.index[kind * n + i] = f.index;
      args.distance[kind * n + i] = distance[kind];
    }
  }
  if (args.triplet.loss == nullptr || lane != 0) return;
  const TripletTerm<float> term =
      args.triplet.rule.term(found[0].index >= 0, found[1].index >= 0, distance[0], distance[1]);
  const float slope = poisoned ? not_a_number<float>() : term.slope;
  args.triplet.slope[i] = slope;
  args.triplet.slope[n + i] = -slope;
  sum.loss += double(term.loss);
  sum.counted += term.counted;
}

// Adds up a block's sums, and the last block of the grid to do so adds up all of them: in the order
// of rows and blocks, whichever block is the last. `scratch`: kThreads sums of shared memory.
template <int kThreads>
__device__ void reduce_triplets(const TripletArgs& triplet, bool poisoned, const TripletSum& sum,
                                TripletSum* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto total = [&](const TripletSum& own) {
    __syncthreads();
    scratch[thread] = own;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) {
        scratch[thread].loss += scratch[thread + half].loss;
        scratch[thread].counted += scratch[thread + half].counted;
      }
    }
    __syncthreads();
    return scratch[0];
  };
  const TripletSum block = total(sum);
  bool last = false;
  if (thread == 0) {
    triplet.sums[blockIdx.x] = block.loss;
    triplet.kept[blockIdx.x] = block.counted;
    __threadfence();  // the sums are there before the count says so
    last = atomicAdd(triplet.counter, 1u) == gridDim.x - 1;
    __threadfence();  // what other blocks wrote is there for all threads after the barrier
  }
  if (!__syncthreads_or(last)) return;
  TripletSum own;
  for (int64_t b = thread; b < gridDim.x; b += kThreads) {
    // Not through the first-level cache, which other blocks' writes do not reach.
    own.loss += __ldcg(triplet.sums + b);
    own.counted += __ldcg(triplet.kept + b);
  }
  const TripletSum all = total(own);
  if (thread == 0) {
    const double divisor = triplet.rule.divisor(all.counted);
    *triplet.loss = poisoned ? not_a_number<float>() : float(all.loss / divisor);
    *triplet.scale = float(1.0 / divisor);
  }
}

}  // namespace flashmetric::cuda
