// SPDX-License-Identifier: Apache-2.0
// row_sum and row_lse by the slab engine, and the choice between the engines.
#pragma once

#include <distance_slab.h>
#include <flashmetric/cuda_slab_rows.h>
#include <row_args.h>

namespace flashmetric::cuda {

// What RowPasses is for the tile engine, for T the accumulate type. Per slab of rows a product, its
// distances, and their reduction; for a gradient their weights and a product of those with the
// other rows.
template <class T>
class SlabRowPasses {
 public:
  using Value = T;
  using Objective = RowObjective<T>;

  SlabRowPasses(const DistanceSlabs& slabs, const RowTerms<T>& terms, Scalar rows)
      : slabs_(slabs), terms_(terms), rows_(rows) {}

  void sums(T* sums, int64_t* counts, T* slopes, T* grad) const {
    SlabRowSumArgs<T> args{pairs(), nullptr, sums, counts, slopes};
    args.pairs.own = terms_.role(slabs_.batch().n(), nullptr, nullptr);
    const auto reduce = [&](const void* slab, int64_t begin, int64_t rows) {
      args.pairs.problem = slabs_.batch().problem(begin, false);
      args.slab = static_cast<const T*>(slab);
      check_launch(slab_row_sum(args, rows, slabs_.batch().stream), "slab_row_sum");
    };
    if (grad == nullptr) {
      slabs_.for_each_query([&](const DistanceRows& distances, int64_t rows) {
        reduce(distances.slab, distances.begin, rows);
      });
      return;
    }
    const SlabGradients gradients(slabs_, false);
    SlabRowWeighArgs<T> weigh = weights(gradients, false);
    weigh.pairs.own = args.pairs.own;
    weigh.pairs.other = weigh.pairs.own;
    weigh.pairs.other.on = slabs_.batch().self;
    gradients.for_each([&](int64_t begin, int64_t rows) {
      reduce(gradients.slab.const_data_ptr(), begin, rows);
      write_totals(gradients, weigh, begin, rows, slabs_.batch().n(), grad);
    });
  }

  void ref_totals(T* grad) const {
    const SlabGradients gradients(slabs_, true);
    SlabRowWeighArgs<T> weigh = weights(gradients, false);
    weigh.pairs.other = terms_.role(slabs_.batch().n(), nullptr, nullptr);
    gradients.for_each([&](int64_t begin, int64_t rows) {
      write_totals(gradients, weigh, begin, rows, slabs_.batch().m(), grad);
    });
  }

  void gradient(const Objective& of_query, const Objective& of_ref, bool logits, void* grad) const {
    const SlabGradients gradients(slabs_, false);
    SlabRowWeighArgs<T> weigh = weights(gradients, logits);
    weigh.pairs.own = role(slabs_.batch().n(), of_query);
    if (slabs_.batch().self) {
      weigh.pairs.other = weigh.pairs.own;
    } else if (of_ref.weight != nullptr) {
      weigh.pairs.other = role(slabs_.batch().m(), of_ref);
    }
    write_gradient(gradients, weigh, grad);
  }

  void ref_gradient(const Objective& of_query, const Objective& of_ref, bool logits,
                    void* grad) const {
    const SlabGradients gradients(slabs_, true);
    SlabRowWeighArgs<T> weigh = weights(gradients, logits);
    if (of_ref.weight != nullptr) weigh.pairs.own = role(slabs_.batch().m(), of_ref);
    weigh.pairs.other = role(slabs_.batch().n(), of_query);
    write_gradient(gradients, weigh, grad);
  }

  void lse(T* lse, T* mean, int64_t* counts) const { find_lse(false, lse, mean, counts); }
  void ref_lse(T* lse, T* mean, int64_t* counts) const { find_lse(true, lse, mean, counts); }

