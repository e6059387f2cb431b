// SPDX-License-Identifier: Apache-2.0
// The arguments of row_sum and row_lse on CUDA, from tensors to what the kernels read.
#pragma once

#include <flashmetric/cuda_rows.h>
#include <pair_batch.h>
#include <prepared.h>

#include <utility>

namespace flashmetric::cuda {

Labelling labelling_of(const std::string& rule, const Tensor& labels);

// What all pairs of a batch have in common: the function of the distance. T is the accumulate type.
template <class T>
struct RowTerms {
  PairForm<T> form;
  RowParameter<T> scale, offset;
  Tensor scale_rows, offset_rows;  // what those point to
  OptionalTensor bound;

  // Shapes are checked; n: rows of the query.
  static RowTerms of(const PairForm<double>& form, const Tensor& scale, const Tensor& offset,
                     const OptionalTensor& bound, const Tensor& query);
  // Whether both rows of a pair see the same.
  bool symmetric() const {
    return scale.row_stride == 0 && offset.row_stride == 0 && !bound.has_value();
  }
  // As the rows see it that the parameters are of.
  PairRole<T> role(int64_t rows, const T* weight, const T* lse) const;
};

// Weights and log-sum-exps [2, rows] of the rows of either side in an objective; null: not in it.
template <class T>
struct RowObjective {
  const T* weight;
  const T* lse;
};

// The launches of one op on one batch, by the tile engine.
class RowPasses {
 public:
  using Value = float;
  using Objective = RowObjective<float>;

  RowPasses(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
            const OptionalTensor& ref_labels, const Labelling& labelling, Distance distance,
            const RowTerms<float>& terms, int planes);

  bool self() const { return batch_.problem.self; }

  // Statistics of the query rows, and (not null) the gradient of their totals.
  void sums(float* sums, int64_t* counts, float* slopes, float* grad) const;
  // The gradient of the totals in the references.
  void ref_totals(float* grad) const;

  // The gradient of the objective in the query rows, or in the references.
  void gradient(const Objective& of_query, const Objective& of_ref, bool logits, void* grad) const;
  void ref_gradient(const Objective& of_query, const Objective& of_ref, bool logits,
                    void* grad) const;

  // Log-sum-exps of the query rows, or (uniform terms) of the references.
  void lse(float* lse, float* mean, int64_t* counts) const;
  void ref_lse(float* lse, float* mean, int64_t* counts) const;

 private:
  RowSumArgs row_args(bool of_refs, bool logits) const;
  TilePlan plan(int64_t rows, bool with_grad) const;
  void launch_sum(RowSumArgs& args) const;
  void launch_grad(RowSumArgs& args) const;
  void launch_lse(bool of_refs, float* lse, float* mean, int64_t* counts) const;

  const int planes_;
  const DeviceLimits& limits_;
  const PreparedBatch batch_;
  const RowTerms<float>& terms_;
};

// Whether the tile engine serves such rows and distances here.
bool tiles_serve_rows(const Tensor& query, Distance distance, int planes);

}  // namespace flashmetric::cuda
