// SPDX-License-Identifier: Apache-2.0
// Sums of a pointwise function over all pairs of a row, with the gradient in the same pass, and
// gradients alone. A block owns its rows, so nothing is added by atomics. Each tile of inner
// products is turned in place into distances, then into weights h = d(objective)/du, whose product
// with the column tile, still in shared memory, is the gradient:
// sum_j h_ij du_ij/dx_i = 2 (sum_j h_ij) x_i - 2 sum_j h_ij r_j.
#pragma once

#include <back_product.cuh>
#include <pair_tile.cuh>
#include <row_term.cuh>

namespace flashmetric::cuda {

// What a kernel is for: statistics of the rows, also the gradient of their totals, or the gradient
// of any weighted sum of them.
enum class SumPart { kSums, kSumsAndGrad, kGrad };

// Statistics of the two rows that a thread has a share of; [kind][row].
struct RowStatistics {
  double sum[2][2] = {};
  float slope[2][2] = {}, moment[2][2] = {};  // of f'(z), of f'(z) d
  int kept[2][2] = {}, active[2][2] = {};
};

// The same of one kind in one tile: many devices have few units for double.
struct TileStatistics {
  float sum[2] = {}, slope[2] = {}, moment[2] = {};
  int kept[2] = {}, active[2] = {};

  // A pair at distance d, if it is `here`: not indexed by its row, for registers have no addresses.
  __device__ __forceinline__ void add(int row, bool here, float value, float slope_z, float d) {
    sum[row] += here ? value : 0.0f;
    slope[row] += here ? slope_z : 0.0f;
    moment[row] += here ? slope_z * d : 0.0f;
    active[row] += here && value > 0.0f;
    kept[row] += here;
  }
};

template <class Shape, SumPart kPart>
class RowSums {
 public:
  static constexpr bool kGrad = kPart != SumPart::kSums;
  static constexpr bool kStatistics = kPart != SumPart::kGrad;
  using Sweep = TileSweep<Shape>;
  using Products = typename Sweep::Products;
  static constexpr int kColBlocks = Shape::kColBlocks;

  __device__ RowSums(const RowSumArgs& args, const Sweep& sweep, int row_tile, FeaturePart part,
                     char* shared)
      : pairs(args.problem, sweep, row_tile),
        args_(args),
        sweep_(sweep),
        merged_(args.grad_sum != nullptr),
        back_(sweep, part, shared) {
    // Another role may have other numbers for each column.
    const bool by_row = args.symmetric || !args.other.on;
#pragma unroll
    for (int k = 0; k < 2; ++k)
      limit_[k] = by_row ? negative_limit(args.own, args.form, args.logits, args.problem.distance,
                                          args.symmetric ? 0 : pairs.row(k))
                         : __builtin_huge_valf();
  }

  __device__ void operator()(Products& products, int col_tile) {
    const int col0 = col_tile * Shape::kCols;
    PairMasks masks;
    const bool interesting = pairs.classify(products, col0, limit_, masks);
    if (kStatistics && args_.own.bound == nullptr) count(masks);
    if (interesting) {
      weigh(products, col0, masks);
    } else if constexpr (kGrad) {
      Sweep::clear(products);
      masks.near = 0;
    }
    if constexpr (kGrad) {
      back_.near_of(sweep_.warp_col() / Shape::kWarpCols)[sweep_.lane()] = masks.list();
      back_.multiply(products, merged_ ? 0 : masks.kind[0]);
      // Each column warp has a part of the features of every near pair, its own or not.
      for (int w = 0; w < Shape::kColWarps; ++w)
        measure_all(back_.near_of(w)[sweep_.lane()], w * Shape::kWarpCols, col0);
    } else {
      measure_all(masks.list(), sweep_.warp_col(), col0);
    }
  }

  const PairTile<Shape> pairs;
  RowStatistics sums;
  float weight[2][2] = {};  // [kind][row], sum of the weights h

  __device__ const BackProduct<Shape, kGrad>& back() const { return back_; }

 private:
  struct Weights {
    float v[PairTile<Shape>::kElements];
  };

  __device__ void count(const PairMasks& masks) {
#pragma unroll
    for (int kind = 0; kind < 2; ++kind)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        sums.kept[kind][k] += __popc(masks.kind[kind] & PairMasks::of_row(k));
  }