 private:
  // Both roles off.
  SlabRowPairs<T> pairs() const {
    SlabRowPairs<T> pairs{};
    pairs.labelling = slabs_.labelling();
    pairs.form = terms_.form;
    return pairs;
  }
  PairRole<T> role(int64_t rows, const Objective& objective) const {
    return terms_.role(rows, objective.weight, objective.lse);
  }
  SlabRowWeighArgs<T> weights(const SlabGradients& gradients, bool logits) const {
    return {pairs(),
            logits,
            {true, true},
            mutable_data<T>(gradients.slab),
            gradients.near,
            gradients.near_wanted,
            mutable_data<T>(gradients.weight),
            gradients.total};
  }

  void launch(const SlabGradients& gradients, SlabRowWeighArgs<T>& weigh, int64_t begin,
              int64_t rows, void* grad, Scalar scalar) const {
    weigh.pairs.problem = gradients.problem(begin);
    check_launch(slab_row_weigh(weigh, rows, slabs_.batch().stream), "slab_row_weigh");
    gradients.finish(begin, rows, gradients.near_wanted, grad, scalar);
  }
  // One gradient [n, d] for positives and one for negatives.
  void write_totals(const SlabGradients& gradients, SlabRowWeighArgs<T>& weigh, int64_t begin,
                    int64_t rows, int64_t n, T* grad) const {
    constexpr Scalar kScalar = sizeof(T) == sizeof(double) ? Scalar::kDouble : Scalar::kFloat;
    for (int kind = 0; kind < 2; ++kind) {
      weigh.wanted[kind] = true;
      weigh.wanted[1 - kind] = false;
      launch(gradients, weigh, begin, rows, grad + kind * n * slabs_.batch().d(), kScalar);
    }
  }
  void write_gradient(const SlabGradients& gradients, SlabRowWeighArgs<T>& weigh,
                      void* grad) const {
    gradients.for_each(
        [&](int64_t begin, int64_t rows) { launch(gradients, weigh, begin, rows, grad, rows_); });
  }

  void find_lse(bool of_refs, T* lse, T* mean, int64_t* counts) const {
    const SlabBatch& batch = slabs_.batch();
    SlabRowLseArgs<T> args{pairs(), nullptr, lse, mean, counts};
    args.pairs.own = terms_.role(slabs_.rows(of_refs), nullptr, nullptr);
    slabs_.for_each_row(of_refs, [&](const DistanceRows& distances, int64_t rows) {
      args.pairs.problem = batch.problem(distances.begin, of_refs);
      args.slab = static_cast<const T*>(distances.slab);
      check_launch(slab_row_lse(args, rows, batch.stream), "slab_row_lse");
    });
  }

  const DistanceSlabs& slabs_;
  const RowTerms<T>& terms_;
  const Scalar rows_;  // dtype of the rows
};

// Calls f(passes, whether both rows of a pair see the same) with what serves such rows and
// distances here: RowPasses, or SlabRowPasses of the accumulate type.
template <class F>
auto with_row_passes(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                     const OptionalTensor& ref_labels, const std::string& rule,
                     const std::string& distance, const PairForm<double>& form, const Tensor& scale,
                     const Tensor& offset, const OptionalTensor& bound, F&& f) {
  const Distance which = parse_distance(distance);
  const int planes = plane_count(query);
  if (tiles_serve_rows(query, which, planes)) {
    const auto terms = RowTerms<float>::of(form, scale, offset, bound, query);
    const RowPasses passes(query, labels, ref, ref_labels, labelling_of(rule, labels), which, terms,
                           planes);
    return f(passes, terms.symmetric());
  }
  const DistanceSlabs slabs(query, labels, ref, ref_labels, rule, distance, kBothKinds);
  return with_accumulate_type(query, [&](auto zero) {
    using T = decltype(zero);
    const auto terms = RowTerms<T>::of(form, scale, offset, bound, query);
    return f(SlabRowPasses<T>(slabs, terms, scalar_of(query)), terms.symmetric());
  });
}

}  // namespace flashmetric::cuda
