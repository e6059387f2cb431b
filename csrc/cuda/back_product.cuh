// SPDX-License-Identifier: Apache-2.0
// The product of a tile of weights with the column tile it came from: half-precision planes again,
// with a power of two per row that follows the weights as they come. Column warps share their
// weights and each computes its part of the features.
#pragma once

#include <tile.cuh>

namespace flashmetric::cuda {

// Those chunks of features whose gradient a block computes.
struct FeaturePart {
  int begin, count;

  __device__ static FeaturePart of(int part, int keep, int chunks) {
    const int begin = part * keep, left = chunks - begin;
    return {begin, left < keep ? left : keep};
  }
  // The rotation of the chunks that multiplies these last, so that they are still there.
  __device__ int rotation(int chunks) const { return begin + count == chunks ? 0 : begin + count; }
};

template <class Shape, bool kEnabled>
class BackProduct {
 public:
  __device__ BackProduct(const TileSweep<Shape>&, FeaturePart, char*) {}
};

template <class Shape>
class BackProduct<Shape, true> {
 public:
  using Sweep = TileSweep<Shape>;
  using Layout = WeightLayout<Shape>;
  // A slice is 16 features: two blocks of the product.
  static constexpr int kSlicesPerChunk = kChunk / 16;
  static constexpr int kSlices = Shape::kKeep * kSlicesPerChunk / Shape::kColWarps;
  static constexpr int kBlocks = 2 * kSlices;
  // Largest weight after scaling: the first tile leaves room to grow, and half precision ends at
  // 2^16.
  static constexpr int kFirstExponent = 10;
  static constexpr float kLimit = 32768.0f;
  // A factor of 1 that no weight was fitted to: there are exact contributions only, whose weights
  // say nothing of the others'.
  static constexpr float kUnfitted = -1.0f;
  static constexpr int kMostWithExact = 40;

  // `shared`: Layout::kBytes of the block.
  __device__ BackProduct(const Sweep& sweep, FeaturePart part, char* shared)
      : sweep_(sweep),
        part_(part),
        shared_(shared),
        column_warp_(sweep.warp_col() / Shape::kWarpCols) {
#pragma unroll
    for (int kind = 0; kind < 2; ++kind)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[kind][b][e] = 0.0f;
  }

  // Adds the block's weights times its columns. Bit b * 4 + e of `positives` says of which kind
  // element e of block b is. All warps of the block call this; it has a barrier.
  __device__ void multiply(const typename Sweep::Products& weights, uint32_t positives) {
    float largest[2][2] = {};
#pragma unroll
    for (int b = 0; b < Shape::kColBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float h = fabsf(weights.v[0][b][e]);
        const bool positive = (positives >> (b * 4 + e) & 1) != 0;
        largest[0][e / 2] = fmaxf(largest[0][e / 2], positive ? h : 0.0f);
        largest[1][e / 2] = fmaxf(largest[1][e / 2], positive ? 0.0f : h);
      }
#pragma unroll
    for (int kind = 0; kind < 2; ++kind)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float& value = largest[kind][k];
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
        if (sweep_.lane() % 4 == 0) *largest_of(kind, column_warp_, k) = value;
      }
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      // A hinge's zero is exact, so skipping loses nothing.
      const bool any = __syncthreads_or(largest[kind][0] > 0.0f || largest[kind][1] > 0.0f);
      if (any) {
        fit(kind);
        store_weights(kind, weights, positives);
        __syncthreads();
        multiply_kind(kind);
      }
    }
  }

  // Adds h (x - r) to the gradient of the row that element 0 (k = 0) or 2 (k = 1) of a block is of.
  // Called by the four lanes of that row, in every column warp.
  template <class S>
  __device__ void add_exact(int row, bool positive, float h, const S* x, const S* r, int64_t d) {
    float weight[2][2];
#pragma unroll
    for (int kind = 0; kind < 2; ++kind)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const bool here = k == row && positive == (kind == 0);
        float& factor = factor_[kind][k];
        if (here && factor == 0.0f) factor = kUnfitted;
        weight[kind][k] = here ? h * fabsf(factor) : 0.0f;
      }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int f = first_feature() + b * 8 + e;
        if (f >= feature_end(d)) continue;
        asm volatile("" ::: "memory");  // or all features are loaded at once, into registers
        const float difference = float(x[f]) - float(r[f]);
#pragma unroll
        for (int kind = 0; kind < 2; ++kind)
