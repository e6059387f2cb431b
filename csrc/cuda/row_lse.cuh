// SPDX-License-Identifier: Apache-2.0
// Log-sum-exps over all pairs of a row: each thread follows the largest logit of its share of two
// rows, and the sum relative to it.
#pragma once

#include <pair_tile.cuh>
#include <row_term.cuh>

namespace flashmetric::cuda {

// sum e^(l - top), and the same of d e^(l - top). Sums of one sign: float loses nothing to speak
// of over the few thousand tiles of a row.
struct RunningLse {
  float top, sum, moment;

  __device__ __forceinline__ void clear() {
    top = -__builtin_huge_valf();
    sum = moment = 0.0f;
  }

  // What e^(l - top) is taken relative to; of no logits, anything finite.
  __device__ __forceinline__ float shift() const {
    return top == -__builtin_huge_valf() ? 0.0f : top * kLog2E;
  }
  __device__ __forceinline__ void raise(float other_top) {
    const float before = top;
    top = fmaxf(top, other_top);
    const float change = exp2_fast(fmaf(before, kLog2E, -shift()));
    sum *= change;
    moment *= change;
  }
  // The logit is at most `top`.
  __device__ __forceinline__ void add(float shift, float logit, float d) {
    const float e = exp2_fast(fmaf(logit, kLog2E, -shift));
    sum += e;
    // The distance of a row of padding is NaN.
    moment = fmaf(e, e > 0.0f ? d : 0.0f, moment);
  }
  // The same bits whichever of two is merged into the other.
  __device__ __forceinline__ void merge(RunningLse other) {
    const float before = top;
    raise(other.top);
    other.raise(before);
    sum += other.sum;
    moment += other.moment;
  }
};

template <class Shape>
class RowLse {
 public:
  using Sweep = TileSweep<Shape>;
  using Products = typename Sweep::Products;
  static constexpr int kColBlocks = Shape::kColBlocks;

  __device__ RowLse(const RowLseArgs& args, const Sweep& sweep, int row_tile)
      : pairs(args.problem, sweep, row_tile), args_(args) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      limit_[k] = negative_limit(args.own, args.form, true, args.problem.distance, pairs.row(k));
      running[0][k].clear();
      running[1][k].clear();
    }
  }

  __device__ void operator()(Products& products, int col_tile) {
    const int col0 = col_tile * Shape::kCols;
    PairMasks masks;
    if (!pairs.classify(products, col0, limit_, masks)) return;
    with_product_distance(args_.problem.distance,
                          [&](auto d) { pairs.template measure<decltype(d)>(products); });
#pragma unroll 1
    for (int kind = 0; kind < 2; ++kind) {
      const uint32_t mask = kind == 0 ? masks.settled(0) : masks.settled(1);
      if (args_.form.term[kind] == Term::kNone || !__any_sync(kAllLanes, mask != 0)) continue;
#pragma unroll
      for (int k = 0; k < 2; ++k) add(products, kind, k, mask);
    }
    pairs.for_each_near(masks.list(), [&](const ListedPair& pair) { measure_near(pair, col0); });
  }

  const PairTile<Shape> pairs;
  RunningLse running[2][2];  // [kind][row]
  int count[2][2] = {};

 private:
  // Those pairs of row k that are in the mask.
  __device__ __forceinline__ void add(const Products& distances, int kind, int k, uint32_t mask) {
    const RoleOfRow own(args_.own, kind, pairs.row(k));
    float logits[kColBlocks * 2];
    float top = -__builtin_huge_valf();
    int kept = 0;
#pragma unroll
    for (int t = 0; t < kColBlocks * 2; ++t) {
      const float d = distances.v[0][t / 2][k * 2 + t % 2];
      const bool here =
          (mask >> (t / 2 * 4 + k * 2 + t % 2) & 1) != 0 && is_kept(args_.own, kind, own.bound, d);
      logits[t] = here ? PairLogit(args_.form, kind, own.z(d)).value : -__builtin_huge_valf();
      top = fmaxf(top, logits[t]);
      kept += here;
    }
    RunningLse now = kind == 0 ? running[0][k] : running[1][k];
    now.raise(top);
    const float shift = now.shift();
#pragma unroll
    for (int t = 0; t < kColBlocks * 2; ++t)
      now.add(shift, logits[t], distances.v[0][t / 2][k * 2 + t % 2]);
    put(kind, k, true, now, kept);
  }

  // Not indexed by the kind: registers have no addresses.
  __device__ __forceinline__ void put(int kind, int k, bool here, const RunningLse& now, int kept) {
#pragma unroll
    for (int own = 0; own < 2; ++own) {
      const bool mine = here && own == kind;
      RunningLse& to = running[own][k];
      to.top = mine ? now.top : to.top;
      to.sum = mine ? now.sum : to.sum;
      to.moment = mine ? now.moment : to.moment;
      count[own][k] += mine ? kept : 0;
    }
  }

  // One pair that lost its digits to cancellation, by exact differences.
  __device__ void measure_near(const ListedPair& pair, int col0) {
    const PairProblem& problem = args_.problem;
    if (args_.form.term[pair.kind] == Term::kNone) return;
    const int64_t i = pairs.row_of(pair), j = pairs.ref_of(pair, col0);
    float u = 0.0f;
    with_scalar(problem.scalar, [&](auto type) {
      using S = decltype(type);
      u = exact_u(problem.distance, static_cast<const S*>(problem.query.data) + i * problem.d,
                  static_cast<const S*>(problem.ref.data) + j * problem.d, problem.d, pairs.lane());
    });
    const float d =
        with_product_distance(problem.distance, [=](auto f) { return decltype(f)::value(u); });
    const RoleOfRow own(args_.own, pair.kind, i);
    if (pairs.lane() != pair.lane || !is_kept(args_.own, pair.kind, own.bound, d)) return;
    const float logit = PairLogit(args_.form, pair.kind, own.z(d)).value;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      RunningLse now = pair.kind == 0 ? running[0][k] : running[1][k];
      now.raise(logit);
      now.add(now.shift(), logit, d);
      put(pair.kind, k, k == pair.element % 4 / 2, now, 1);
    }
  }

  const RowLseArgs& args_;
  float limit_[2];
};

}  // namespace flashmetric::cuda
