// SPDX-License-Identifier: Apache-2.0
// row_sum and pair_sum, which is a row sum with margins, on CUDA: one launch prepares, one
// computes, and one more, with the roles of the sides exchanged, where the gradient of separate
// references is wanted.
#include <flashmetric/cuda_slab.h>
#include <plain.h>
#include <row_args.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

PairForm term_form(const std::string& positive, const std::string& negative) {
  return {{parse_term(positive), parse_term(negative)}, {false, false}, 0.0f};
}

void check_grad(const Tensor& grad, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == 2 && grad.size(1) == query.size(0), name,
                  ": shape [2, ", query.size(0), "] expected");
  check_device(grad, query, name);
}

struct Sums {
  Tensor sums, counts, slopes, grad_query, grad_ref;
};

Sums sum_rows(const RowPasses& passes, const Tensor& query, const OptionalTensor& ref,
              bool with_slopes, bool with_grad, bool ref_grad) {
  const int64_t n = query.size(0), d = query.size(1);
  const bool refs_too = with_grad && ref_grad && ref.has_value();
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(query, shape, type);
  };
  Sums out{empty({2, n}, ScalarType::Float), empty({4, n}, ScalarType::Long),
           empty({with_slopes ? 4 : 0, n}, ScalarType::Float),
           empty({2, with_grad ? n : 0, d}, ScalarType::Float),
           empty({2, refs_too ? ref->size(0) : 0, d}, ScalarType::Float)};
  passes.sums(mutable_data<float>(out.sums), mutable_data<int64_t>(out.counts),
              with_slopes ? mutable_data<float>(out.slopes) : nullptr,
              with_grad ? mutable_data<float>(out.grad_query) : nullptr);
  if (refs_too) passes.ref_totals(mutable_data<float>(out.grad_ref));
  return out;
}

std::tuple<Tensor, Tensor> weighted_gradient(const RowPasses& passes, const Tensor& grad,
                                             const Tensor& query, const OptionalTensor& ref,
                                             bool ref_grad) {
  const int64_t n = query.size(0), d = query.size(1);
  const bool refs_too = ref_grad && ref.has_value();
  const Tensor weight = rows_as<float>(grad);
  Tensor grad_query = torch::stable::new_empty(query, {n, d});
  Tensor grad_refs = torch::stable::new_empty(query, {refs_too ? ref->size(0) : 0, d});
  const RowPasses::Objective of_query{data<float>(weight), nullptr};
  passes.gradient(of_query, {}, false, grad_query.mutable_data_ptr());
  if (refs_too) passes.ref_gradient(of_query, {}, false, grad_refs.mutable_data_ptr());
  return {grad_query, grad_refs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_sum_cuda(
    const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& positive, const std::string& negative, const Tensor& scale,
    const Tensor& offset, const OptionalTensor& bound, bool with_grad, bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  const DeviceGuard guard(query.get_device_index());
  const Distance which = parse_distance(distance);
  const int planes = plane_count(query);
  if (!tiles_serve_rows(query, which, planes))
    return call_plain<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>>(
        "row_sum", query, labels, ref, ref_labels, rule, distance, positive, negative, scale,
        offset, bound, with_grad, ref_grad);
  const RowTerms terms = RowTerms::of(term_form(positive, negative), scale, offset, bound, query);
  const RowPasses passes(query, labels, ref, ref_labels, labelling_of(rule, labels), which, terms,
                         planes);
  const Sums out = sum_rows(passes, query, ref, true, with_grad, ref_grad);
  return {out.sums, out.counts, out.slopes, out.grad_query, out.grad_ref};
}

std::tuple<Tensor, Tensor> row_sum_backward_cuda(
    const Tensor& grad, const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& positive, const std::string& negative, const Tensor& scale,
    const Tensor& offset, const OptionalTensor& bound, bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  check_grad(grad, query, "grad");
  const DeviceGuard guard(query.get_device_index());
  const Distance which = parse_distance(distance);
  const int planes = plane_count(query);
  if (!tiles_serve_rows(query, which, planes))
    return call_plain<std::tuple<Tensor, Tensor>>("row_sum_backward", grad, query, labels, ref,
                                                  ref_labels, rule, distance, positive, negative,
                                                  scale, offset, bound, ref_grad);
  const RowTerms terms = RowTerms::of(term_form(positive, negative), scale, offset, bound, query);
  const RowPasses passes(query, labels, ref, ref_labels, labelling_of(rule, labels), which, terms,
                         planes);
  return weighted_gradient(passes, grad, query, ref, ref_grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_sum_cuda(
    const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& distance, const std::string& formula,
    double pos_margin, double neg_margin, bool with_grad, bool ref_grad) {
  check_batch(query, query_labels, ref, ref_labels);
  const DeviceGuard guard(query.get_device_index());
  const PairSumRule rule{parse_distance(distance), parse_formula(formula), pos_margin, neg_margin};
  const int planes = plane_count(query);
  if (!tiles_serve_rows(query, rule.distance, planes))
    return slab_pair_sum(query, query_labels, ref, ref_labels, rule, with_grad, ref_grad);
  const RowTerms terms = RowTerms::of_margins(rule.formula, pos_margin, neg_margin);
  const RowPasses passes(query, query_labels, ref, ref_labels, kOneWord, rule.distance, terms,
                         planes);
  const Sums out = sum_rows(passes, query, ref, false, with_grad, ref_grad);
  return {out.sums, out.counts, out.grad_query, out.grad_ref};
}

std::tuple<Tensor, Tensor> pair_sum_backward_cuda(
    const Tensor& grad_sums, const Tensor& query, const Tensor& query_labels,
    const OptionalTensor& ref, const OptionalTensor& ref_labels, const std::string& distance,
    const std::string& formula, double pos_margin, double neg_margin, bool ref_grad) {
  check_batch(query, query_labels, ref, ref_labels);
  check_grad(grad_sums, query, "grad_sums");
  const DeviceGuard guard(query.get_device_index());
  const PairSumRule rule{parse_distance(distance), parse_formula(formula), pos_margin, neg_margin};
  const int planes = plane_count(query);
  if (!tiles_serve_rows(query, rule.distance, planes))
    return slab_pair_sum_backward(grad_sums, query, query_labels, ref, ref_labels, rule, ref_grad);
  const RowTerms terms = RowTerms::of_margins(rule.formula, pos_margin, neg_margin);
  const RowPasses passes(query, query_labels, ref, ref_labels, kOneWord, rule.distance, terms,
                         planes);
  return weighted_gradient(passes, grad_sums, query, ref, ref_grad);
}

}  // namespace
}  // namespace flashmetric::cuda

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("row_sum", TORCH_BOX(&flashmetric::cuda::row_sum_cuda));
  m.impl("row_sum_backward", TORCH_BOX(&flashmetric::cuda::row_sum_backward_cuda));
  m.impl("pair_sum", TORCH_BOX(&flashmetric::cuda::pair_sum_cuda));
  m.impl("pair_sum_backward", TORCH_BOX(&flashmetric::cuda::pair_sum_backward_cuda));
}
