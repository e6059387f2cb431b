// SPDX-License-Identifier: Apache-2.0
// row_sum on CUDA. On tiles one launch prepares, one computes, and one more, with the roles of the
// sides exchanged, where the gradient of separate references is wanted.
#include <row_passes.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

PairForm<double> term_form(const std::string& positive, const std::string& negative) {
  return {{parse_term(positive), parse_term(negative)}, {false, false}, 0.0};
}

void check_grad(const Tensor& grad, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == 2 && grad.size(1) == query.size(0), name,
                  ": shape [2, ", query.size(0), "] expected");
  check_device(grad, query, name);
}

using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Passes>
Sums sum_rows(const Passes& passes, const Tensor& query, const OptionalTensor& ref, bool with_grad,
              bool ref_grad) {
  using T = typename Passes::Value;
  const int64_t n = query.size(0), d = query.size(1);
  const bool refs_too = with_grad && ref_grad && ref.has_value();
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(query, shape, type);
  };
  Tensor sums = empty({2, n}, scalar_type<T>()), counts = empty({4, n}, ScalarType::Long),
         slopes = empty({4, n}, scalar_type<T>()),
         grad_query = empty({2, with_grad ? n : 0, d}, scalar_type<T>()),
         grad_ref = empty({2, refs_too ? ref->size(0) : 0, d}, scalar_type<T>());
  passes.sums(mutable_data<T>(sums), mutable_data<int64_t>(counts), mutable_data<T>(slopes),
              with_grad ? mutable_data<T>(grad_query) : nullptr);
  if (refs_too) passes.ref_totals(mutable_data<T>(grad_ref));
  return {sums, counts, slopes, grad_query, grad_ref};
}

template <class Passes>
std::tuple<Tensor, Tensor> weighted_gradient(const Passes& passes, const Tensor& grad,
                                             const Tensor& query, const OptionalTensor& ref,
                                             bool ref_grad) {
  using T = typename Passes::Value;
  const int64_t n = query.size(0), d = query.size(1);
  const bool refs_too = ref_grad && ref.has_value();
  const Tensor weight = rows_as<T>(grad);
  Tensor grad_query = torch::stable::new_empty(query, {n, d});
  Tensor grad_refs = torch::stable::new_empty(query, {refs_too ? ref->size(0) : 0, d});
  const RowObjective<T> of_query{data<T>(weight), nullptr};
  passes.gradient(of_query, {}, false, grad_query.mutable_data_ptr());
  if (refs_too) passes.ref_gradient(of_query, {}, false, grad_refs.mutable_data_ptr());
  return {grad_query, grad_refs};
}

Sums row_sum_cuda(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                  const OptionalTensor& ref_labels, const std::string& rule,
                  const std::string& distance, const std::string& positive,
                  const std::string& negative, const Tensor& scale, const Tensor& offset,
                  const OptionalTensor& bound, bool with_grad, bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  const DeviceGuard guard(query.get_device_index());
  return with_row_passes(
      query, labels, ref, ref_labels, rule, distance, term_form(positive, negative), scale, offset,
      bound,
      [&](const auto& passes, bool) { return sum_rows(passes, query, ref, with_grad, ref_grad); });
}

std::tuple<Tensor, Tensor> row_sum_backward_cuda(
    const Tensor& grad, const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& positive, const std::string& negative, const Tensor& scale,
    const Tensor& offset, const OptionalTensor& bound, bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  check_grad(grad, query, "grad");
  const DeviceGuard guard(query.get_device_index());
  return with_row_passes(query, labels, ref, ref_labels, rule, distance,
                         term_form(positive, negative), scale, offset, bound,
                         [&](const auto& passes, bool) {
                           return weighted_gradient(passes, grad, query, ref, ref_grad);
                         });
}

}  // namespace
}  // namespace flashmetric::cuda

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("row_sum", TORCH_BOX(&flashmetric::cuda::row_sum_cuda));
  m.impl("row_sum_backward", TORCH_BOX(&flashmetric::cuda::row_sum_backward_cuda));
}
