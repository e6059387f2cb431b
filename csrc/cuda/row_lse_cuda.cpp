// SPDX-License-Identifier: Apache-2.0
// row_lse on CUDA. On tiles one launch prepares, one computes, and one more, with the roles of the
// sides exchanged, for the log-sum-exps, or the gradient, of separate references.
#include <row_passes.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

PairForm<double> logit_form(const std::string& positive, const std::string& negative,
                            double shape) {
  PairForm<double> form{};
  for (int kind = 0; kind < 2; ++kind) {
    const std::string& name = kind == 0 ? positive : negative;
    const bool wanted = name == "affine" || name == "circle";
    STD_TORCH_CHECK(wanted || name == "none", "logit: 'none', 'affine' or 'circle' expected, got '",
                    name, "'");
    form.term[kind] = wanted ? Term::kLinear : Term::kNone;
    form.circle[kind] = name == "circle";
  }
  form.shape = shape;
  return form;
}

// Log-sum-exps, means and counts of one side.
struct Statistics {
  Tensor lse, mean, counts;

  Statistics(const Tensor& query, int64_t rows, ScalarType type)
      : lse(torch::stable::new_empty(query, {2, rows}, type)),
        mean(torch::stable::new_empty(query, {2, rows}, type)),
        counts(torch::stable::new_empty(query, {2, rows}, ScalarType::Long)) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_lse_cuda(
    const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& positive, const std::string& negative, const Tensor& scale,
    const Tensor& offset, const OptionalTensor& bound, double shape, bool columns) {
  check_pairs(query, labels, ref, ref_labels, rule);
  const DeviceGuard guard(query.get_device_index());
  return with_row_passes(
      query, labels, ref, ref_labels, rule, distance, logit_form(positive, negative, shape), scale,
      offset, bound, [&](const auto& passes, bool symmetric) {
        STD_TORCH_CHECK(!columns || (ref.has_value() && symmetric),
                        "columns: references of their own, uniform terms and no bound expected");
        using T = typename std::decay_t<decltype(passes)>::Value;
        const Statistics of_rows(query, query.size(0), scalar_type<T>());
        const Statistics of_refs(query, columns ? ref->size(0) : 0, scalar_type<T>());
        passes.lse(mutable_data<T>(of_rows.lse), mutable_data<T>(of_rows.mean),
                   mutable_data<int64_t>(of_rows.counts));
        if (columns)
          passes.ref_lse(mutable_data<T>(of_refs.lse), mutable_data<T>(of_refs.mean),
                         mutable_data<int64_t>(of_refs.counts));
        return std::make_tuple(of_rows.lse, of_rows.mean, of_rows.counts, of_refs.lse, of_refs.mean,
                               of_refs.counts);
      });
}

// Weights or log-sum-exps of `rows` rows in the accumulate type.
template <class T>
Tensor statistics_of(const Tensor& tensor, int64_t rows, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == 2 && tensor.size(1) == rows, name,
                  ": shape [2, ", rows, "] expected");
  check_device(tensor, query, name);
  return rows_as<T>(tensor);
}

std::tuple<Tensor, Tensor> row_lse_backward_cuda(
    const Tensor& grad, const Tensor& lse, const OptionalTensor& ref_grad_lse,
    const OptionalTensor& ref_lse, const Tensor& query, const Tensor& labels,
    const OptionalTensor& ref, const OptionalTensor& ref_labels, const std::string& rule,
    const std::string& distance, const std::string& positive, const std::string& negative,
    const Tensor& scale, const Tensor& offset, const OptionalTensor& bound, double shape,
    bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  STD_TORCH_CHECK(ref_grad_lse.has_value() == ref_lse.has_value(),
                  "ref_grad_lse and ref_lse: both or neither expected");
  const DeviceGuard guard(query.get_device_index());
  return with_row_passes(
      query, labels, ref, ref_labels, rule, distance, logit_form(positive, negative, shape), scale,
      offset, bound, [&](const auto& passes, bool symmetric) -> std::tuple<Tensor, Tensor> {
        using T = typename std::decay_t<decltype(passes)>::Value;
        const int64_t n = query.size(0), d = query.size(1);
        const Tensor weight = statistics_of<T>(grad, n, query, "grad");
        const Tensor level = statistics_of<T>(lse, n, query, "lse");
        const RowObjective<T> of_query{data<T>(weight), data<T>(level)};
        Tensor ref_weight, ref_level;
        RowObjective<T> of_ref{};
        if (ref_lse.has_value()) {
          STD_TORCH_CHECK(ref.has_value() && symmetric,
                          "ref_lse: references of their own, uniform terms and no bound expected");
          ref_weight = statistics_of<T>(*ref_grad_lse, ref->size(0), query, "ref_grad_lse");
          ref_level = statistics_of<T>(*ref_lse, ref->size(0), query, "ref_lse");
          of_ref = {data<T>(ref_weight), data<T>(ref_level)};
        }
        const bool refs_too = ref_grad && ref.has_value();
        Tensor grad_query = torch::stable::new_empty(query, {n, d});
        Tensor grad_refs = torch::stable::new_empty(query, {refs_too ? ref->size(0) : 0, d});
        passes.gradient(of_query, of_ref, true, grad_query.mutable_data_ptr());
        if (refs_too) passes.ref_gradient(of_query, of_ref, true, grad_refs.mutable_data_ptr());
        return {grad_query, grad_refs};
      });
}

}  // namespace
}  // namespace flashmetric::cuda

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("row_lse", TORCH_BOX(&flashmetric::cuda::row_lse_cuda));
  m.impl("row_lse_backward", TORCH_BOX(&flashmetric::cuda::row_lse_backward_cuda));
}