  // Replaces u by h times the scale of its column.
  __device__ void weigh(Products& products, int col0, const PairMasks& masks) {
    const Distance distance = args_.problem.distance;
    with_product_distance(distance, [&](auto d) { pairs.template measure<decltype(d)>(products); });
    Weights weights;
    if constexpr (kGrad) {
#pragma unroll
      for (float& w : weights.v) w = 0.0f;
    }
    // One copy of the code for both kinds.
#pragma unroll 1
    for (int kind = 0; kind < 2; ++kind) {
      const uint32_t mask = kind == 0 ? masks.settled(0) : masks.settled(1);
      const Term term = args_.form.term[kind];
      if (!__any_sync(kAllLanes, mask != 0)) continue;
      if (term == Term::kNone && (!kStatistics || args_.own.bound == nullptr)) continue;
      if (!kStatistics && args_.logits) {
        if (args_.own.on) add_logits<false>(products, col0, kind, mask, weights);
        if (args_.other.on) add_logits<true>(products, col0, kind, mask, weights);
        continue;
      }
      TileStatistics found;
      with_any_term(term, [&](auto f) {
        using F = decltype(f);
        if (kStatistics || args_.own.on || args_.symmetric)
          add_terms<F, false>(products, col0, kind, mask, weights, found);
        if (kGrad && args_.other.on && !args_.symmetric)
          add_terms<F, true>(products, col0, kind, mask, weights, found);
      });
      if constexpr (kStatistics) settle(kind, found);
    }
    if constexpr (kGrad) {
      with_product_distance(distance, [&](auto d) {
        finish_weights<decltype(d)>(products, merged_ ? 0 : masks.kind[0], weights);
      });
    }
  }

  // Adds the pairs of `mask` to the statistics and their derivatives in d to the weights, as their
  // rows see them, or (kByColumn) their references.
  template <class F, bool kByColumn>
  __device__ __forceinline__ void add_terms(const Products& distances, int col0, int kind,
                                            uint32_t mask, Weights& weights,
                                            TileStatistics& found) const {
    const PairRole<float>& role = kByColumn ? args_.other : args_.own;
    const RoleOfRow<float> rows[2] = {{args_.own, kind, pairs.row(0)},
                                      {args_.own, kind, pairs.row(1)}};
#pragma unroll
    for (int b = 0; b < kColBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        asm volatile("" ::: "memory");  // as in classify
        if ((mask >> (b * 4 + e) & 1) == 0) continue;
        const int64_t j = col0 + pairs.column(b, e);
        const float d = distances.v[0][b][e];
        const RoleOfRow own = kByColumn ? RoleOfRow(role, kind, j) : rows[e / 2];
        if (!is_kept(role, kind, own.bound, d)) continue;
        const float z = own.z(d);
        if constexpr (kStatistics && !kByColumn)
          found.add(e / 2, true, F::value(z), F::slope(z), d);
        if constexpr (kGrad) {
          float w = own.scale * F::slope(z);
          if (w != 0.0f) w *= kByColumn ? own.weight : share_of(own, kind, j);
          weights.v[b * 4 + e] += w;
        }
      }
  }

  // The share of a pair's term that its row has in the objective, and, where its reference sees
  // the same, that one, too.
  __device__ float share_of(const RoleOfRow<float>& own, int kind, int64_t j) const {
    float share = args_.own.on ? own.weight : 0.0f;
    if (args_.symmetric && args_.other.on)
      share +=
          args_.other.weight == nullptr ? 1.0f : args_.other.weight[kind * args_.other.rows + j];
    return share;
  }

  // The same of log-sum-exps, whose derivative in a logit is its softmax.
  template <bool kByColumn>
  __device__ __forceinline__ void add_logits(const Products& distances, int col0, int kind,
                                             uint32_t mask, Weights& weights) const {
    const PairRole<float>& role = kByColumn ? args_.other : args_.own;
    const RoleOfRow<float> rows[2] = {{args_.own, kind, pairs.row(0)},
                                      {args_.own, kind, pairs.row(1)}};
#pragma unroll
    for (int b = 0; b < kColBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        asm volatile("" ::: "memory");  // as in classify
        if ((mask >> (b * 4 + e) & 1) == 0) continue;
        const float d = distances.v[0][b][e];
        const RoleOfRow own =
            kByColumn ? RoleOfRow(role, kind, col0 + pairs.column(b, e)) : rows[e / 2];
        if (is_kept(role, kind, own.bound, d))
          weights.v[b * 4 + e] += logit_weight(args_.form, own, kind, d);
      }
  }

