// SPDX-License-Identifier: Apache-2.0
// From tensors to what the tile engine reads.
#pragma once

#include <cuda_ops.h>
#include <flashmetric/cuda_kernels.h>

namespace flashmetric::cuda {

// Half-precision planes for rows of this dtype: 16-bit rows fit one (bfloat16 thanks to the
// prescale); float32 takes two to keep its accuracy, or one where
// torch.set_float32_matmul_precision allows less.
int plane_count(const Tensor& query);

// Whether the tile engine serves rows of this dtype here; `fits` is the plan's.
bool use_tiles(const Tensor& query, bool fits);

// Positives are of one class, and classes are numbers.
constexpr Labelling kOneWord{Rule::kEqual, 1, {GroupRule::kAny, GroupRule::kAny}};

// A batch whose preparation is under way on the current stream. Holds all that the kernels read.
class PreparedBatch {
 public:
  // `with_keys`: for hardest. `extra`: bytes of scratch besides.
  PreparedBatch(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
                const OptionalTensor& ref_labels, const Labelling& labelling, Distance distance,
                int planes, bool with_keys, int64_t extra = 0);

  PairProblem problem;
  const uint32_t* bad = nullptr;
  int32_t bad_count = 0;
  uint64_t* keys = nullptr;
  uint32_t* counter = nullptr;
  char* extra = nullptr;
  cudaStream_t stream;

 private:
  Tensor query_, query_labels_, ref_, ref_labels_;
  Workspace workspace_;
};

}  // namespace flashmetric::cuda
