// SPDX-License-Identifier: Apache-2.0
// Arguments and launchers of row_sum and row_lse on the slab engine: what reduces the distances of
// a slab of rows, of positives and negatives at once, and what weighs them for a gradient. One
// block a row.
#pragma once

#include <flashmetric/cuda_rows.h>
#include <flashmetric/cuda_select.h>

namespace flashmetric::cuda {

// What they have in common.
template <class T>
struct SlabRowPairs {
  SlabProblem problem;
  Labelling labelling;
  PairForm<T> form;
  // By the row of the slab and by the reference; in launches for gradients of references those are
  // the op's references and queries.
  PairRole<T> own, other;
};

template <class T>
struct SlabRowSumArgs {
  SlabRowPairs<T> pairs;
  const T* slab;    // [rows, m], from slab_distance with kBothKinds
  T* sums;          // [2, n]
  int64_t* counts;  // [4, n]: kept and active
  T* slopes;        // [4, n]: derivatives of the sums in offset and in scale
};
template <class T>
cudaError_t slab_row_sum(const SlabRowSumArgs<T>& args, int64_t rows, cudaStream_t stream);

template <class T>
struct SlabRowLseArgs {
  SlabRowPairs<T> pairs;  // a form of kNone: kind not wanted; any other term
  const T* slab;          // as above
  T* lse;                 // [2, n]
  T* mean;                // [2, n]
  int64_t* counts;        // [2, n]
};
template <class T>
cudaError_t slab_row_lse(const SlabRowLseArgs<T>& args, int64_t rows, cudaStream_t stream);

// Weights h = factor * slope * (derivative in d of what either row brings to the objective).
template <class T>
struct SlabRowWeighArgs {
  SlabRowPairs<T> pairs;
  bool logits;            // the objective is one of log-sum-exps
  bool wanted[2];         // kinds; other pairs have weight 0
  T* slab;                // [rows, m]: distances in, h of near pairs of the wanted kinds out
  const uint32_t* near;   // of slab_distance; null: no distance has near pairs
  uint32_t* near_wanted;  // those of the wanted kinds
  T* weight;              // [rows, m]: h of the other pairs
  double* total;          // [rows]: their sum
};
template <class T>
cudaError_t slab_row_weigh(const SlabRowWeighArgs<T>& args, int64_t rows, cudaStream_t stream);

}  // namespace flashmetric::cuda
