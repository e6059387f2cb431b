// SPDX-License-Identifier: Apache-2.0
// Sums of a pointwise loss over all pairs of a row, with the gradient in the same pass. A block
// owns its rows, so nothing is added by atomics. Each tile of inner products is turned in place
// into weights h = d(loss)/du, whose product with the column tile, still in shared memory, is the
// gradient: sum_j h_ij du_ij/dx_i = 2 (sum_j h_ij) x_i - 2 sum_j h_ij r_j.
#pragma once

#include <back_product.cuh>
#include <finish.cuh>

namespace flashmetric::cuda {

// Statistics of the two rows that a thread has a share of; positives are kind 0, negatives kind 1.
struct PairRowSums {
  double sum[2][2] = {};    // [kind][row]
  float recent[2][2] = {};  // not yet in `sum`: many devices have few units for double
  int active[2][2] = {};
  int positives[2] = {};
  float weight[2][2] = {};  // sum of the weights h

  __device__ __forceinline__ void add(int row, bool same, float loss, float h) {
    // Not indexed by `same`: registers have no addresses.
    recent[0][row] += same ? loss : 0.0f;
    recent[1][row] += same ? 0.0f : loss;
    active[0][row] += same && loss > 0.0f;
    active[1][row] += !same && loss > 0.0f;
    weight[0][row] += same ? h : 0.0f;
    weight[1][row] += same ? 0.0f : h;
  }

  // After every tile.
  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      sum[t / 2][t % 2] += double(recent[t / 2][t % 2]);
      recent[t / 2][t % 2] = 0.0f;
    }
  }
};

template <class Shape, bool kGrad>
class PairSumRows {
 public:
  using Sweep = TileSweep<Shape>;
  static constexpr int kColBlocks = Shape::kColBlocks;
  static_assert(Shape::kRowBlocks == 1, "a warp has one block of rows");

  __device__ PairSumRows(const PairSumArgs& args, const Sweep& sweep, int row_tile,
                         FeaturePart part, char* shared)
      : args_(args), sweep_(sweep), row0_(row_tile * Shape::kRows), back_(sweep, part, shared) {}

  __device__ void operator()(typename Sweep::Products& products, int col_tile) {
    const int col0 = col_tile * Shape::kCols;
    uint32_t near = 0, positives = 0;
    if (interesting(products, col0)) {
      with_distance(args_.problem.distance, [&](auto distance) {
        with_formula(args_.formula, [&](auto formula) {
          weigh<decltype(distance), decltype(formula)>(products, col0, near, positives);
        });
      });
    } else if constexpr (kGrad) {
      Sweep::clear(products);
    }
    if constexpr (kGrad) {
      back_.near_of(sweep_.warp_col() / Shape::kWarpCols)[sweep_.lane()] = near;
      back_.multiply(products, positives);
      // Each column warp has a part of the features of every near pair, its own or not.
      for (int w = 0; w < Shape::kColWarps; ++w)
        measure_all(back_.near_of(w)[sweep_.lane()], w * Shape::kWarpCols, col0);
    } else {
      measure_all(near, sweep_.warp_col(), col0);
    }
    sums.settle();
  }

  PairRowSums sums;

  __device__ int local_row(int h) const {
    return sweep_.warp_row() + acc_row(sweep_.lane(), h * 2);
  }
  __device__ const BackProduct<Shape, kGrad>& back() const { return back_; }

 private:
  // Within the tile. Element e of block b is bit b * 4 + e of a mask.
  __device__ int column(int b, int e) const {
    return sweep_.warp_col() + b * 8 + acc_col(sweep_.lane(), e);
  }

  __device__ float u_of(float product, const RowMeta& own, const RowMeta& other) const {
    return fmaf(product * own.scale, -2.0f * other.scale, own.bias + other.bias);
  }

