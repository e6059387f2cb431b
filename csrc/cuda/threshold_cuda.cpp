// SPDX-License-Identifier: Apache-2.0
// threshold_sum and its gradient on CUDA. Forward, per slab of rows: a product, its distances,
// their sums. Backward: a product, its distances, their weights, a product of those with the other
// rows.
#include <distance_slab.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

Term parse_threshold_formula(const std::string& name) {
  const Term term = parse_term(name);
  STD_TORCH_CHECK(term == Term::kHinge || term == Term::kSquaredHinge || term == Term::kSoftplus ||
                      term == Term::kSquaredSigmoid,
                  "formula: 'hinge', 'squared_hinge', 'softplus' or 'squared_sigmoid' expected, "
                  "got '",
                  name, "'");
  return term;
}

// As float64, [n or 1, count].
Tensor checked_thresholds(const Tensor& thresholds, const Tensor& query) {
  const int64_t n = query.size(0);
  STD_TORCH_CHECK(thresholds.dim() == 2 && (thresholds.size(0) == n || thresholds.size(0) == 1),
                  "thresholds: shape [", n, ", K] or [1, K] expected");
  check_device(thresholds, query, "thresholds");
  return in_type(thresholds, ScalarType::Double);
}

std::tuple<Tensor, Tensor, Tensor> threshold_sum_cuda(
    const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& kind, const std::string& formula, const Tensor& thresholds) {
  check_pairs(query, labels, ref, ref_labels, rule);
  const DeviceGuard guard(query.get_device_index());
  const Tensor limits = checked_thresholds(thresholds, query);
  const int64_t n = query.size(0), count = limits.size(1);
  const auto empty = [&](ScalarType type) {
    return torch::stable::new_empty(query, {n, count}, type);
  };
  Tensor sums = empty(ScalarType::Double), counts = empty(ScalarType::Long),
         slopes = empty(ScalarType::Double);
  ThresholdSumArgs args{};
  args.term = parse_threshold_formula(formula);
  args.thresholds = data<double>(limits);
  args.row_stride = limits.size(0) == 1 ? 0 : count;
  args.count = count;
  args.sums = mutable_data<double>(sums);
  args.counts = mutable_data<int64_t>(counts);
  args.slopes = mutable_data<double>(slopes);
  const DistanceSlabs slabs(query, labels, ref, ref_labels, rule, distance, kind_of(kind));
  if (count == 0) return {sums, counts, slopes};
  slabs.for_each_query([&](const DistanceRows& distances, int64_t rows) {
    args.rows = distances;
    const cudaStream_t stream = slabs.batch().stream;
    check_launch(slabs.batch().type == ScalarType::Double
                     ? threshold_sum<double>(args, rows, stream)
                     : threshold_sum<float>(args, rows, stream),
                 "threshold_sum");
  });
  return {sums, counts, slopes};
}

// The gradient of one side's rows. `swapped`: of the references, whose pairs have the thresholds of
// the queries alone.
void write_gradient(const DistanceSlabs& slabs, const ThresholdTable& table, Term term,
                    bool swapped, Tensor& grad) {
  const SlabBatch& batch = slabs.batch();
  const SlabGradients gradients(slabs, swapped);
  gradients.for_each([&](int64_t begin, int64_t rows) {
    const ThresholdWeighArgs args{gradients.problem(begin),
                                  term,
                                  table,
                                  !swapped,
                                  swapped || batch.self,
                                  gradients.slab.mutable_data_ptr(),
                                  gradients.near,
                                  gradients.weight.mutable_data_ptr(),
                                  gradients.total};
    check_launch(batch.type == ScalarType::Double
                     ? threshold_weigh<double>(args, rows, batch.stream)
                     : threshold_weigh<float>(args, rows, batch.stream),
                 "threshold_weigh");
    gradients.finish(begin, rows, gradients.near, grad.mutable_data_ptr(), scalar_of(grad));
  });
}

std::tuple<Tensor, Tensor> threshold_sum_backward_cuda(
    const Tensor& grad, const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& kind, const std::string& formula, const Tensor& thresholds, bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  const DeviceGuard guard(query.get_device_index());
  const Tensor limits = checked_thresholds(thresholds, query);
  const int64_t n = query.size(0), d = query.size(1), count = limits.size(1);
  const int64_t m = ref.has_value() ? ref->size(0) : n;
  const int64_t grad_m = ref_grad && ref.has_value() ? m : 0;
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == n && grad.size(1) == count &&
                      grad.scalar_type() == ScalarType::Double,
                  "grad: float64 of shape [", n, ", ", count, "] expected");
  check_device(grad, query, "grad");
  const Term term = parse_threshold_formula(formula);
  const DistanceSlabs slabs(query, labels, ref, ref_labels, rule, distance, kind_of(kind));
  if (n == 0 || m == 0 || d == 0)
    return {torch::stable::new_zeros(query, {n, d}), torch::stable::new_zeros(query, {grad_m, d})};
  Tensor grad_query = torch::stable::new_empty(query, {n, d});
  Tensor grad_refs = torch::stable::new_empty(query, {grad_m, d});

  const SlabBatch& batch = slabs.batch();
  const Tensor weights = as_contiguous(grad);
  const Tensor limit = batch.empty({count, limits.size(0)}), weight = batch.empty({count, n});
  const ThresholdTable table{limit.const_data_ptr(), weight.const_data_ptr(), limits.size(0), n,
                             count};
  const ThresholdTableArgs args{table, term == Term::kHinge, data<double>(limits),
                                data<double>(weights)};
  check_launch(batch.type == ScalarType::Double
                   ? threshold_table<double>(args, plan_rows(n), batch.stream)
                   : threshold_table<float>(args, plan_rows(n), batch.stream),
               "threshold_table");
  write_gradient(slabs, table, term, false, grad_query);
  if (grad_m > 0) write_gradient(slabs, table, term, true, grad_refs);
  return {grad_query, grad_refs};
}

}  // namespace
}  // namespace flashmetric::cuda

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("threshold_sum", TORCH_BOX(&flashmetric::cuda::threshold_sum_cuda));
  m.impl("threshold_sum_backward", TORCH_BOX(&flashmetric::cuda::threshold_sum_backward_cuda));
}
