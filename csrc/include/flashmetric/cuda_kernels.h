// SPDX-License-Identifier: Apache-2.0
// Arguments and launchers of the CUDA kernels. No torch header on either side of this line: the
// kernels then compile in seconds, and against a torch that was built without CUDA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <label_rule.h>
#include <plan.h>
#include <stdint.h>

namespace flashmetric::cuda {

enum class Scalar : int32_t { kHalf, kBFloat16, kFloat, kDouble };

// Calls f with a zero of the type that `scalar` names; the tile engine has no double.
template <class F>
__host__ __device__ __forceinline__ void with_scalar(Scalar scalar, F&& f) {
  switch (scalar) {
    case Scalar::kHalf:
      return f(__half{});
    case Scalar::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// Rows as they came, contiguous.
struct RawRows {
  const void* data;       // [n, d]
  const int64_t* labels;  // [n, words]
  int64_t n;
};

// Rows as the tile engine reads them, padded with zeros to whole tiles and chunks.
struct TileRows {
  __half* planes;        // [planes, padded, chunks * kChunk]: high parts, then low parts
  RowMeta* meta;         // [padded]
  int64_t plane_stride;  // elements from one plane to the next
};

struct PairProblem {
  RawRows query, ref;  // ref is query in a self-batch
  TileRows x, r;       // likewise
  int64_t d;
  int32_t chunks;
  Scalar scalar;
  Distance distance;  // not a direct one
  bool self;
  Labelling labelling;
};

// Splits rows into prescaled half-precision planes and computes what goes with each of them.
struct PrepareArgs {
  PairProblem problem;
  int32_t planes;
  uint64_t* keys;     // [2, padded x]: set to kNoKey; null: there are none
  uint32_t* bad;      // [grid]: whether any of a block's rows is not finite
  uint32_t* counter;  // set to 0; null: there is none
};
cudaError_t prepare(const PrepareArgs& args, int grid, cudaStream_t stream);

// The architecture that the current device's kernels were compiled for, 80 for 8.0. It can be an
// older one than the device's, with other shapes of tiles.
cudaError_t compiled_arch(int* arch);

// The reduction of triplet losses, fused into the end of the search; `loss` null: not wanted.
struct TripletArgs {
  float* loss;    // 0-d
  float* slope;   // [2, n]
  float* scale;   // 0-d
  double* sums;   // [grid of the finish]: partial sums
  int64_t* kept;  // likewise: how many anchors they count
  uint32_t* counter;
  TripletRule<float> rule;
};

struct HardestArgs {
  PairProblem problem;
  TileOrder order;
  bool resident;
  bool exact;
  uint64_t* keys;       // [2, padded x]: positives, negatives; not used by owners
  const uint32_t* bad;  // what prepare found
  int32_t bad_count;
  int64_t* index;   // [2, n]
  float* distance;  // [2, n]
  TripletArgs triplet;
};
cudaError_t hardest(const HardestArgs& args, const HardestPlan& plan, int planes,
                    cudaStream_t stream);
// For plans without owners: turns keys into results.
cudaError_t hardest_finish(const HardestArgs& args, int grid, cudaStream_t stream);

}  // namespace flashmetric::cuda