  // Replaces the products by u, and says whether any pair of the warp's tile can have a loss.
  __device__ bool interesting(typename Sweep::Products& products, int col0) {
    // Beyond this u a negative has none, if its u can be trusted.
    const float bound = with_distance(
        args_.problem.distance, [&](auto d) { return decltype(d)::inverse(args_.margin[1]); });
    const bool difference = args_.problem.distance != Distance::kDot;
    bool any = false;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const RowMeta own = sweep_.row_meta(local_row(k));
      const bool there = row0_ + local_row(k) < args_.problem.query.n;
#pragma unroll
      for (int b = 0; b < kColBlocks; ++b) {
        // Keeps later loads from being moved up here, where registers are short.
        asm volatile("" ::: "memory");
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = column(b, e);
          const RowMeta other = sweep_.col_meta(c);
          float& u = products.v[0][b][k * 2 + e];
          u = u_of(u, own, other);
          const bool close = difference && u < kNearFraction * (own.bias + other.bias);
          const bool same = there && own.label == other.label && col0 + c < args_.problem.ref.n;
          any = any || u < bound || close || same;
        }
      }
    }
    return __any_sync(kAllLanes, any);
  }

  // The share of a pair's loss that its row has in the objective.
  __device__ float share_of(int64_t i, int64_t j, bool same) const {
    if (args_.weight == nullptr) return args_.problem.self ? 2.0f : 1.0f;
    const int64_t kind = same ? 0 : 1;
    if (args_.weight_by_ref) return args_.weight[kind * args_.problem.ref.n + j];
    const float* weight = args_.weight + kind * args_.problem.query.n;
    // Rows of padding have no weights.
    const float own = i < args_.problem.query.n ? weight[i] : 0.0f;
    return args_.problem.self ? own + weight[j] : own;
  }

  // Replaces u by h times the scale of its column.
  template <class D, class F>
  __device__ void weigh(typename Sweep::Products& products, int col0, uint32_t& near,
                        uint32_t& positives) {
#pragma unroll
    for (int b = 0; b < kColBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        asm volatile("" ::: "memory");  // as above
        const int row = e / 2, c = column(b, e), i = row0_ + local_row(row), j = col0 + c;
        const RowMeta own = sweep_.row_meta(local_row(row));
        const RowMeta other = sweep_.col_meta(c);
        const float u = products.v[0][b][e];
        const bool same = own.label == other.label;
        const bool valid = j < args_.problem.ref.n && !(args_.problem.self && i == j);
        const bool close = D::kDifference && u < kNearFraction * (own.bias + other.bias);
        sums.positives[row] += valid && same;
        float h = 0.0f;
        if (valid && !close) {
          const float d = D::value(u);
          const float z = same ? d - args_.margin[0] : args_.margin[1] - d;
          if (kGrad && !(D::kUnitRows && (own.scale == 0.0f || other.scale == 0.0f))) {
            h = F::slope(z) * D::slope(d);
            if (h != 0.0f) h *= share_of(i, j, same) * (same ? 1.0f : -1.0f);
          }
          sums.add(row, same, F::value(z), h);
        }
        products.v[0][b][e] = h * other.scale;
        near |= uint32_t{valid && close} << (b * 4 + e);
        positives |= uint32_t{same} << (b * 4 + e);
      }
  }

  // The near pairs that the lanes of the column warp with first column `warp_col` have found.
  __device__ void measure_all(uint32_t near, int warp_col, int col0) {
    while (const uint32_t lanes = __ballot_sync(kAllLanes, near != 0)) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      const int bit = __shfl_sync(kAllLanes, __ffs(static_cast<int>(near)) - 1, lane);
      if (sweep_.lane() == lane) near &= near - 1;
      measure_near(lane, bit, warp_col, col0);
    }
  }

  // One pair that lost its digits to cancellation, by exact differences: element `bit` of `lane`.
  __device__ void measure_near(int lane, int bit, int warp_col, int col0) {
    const int row = bit % 4 / 2;
    const int local = sweep_.warp_row() + acc_row(lane, bit % 4);
    const int c = warp_col + bit / 4 * 8 + acc_col(lane, bit % 4);
    const int64_t i = row0_ + local, j = col0 + c;
    const bool mine = sweep_.lane() == lane && warp_col == sweep_.warp_col();
    const bool same = sweep_.row_meta(local).label == sweep_.col_meta(c).label;
    with_scalar(args_.problem.scalar, [&](auto type) {
      using S = decltype(type);
      const S* x = static_cast<const S*>(args_.problem.query.data) + i * args_.problem.d;
      const S* r = static_cast<const S*>(args_.problem.ref.data) + j * args_.problem.d;
      const float u = exact_u(args_.problem.distance, x, r, args_.problem.d, sweep_.lane());
      const float d =
          with_distance(args_.problem.distance, [&](auto f) { return decltype(f)::value(u); });
      const float z = same ? d - args_.margin[0] : args_.margin[1] - d;
      const float loss = with_formula(args_.formula, [&](auto f) { return decltype(f)::value(z); });
      if (mine) {
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (k == row) sums.add(k, same, loss, 0.0f);
      }
      if constexpr (kGrad) {
        float h =
            with_formula(args_.formula, [&](auto f) { return decltype(f)::slope(z); }) *
            with_distance(args_.problem.distance, [&](auto f) { return decltype(f)::slope(d); });
        if (h == 0.0f) return;
        h *= share_of(i, j, same) * (same ? 1.0f : -1.0f);
        if (sweep_.lane() / 4 == lane / 4) back_.add_exact(row, same, h, x, r, args_.problem.d);
      }
    });
  }

  const PairSumArgs& args_;
  const Sweep& sweep_;
  const int row0_;
  BackProduct<Shape, kGrad> back_;
};

}  // namespace flashmetric::cuda
