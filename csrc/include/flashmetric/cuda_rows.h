// SPDX-License-Identifier: Apache-2.0
// Arguments and launchers of the kernels that reduce the pairs of each row: sums of a function of
// the distance, log-sum-exps, and their gradients. Positives are kind 0, negatives kind 1. T is the
// accumulate type: float on the tile engine.
#pragma once

#include <flashmetric/cuda_kernels.h>

namespace flashmetric::cuda {

// A number per kind and row, or per kind only.
template <class T>
struct RowParameter {
  const T* at;  // null: of a role that is off, `value` of the kind
  int64_t kind_stride;
  int64_t row_stride;  // 0: one number for all rows
  T value[2];

  __host__ __device__ T of(int kind, int64_t row) const {
    return at == nullptr ? value[kind] : at[kind * kind_stride + row * row_stride];
  }
};

// The objective's view of a pair (i, j): z = scale * d + offset, with the numbers of row i or of
// row j. `on`: whether that row's sum is in the objective, so that its gradient counts.
template <class T>
struct PairRole {
  bool on;
  int64_t rows;  // of that side
  RowParameter<T> scale, offset;
  const T* bound;   // [2, rows]: positives count beyond it, negatives below; null: all count
  const T* weight;  // [2, rows]: of each sum in the objective; null: 1
  const T* lse;     // [2, rows]: of log-sum-exps
};

// What becomes of z: a term, or the logit of a log-sum-exp.
template <class T>
struct PairForm {
  Term term[2];
  bool circle[2];  // of logits: max(z + shape, 0) * (z - shape) instead of z
  T shape;
};

struct RowSumArgs {
  PairProblem problem;
  PairForm<float> form;
  // By the query row and by the reference row; in launches for gradients of references those are
  // the op's references and queries. Sums are by the query row.
  PairRole<float> own, other;
  bool symmetric;  // both roles have the same z and the same bounds
  bool logits;     // of row_grad: weights are those of log-sum-exps
  bool resident;
  const uint32_t* bad;
  int32_t bad_count;
  float* sums;      // [2, n]
  int64_t* counts;  // [4, n]: kept and active
  float* slopes;    // [4, n]: derivatives of the sums in offset and in scale
  float* grad;      // [2, n, d], one gradient for positives and one for negatives
  void* grad_sum;   // of row_grad: [n, d], the gradient of both in the dtype of the rows
};
// Sums, and with `grad` the gradient of their totals.
cudaError_t row_sum(const RowSumArgs& args, const TilePlan& plan, int planes, cudaStream_t stream);
// The gradient of weighted sums or log-sum-exps.
cudaError_t row_grad(const RowSumArgs& args, const TilePlan& plan, int planes, cudaStream_t stream);

struct RowLseArgs {
  PairProblem problem;
  PairForm<float> form;  // kNone: kind not wanted; any other term
  PairRole<float> own;
  bool resident;
  const uint32_t* bad;
  int32_t bad_count;
  float* lse;       // [2, n]
  float* mean;      // [2, n]
  int64_t* counts;  // [2, n]
};
cudaError_t row_lse(const RowLseArgs& args, const TilePlan& plan, int planes, cudaStream_t stream);

}  // namespace flashmetric::cuda