  __device__ __forceinline__ void settle(int kind, const TileStatistics& found) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int own = t / 2, k = t % 2;
      // Not indexed by the kind: registers have no addresses.
      const bool here = own == kind;
      sums.sum[own][k] += here ? double(found.sum[k]) : 0.0;
      sums.slope[own][k] += here ? found.slope[k] : 0.0f;
      sums.moment[own][k] += here ? found.moment[k] : 0.0f;
      sums.active[own][k] += here ? found.active[k] : 0;
      if (args_.own.bound != nullptr) sums.kept[own][k] += here ? found.kept[k] : 0;
    }
  }

  // Replaces distances by h times the scale of their column.
  template <class D>
  __device__ void finish_weights(Products& products, uint32_t positives, const Weights& weights) {
#pragma unroll
    for (int b = 0; b < kColBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        asm volatile("" ::: "memory");  // as in classify
        float& value = products.v[0][b][e];
        float h = weights.v[b * 4 + e];
        if (h != 0.0f) h *= D::slope(value);
        if (D::kUnitRows && pairs.is_flat(b, e)) h = 0.0f;
        add_weight(e / 2, (positives >> (b * 4 + e) & 1) != 0, h);
        value = h * sweep_.col_meta(pairs.column(b, e)).scale;
      }
  }

  __device__ __forceinline__ void add_weight(int row, bool positive, float h) {
    weight[0][row] += positive ? h : 0.0f;
    weight[1][row] += positive ? 0.0f : h;
  }

  // The near pairs that the lanes of the column warp with first column `warp_col` have found.
  __device__ void measure_all(uint32_t list, int warp_col, int col0) {
    pairs.for_each_near(list, [&](const ListedPair& pair) { measure_near(pair, warp_col, col0); });
  }

  // One pair that lost its digits to cancellation, by exact differences.
  __device__ void measure_near(const ListedPair& pair, int warp_col, int col0) {
    const PairProblem& problem = args_.problem;
    const int64_t i = pairs.row_of(pair), j = pairs.ref_of(pair, warp_col, col0);
    with_scalar(problem.scalar, [&](auto type) {
      using S = decltype(type);
      const S* x = static_cast<const S*>(problem.query.data) + i * problem.d;
      const S* r = static_cast<const S*>(problem.ref.data) + j * problem.d;
      const float u = exact_u(problem.distance, x, r, problem.d, sweep_.lane());
      const float d =
          with_product_distance(problem.distance, [=](auto f) { return decltype(f)::value(u); });
      if (kStatistics && sweep_.lane() == pair.lane && warp_col == sweep_.warp_col())
        add_near(pair, i, d);
      if constexpr (kGrad) {
        float h = 0.0f;
        if (args_.own.on) h += near_weight(args_.own, pair.kind, i, d);
        if (args_.other.on) h += near_weight(args_.other, pair.kind, j, d);
        if (h != 0.0f)
          h *= with_product_distance(problem.distance,
                                     [=](auto f) { return decltype(f)::slope(d); });
        if (h == 0.0f) return;
        if (sweep_.lane() / 4 == pair.lane / 4)
          back_.add_exact(pair.element % 4 / 2, pair.kind == 0 && !merged_, h, x, r, problem.d);
      }
    });
  }

  __device__ void add_near(const ListedPair& pair, int64_t i, float d) {
    const RoleOfRow own(args_.own, pair.kind, i);
    if (!is_kept(args_.own, pair.kind, own.bound, d)) return;
    const float z = own.z(d);
    float value = 0.0f, slope = 0.0f;
    with_any_term(args_.form.term[pair.kind], [&](auto f) {
      value = decltype(f)::value(z);
      slope = decltype(f)::slope(z);
    });
    TileStatistics found;
#pragma unroll
    for (int k = 0; k < 2; ++k) found.add(k, k == pair.element % 4 / 2, value, slope, d);
    settle(pair.kind, found);
  }

  __device__ float near_weight(const PairRole<float>& role, int kind, int64_t row, float d) const {
    return pair_weight(args_.form, !kStatistics && args_.logits, role, kind, row, d);
  }

  const RowSumArgs& args_;
  const Sweep& sweep_;
  const bool merged_;
  float limit_[2];
  BackProduct<Shape, kGrad> back_;
};

}  // namespace flashmetric::cuda
