// SPDX-License-Identifier: Apache-2.0
// pair_sum and its gradient on CUDA: one launch prepares, one computes, and one more, with the
// roles of the sides exchanged, where the gradient of separate references is wanted.
#include <flashmetric/cuda_slab.h>
#include <prepared.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

namespace flashmetric::cuda {
namespace {

class PairSums {
 public:
  PairSums(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
           const OptionalTensor& ref_labels, const PairSumRule& rule, int planes)
      : planes_(planes),
        limits_(device_limits(query)),
        batch_(query, query_labels, ref, ref_labels, rule.distance, planes, false) {
    args_.problem = batch_.problem;
    args_.formula = rule.formula;
    args_.margin[0] = static_cast<float>(rule.pos_margin);
    args_.margin[1] = static_cast<float>(rule.neg_margin);
    args_.bad = batch_.bad;
    args_.bad_count = batch_.bad_count;
  }

  // Sums, counts and gradients (null: not wanted) of the query rows.
  void query_rows(const float* weight, float* sums, int64_t* counts, float* grad, void* grad_sum) {
    PairSumArgs args = args_;
    args.weight = weight;
    args.sums = sums;
    args.counts = counts;
    launch(args, grad, grad_sum);
  }

  // Gradients of the references, which are the rows now.
  void ref_rows(const float* weight, float* grad, void* grad_sum) {
    PairSumArgs args = args_;
    std::swap(args.problem.query, args.problem.ref);
    std::swap(args.problem.x, args.problem.r);
    args.weight = weight;
    args.weight_by_ref = true;
    launch(args, grad, grad_sum);
  }

 private:
  void launch(PairSumArgs& args, float* grad, void* grad_sum) {
    if (args.problem.query.n == 0) return;
    args.grad = grad;
    args.grad_sum = grad_sum;
    const bool with_grad = grad != nullptr || grad_sum != nullptr;
    const TilePlan plan =
        plan_pair_sum(planes_, args.problem.query.n, args.problem.d, with_grad, limits_);
    args.resident = plan.resident;
    check_launch(pair_sum(args, plan, planes_, batch_.stream), "pair_sum");
  }

  const int planes_;
  const DeviceLimits& limits_;
  const PreparedBatch batch_;
  PairSumArgs args_{};
};

bool tiles_serve(const Tensor& query, int planes) {
  return use_tiles(
      query, plan_pair_sum(planes, query.size(0), query.size(1), true, device_limits(query)).fits);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_sum_cuda(
    const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& distance, const std::string& formula,
    double pos_margin, double neg_margin, bool with_grad, bool with_ref_grad) {
  check_batch(query, query_labels, ref, ref_labels);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const PairSumRule rule{parse_distance(distance), parse_formula(formula), pos_margin, neg_margin};
  const int planes = plane_count(query);
  if (!tiles_serve(query, planes))
    return slab_pair_sum(query, query_labels, ref, ref_labels, rule, with_grad, with_ref_grad);

  const int64_t n = query.size(0), d = query.size(1);
  const bool refs_too = with_grad && with_ref_grad && ref.has_value();
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(query, shape, type);
  };
  Tensor sums = empty({2, n}, ScalarType::Float), counts = empty({4, n}, ScalarType::Long);
  Tensor grad_query = empty({2, with_grad ? n : 0, d}, ScalarType::Float);
  Tensor grad_ref = empty({2, refs_too ? ref->size(0) : 0, d}, ScalarType::Float);
  PairSums pairs(query, query_labels, ref, ref_labels, rule, planes);
  pairs.query_rows(nullptr, mutable_data<float>(sums), mutable_data<int64_t>(counts),
                   with_grad ? mutable_data<float>(grad_query) : nullptr, nullptr);
  if (refs_too) pairs.ref_rows(nullptr, mutable_data<float>(grad_ref), nullptr);
  return {sums, counts, grad_query, grad_ref};
}

std::tuple<Tensor, Tensor> pair_sum_backward_cuda(
    const Tensor& grad_sums, const Tensor& query, const Tensor& query_labels,
    const OptionalTensor& ref, const OptionalTensor& ref_labels, const std::string& distance,
    const std::string& formula, double pos_margin, double neg_margin, bool with_ref_grad) {
  check_batch(query, query_labels, ref, ref_labels);
  const int64_t n = query.size(0), d = query.size(1);
  STD_TORCH_CHECK(grad_sums.dim() == 2 && grad_sums.size(0) == 2 && grad_sums.size(1) == n,
                  "grad_sums: shape [2, ", n, "] expected");
  check_device(grad_sums, query, "grad_sums");
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const PairSumRule rule{parse_distance(distance), parse_formula(formula), pos_margin, neg_margin};
  const int planes = plane_count(query);
  if (!tiles_serve(query, planes))
    return slab_pair_sum_backward(grad_sums, query, query_labels, ref, ref_labels, rule,
                                  with_ref_grad);

  const bool refs_too = with_ref_grad && ref.has_value();
  const Tensor weight = rows_as<float>(grad_sums);
  Tensor grad_query = torch::stable::new_empty(query, {n, d});
  Tensor grad_ref = torch::stable::new_empty(query, {refs_too ? ref->size(0) : 0, d});
  PairSums pairs(query, query_labels, ref, ref_labels, rule, planes);
  pairs.query_rows(data<float>(weight), nullptr, nullptr, nullptr, grad_query.mutable_data_ptr());
  if (refs_too) pairs.ref_rows(data<float>(weight), nullptr, grad_ref.mutable_data_ptr());
  return {grad_query, grad_ref};
}

}  // namespace
}  // namespace flashmetric::cuda

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("pair_sum", TORCH_BOX(&flashmetric::cuda::pair_sum_cuda));
  m.impl("pair_sum_backward", TORCH_BOX(&flashmetric::cuda::pair_sum_backward_cuda));
}