#pragma unroll
          for (int k = 0; k < 2; ++k) out_[kind][b][k * 2 + e] -= weight[kind][k] * difference;
      }
  }

  // Element e % 2 of block b is of feature first_feature() + b * 8 + e % 2, if that is less than
  // feature_end().
  __device__ int first_feature() const {
    return part_.begin * kChunk + column_warp_ * kSlices * 16 + acc_col(sweep_.lane(), 0);
  }
  __device__ int feature_end(int64_t d) const {
    const int end = (part_.begin + part_.count) * kChunk;
    return end < d ? end : static_cast<int>(d);
  }

  // What undoes the scale of a row's results.
  __device__ float inverse(int kind, int k) const {
    const float factor = fabsf(factor_[kind][k]);
    return factor == 0.0f ? 0.0f : __uint_as_float(inverse_power_bits(__float_as_uint(factor)));
  }
  // Writes sum_j h_ij r_j to row i of `out`.
  __device__ void store(int kind, float* out, int stride) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float undo = inverse(kind, k);
      const int row = sweep_.warp_row() + acc_row(sweep_.lane(), k * 2);
      float* at = out + row * stride + first_feature() - part_.begin * kChunk;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) at[b * 8 + e] = out_[kind][b][k * 2 + e] * undo;
    }
  }

  // Which pairs of a warp are near: written before multiply, read after it. The sweep's next
  // barrier comes before the next tile's.
  __device__ uint32_t* near_of(int column_warp) const {
    const int warp = sweep_.warp_row() / Shape::kWarpRows + column_warp * Shape::kRowWarps;
    return reinterpret_cast<uint32_t*>(shared_ + Layout::kNear) + warp * kWarp;
  }

 private:
  // Of the row that element 2 k of a block is of.
  __device__ float* largest_of(int kind, int column_warp, int k) const {
    const int row = sweep_.warp_row() + acc_row(sweep_.lane(), k * 2);
    return reinterpret_cast<float*>(shared_ + Layout::kLargest) +
           (kind * Shape::kColWarps + column_warp) * Shape::kRows + row;
  }

  // Lets the scaled weights of both rows stay below the limit; all column warps decide alike.
  __device__ void fit(int kind) {
    bool changed = false;
    float change[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float largest = 0.0f;
#pragma unroll
      for (int w = 0; w < Shape::kColWarps; ++w) largest = fmaxf(largest, *largest_of(kind, w, k));
      const float old = factor_[kind][k], undo = inverse(kind, k);
      change[k] = 1.0f;
      if (largest > 0.0f && (old <= 0.0f || largest * old > kLimit)) {
        const int wanted =
            prescale_exponent(__float_as_uint(largest)) - kTopExponent + kFirstExponent;
        // Exact contributions must not overflow on behalf of weights that vanish beside them.
        const int exponent = old < 0.0f && wanted > kMostWithExact ? kMostWithExact : wanted;
        factor_[kind][k] = __uint_as_float(power_of_two_bits(exponent));
        change[k] = factor_[kind][k] * undo;
        changed = true;
      }
    }
    if (!__any_sync(kAllLanes, changed)) return;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) out_[kind][b][e] *= change[e / 2];
  }

  __device__ static uint32_t pack(__half low, __half high) {
    return uint32_t{__half_as_ushort(low)} | uint32_t{__half_as_ushort(high)} << 16;
  }

  __device__ void store_weights(int kind, const typename Sweep::Products& weights,
                                uint32_t positives) const {
#pragma unroll
    for (int b = 0; b < Shape::kColBlocks; ++b)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int lane = sweep_.lane(), row = sweep_.warp_row() + acc_row(lane, k * 2);
        const int column = sweep_.warp_col() + b * 8 + acc_col(lane, 0);
        const float factor = factor_[kind][k];
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool positive = (positives >> (b * 4 + k * 2 + e) & 1) != 0;
          v[e] = positive == (kind == 0) ? weights.v[0][b][k * 2 + e] * factor : 0.0f;
        }
        const __half high0 = __float2half_rn(v[0]), high1 = __float2half_rn(v[1]);
        char* at = shared_ + Layout::offset(row, column / 8) + column % 8 * 2;
        *reinterpret_cast<uint32_t*>(at) = pack(high0, high1);
        if constexpr (Shape::kPlanes == 2)
          *reinterpret_cast<uint32_t*>(at + Layout::kPlaneBytes) =
              pack(__float2half_rn(v[0] - __half2float(high0)),
                   __float2half_rn(v[1] - __half2float(high1)));
      }
  }

  __device__ void multiply_kind(int kind) {
    constexpr int kPlanes = Shape::kPlanes;
    const int lane = sweep_.lane();
    const uint32_t weights = smem_address(shared_);
#pragma unroll
    for (int step = 0; step < Shape::kCols / 16; ++step) {
      uint32_t a[kPlanes][4];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p)
        ldmatrix_x4(a[p],
                    weights + static_cast<uint32_t>(p * Layout::kPlaneBytes +
                                                    Layout::offset(sweep_.warp_row() + a_row(lane),
                                                                   step * 2 + a_piece(lane))));
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const int slice = column_warp_ * kSlices + s, chunk = slice / kSlicesPerChunk;
        if (chunk >= part_.count) break;
        const uint32_t columns =
            sweep_.col_chunk(part_.count - 1 - chunk, 0) +
            static_cast<uint32_t>(piece_offset(step * 16 + bt_row(lane),
                                               slice % kSlicesPerChunk * 2 + bt_piece(lane)));
        uint32_t r[kPlanes][4];
#pragma unroll
        for (int p = 0; p < kPlanes; ++p)
          ldmatrix_x4_trans(r[p], columns + static_cast<uint32_t>(p * Shape::kCols * kChunkBytes));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float (&c)[4] = out_[kind][s * 2 + half];
          if constexpr (kPlanes == 2) {
            mma_f16(c, a[1], r[0][half * 2], r[0][half * 2 + 1]);
            mma_f16(c, a[0], r[1][half * 2], r[1][half * 2 + 1]);
          }
          mma_f16(c, a[0], r[0][half * 2], r[0][half * 2 + 1]);
        }
      }
    }
  }

  const Sweep& sweep_;
  const FeaturePart part_;
  char* const shared_;
  const int column_warp_;
  float out_[2][kBlocks][4];
  // Power of two that each row's weights are scaled by; 0 before there is any.
  float factor_[2][2] = {};
};

}  // namespace flashmetric::cuda
