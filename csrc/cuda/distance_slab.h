// SPDX-License-Identifier: Apache-2.0
// The distances of one kind of pair, slab by slab: what threshold_sum, nearest_beyond and row_top_k
// begin with on CUDA.
#pragma once

#include <row_args.h>
#include <row_sweep.h>
#include <slab_batch.h>

namespace flashmetric::cuda {

// The leading arguments of those ops, as they came; the current device is theirs.
class DistanceSlabs {
 public:
  DistanceSlabs(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                const OptionalTensor& ref_labels, const std::string& rule,
                const std::string& distance, const std::string& kind)
      : distance_(parse_distance(distance)),
        labelling_(labelling_of(rule, labels)),
        kind_(parse_kind(kind) ? kPositive : kNegative),
        batch_((check_devices(query, labels, ref, ref_labels), query), labels, ref, ref_labels,
               distance_, Multiply::kLibrary) {}

  const SlabBatch& batch() const { return batch_; }
  Distance distance() const { return distance_; }

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

  // Calls f(rows of distances, number of rows) for all queries.
  template <class F>
  void for_each_query(const F& f) const {
    const int64_t step = slab_rows(false), m = batch_.m();
    const Tensor slab = batch_.empty({step, m});
    for_each_slab(batch_.n(), step, [&](int64_t begin, int64_t rows) {
      find(begin, rows, false, slab, nullptr);
      f(DistanceRows{slab.const_data_ptr(), m, begin, batch_.bad(), batch_.bad_count()}, rows);
    });
  }

 private:
  const Distance distance_;
  const Labelling labelling_;
  const int32_t kind_;
  const SlabBatch batch_;
};

}  // namespace flashmetric::cuda
