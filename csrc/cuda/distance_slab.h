// SPDX-License-Identifier: Apache-2.0
// The distances of a batch, slab by slab: what the ops on all pairs begin with on the slab engine;
// and the gradients that weights of its pairs give.
#pragma once

#include <row_args.h>
#include <row_sweep.h>
#include <slab_batch.h>

namespace flashmetric::cuda {

inline int32_t kind_of(const std::string& kind) { return parse_kind(kind) ? kPositive : kNegative; }

// The leading arguments of those ops, as they came, and the kind of pair, or kBothKinds; the
// current device is theirs.
class DistanceSlabs {
 public:
  DistanceSlabs(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                const OptionalTensor& ref_labels, const std::string& rule,
                const std::string& distance, int32_t kind)
      : distance_(parse_distance(distance)),
        labelling_(labelling_of(rule, labels)),
        kind_(kind),
        batch_((check_devices(query, labels, ref, ref_labels), query), labels, ref, ref_labels,
               distance_, Multiply::kLibrary) {}

  const SlabBatch& batch() const { return batch_; }
  Distance distance() const { return distance_; }
  const Labelling& labelling() const { return labelling_; }

  int64_t rows(bool swapped) const { return swapped ? batch_.m() : batch_.n(); }
  int64_t columns(bool swapped) const { return swapped ? batch_.n() : batch_.m(); }
  int64_t slab_rows(bool swapped) const {
    return plan_slab_rows(rows(swapped), columns(swapped), batch_.d());
  }

  // slab = distances of `rows` rows; `near`, unless null, marks those by exact differences.
  void find(int64_t begin, int64_t rows, bool swapped, const Tensor& slab, uint32_t* near) const {
    batch_.multiply_rows(begin, rows, swapped, slab);
    const SlabDistanceArgs args{batch_.problem(begin, swapped), labelling_, kind_,
                                slab.mutable_data_ptr(), near};
    check_launch(batch_.type == ScalarType::Double
                     ? slab_distance<double>(args, rows, batch_.stream)
                     : slab_distance<float>(args, rows, batch_.stream),
                 "slab_distance");
  }

  // Calls f(rows of distances, number of rows) for all queries, or (`swapped`) references.
  template <class F>
  void for_each_row(bool swapped, const F& f) const {
    const int64_t step = slab_rows(swapped), m = columns(swapped);
    const Tensor slab = batch_.empty({step, m});
    for_each_slab(rows(swapped), step, [&](int64_t begin, int64_t rows) {
      find(begin, rows, swapped, slab, nullptr);
      f(DistanceRows{slab.const_data_ptr(), m, begin, batch_.bad(), batch_.bad_count()}, rows);
    });
  }
  template <class F>
  void for_each_query(const F& f) const {
    for_each_row(false, f);
  }

 private:
  const Distance distance_;
  const Labelling labelling_;
  const int32_t kind_;
  const SlabBatch batch_;
};

// The gradients of one side's rows, in slabs of them. `swapped`: of the references.
class SlabGradients {
 public:
  SlabGradients(const DistanceSlabs& slabs, bool swapped)
      : slabs_(slabs),
        swapped_(swapped),
        step_(slabs.slab_rows(swapped)),
        slab(slabs.batch().empty({step_, slabs.columns(swapped)})),
        weight(slabs.batch().empty({step_, slabs.columns(swapped)})),
        pulled_(slabs.batch().empty({step_, slabs.batch().d()})) {
    const bool differences = is_difference(slabs.distance());
    const int64_t words = differences ? step_ * near_words(slabs.columns(swapped)) : 0;
    const int64_t near_at = space_.take<uint32_t>(words);
    const int64_t wanted_at = space_.take<uint32_t>(words);
    const int64_t total_at = space_.take<double>(step_);
    space_.allocate(slab);
    near = differences ? space_.get<uint32_t>(near_at) : nullptr;
    near_wanted = differences ? space_.get<uint32_t>(wanted_at) : nullptr;
    total = space_.get<double>(total_at);
  }

  // Calls f(begin, rows) for every slab, whose distances are found.
  template <class F>
  void for_each(const F& f) const {
    for_each_slab(slabs_.rows(swapped_), step_, [&](int64_t begin, int64_t rows) {
      slabs_.find(begin, rows, swapped_, slab, near);
      f(begin, rows);
    });
  }
  SlabProblem problem(int64_t begin) const { return slabs_.batch().problem(begin, swapped_); }

  // Writes rows of `grad` [n, d] from the weights: those of the pairs that `marks` has are in slab.
  void finish(int64_t begin, int64_t rows, const uint32_t* marks, void* grad, Scalar scalar) const {
    const SlabBatch& batch = slabs_.batch();
    batch.pull(weight, begin, rows, swapped_, pulled_);
    const SlabGradientArgs args{problem(begin), slab.const_data_ptr(),    marks,
                                total,          pulled_.const_data_ptr(), grad};
    check_launch(slab_gradient(args, scalar, rows, batch.stream), "slab_gradient");
  }

 private:
  const DistanceSlabs& slabs_;
  const bool swapped_;
  const int64_t step_;

 public:
  const Tensor slab, weight;        // [rows of a slab, columns]
  uint32_t* near = nullptr;         // bits of the near pairs; null: no distance has them
  uint32_t* near_wanted = nullptr;  // room for as many
  double* total = nullptr;          // [rows of a slab]: sums of the weights of the other pairs

 private:
  const Tensor pulled_;
  Workspace space_;
};

}  // namespace flashmetric::cuda
