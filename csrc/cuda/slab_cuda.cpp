// SPDX-License-Identifier: Apache-2.0
// The slab engine on the host: the search, and sums of a function of the distance.
#include <flashmetric/cuda_slab.h>
#include <slab_batch.h>

namespace flashmetric::cuda {
namespace {

SlabSumArgs sum_args(const PairSumRule& rule) {
  STD_TORCH_CHECK(!is_direct(rule.distance), "pair_sum: a distance by inner products expected");
  SlabSumArgs args{};
  args.formula = rule.formula;
  args.margin[0] = rule.pos_margin;
  args.margin[1] = rule.neg_margin;
  return args;
}

// The sums of one side of a batch: of its rows against all rows of the other.
class SumPass {
 public:
  // `args`: what does not change from slab to slab.
  SumPass(const SlabBatch& batch, const SlabSumArgs& args, bool swapped, Scalar grad_scalar)
      : batch_(batch), args_(args), swapped_(swapped), grad_scalar_(grad_scalar) {}

  void run() {
    const int64_t n = swapped_ ? batch_.m() : batch_.n(), m = swapped_ ? batch_.n() : batch_.m();
    const int64_t d = batch_.d(), step = plan_slab_rows(n, m, d);
    const bool split = args_.with_grad && !args_.merged;
    const Tensor products = batch_.empty({step, m});
    const Tensor positive = batch_.empty({split ? step : 0, m});
    const int gradients = !args_.with_grad ? 0 : split ? 2 : 1;
    const Tensor pulled = batch_.empty({gradients, step, d});
    Workspace space;
    const int64_t near = space.take<uint32_t>(step * near_words(m));
    const int64_t parts = space.take<SlabPart>(2 * step);
    space.allocate(products);
    args_.products = products.mutable_data_ptr();
    args_.positive = split ? positive.mutable_data_ptr() : nullptr;
    args_.near = space.get<uint32_t>(near);
    args_.parts = space.get<SlabPart>(parts);
    for_each_slab(n, step, [&](int64_t begin, int64_t rows) {
      args_.problem = batch_.problem(begin, swapped_);
      batch_.multiply_rows(begin, rows, swapped_, products);
      check_launch(batch_.type == ScalarType::Double
                       ? slab_weigh<double>(args_, rows, batch_.stream)
                       : slab_weigh<float>(args_, rows, batch_.stream),
                   "slab_weigh");
      for (int k = 0; k < gradients; ++k) {
        const Tensor own = torch::stable::select(pulled, 0, k);
        batch_.pull(split && k == 0 ? positive : products, begin, rows, swapped_, own);
        args_.pulled[k] = own.const_data_ptr();
      }
      check_launch(slab_sum_finish(args_, grad_scalar_, rows, batch_.stream), "slab_sum_finish");
    });
  }

 private:
  const SlabBatch& batch_;
  SlabSumArgs args_;
  const bool swapped_;
  const Scalar grad_scalar_;
};

}  // namespace

std::tuple<Tensor, Tensor> slab_hardest(const Tensor& query, const Tensor& query_labels,
                                        const OptionalTensor& ref, const OptionalTensor& ref_labels,
                                        Distance distance, bool exact, Multiply multiply) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  check_devices(query, query_labels, ref, ref_labels);
  const int64_t n = query.size(0);
  Tensor index = torch::stable::new_empty(query, {2, n}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(query, {2, n}, accumulate_type(query));
  if (n == 0) return std::make_tuple(index, distances);
  const SlabBatch batch(query, query_labels, ref, ref_labels, distance, multiply);
  const int64_t step = exact ? n : plan_slab_rows(n, batch.m(), batch.d());
  const Tensor products = batch.empty({exact ? 0 : step, batch.m()});
  for_each_slab(n, step, [&](int64_t begin, int64_t rows) {
    if (!exact) batch.multiply_rows(begin, rows, false, products);
    const SlabHardestArgs args{batch.problem(begin, false),
                               exact ? nullptr : products.const_data_ptr(),
                               mutable_data<int64_t>(index), distances.mutable_data_ptr()};
    check_launch(batch.type == ScalarType::Double ? slab_hardest<double>(args, rows, batch.stream)
                                                  : slab_hardest<float>(args, rows, batch.stream),
                 "hardest");
  });
  return std::make_tuple(index, distances);
}

std::tuple<Tensor, Tensor, Tensor> triplet_finish(const Tensor& index, const Tensor& distance,
                                                  const TripletRule<double>& rule) {
  const torch::stable::accelerator::DeviceGuard guard(distance.get_device_index());
  const int64_t n = distance.size(1);
  Tensor loss = torch::stable::new_empty(distance, {});
  Tensor slope = torch::stable::new_empty(distance, {2, n});
  Tensor scale = torch::stable::new_empty(distance, {});
  with_accumulate_type(distance, [&](auto zero) {
    using T = decltype(zero);
    const TripletFinishArgs<T> args{
        data<int64_t>(index),
        data<T>(distance),
        n,
        TripletRule<T>{static_cast<T>(rule.margin), rule.smooth, rule.keep, rule.reduction},
        mutable_data<T>(loss),
        mutable_data<T>(slope),
        mutable_data<T>(scale)};
    check_launch(triplet_finish(args, current_stream(distance)), "triplet_finish");
  });
  return std::make_tuple(loss, slope, scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slab_pair_sum(const Tensor& query,
                                                         const Tensor& query_labels,
                                                         const OptionalTensor& ref,
                                                         const OptionalTensor& ref_labels,
                                                         const PairSumRule& rule, bool with_grad,
                                                         bool with_ref_grad, Multiply multiply) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  check_devices(query, query_labels, ref, ref_labels);
  const ScalarType type = accumulate_type(query);
  const int64_t n = query.size(0), d = query.size(1);
  const int64_t m = ref.has_value() ? ref->size(0) : n;
  const int64_t grad_n = with_grad ? n : 0;
  const int64_t grad_m = with_grad && with_ref_grad && ref.has_value() ? m : 0;
  if (n == 0 || m == 0)
    return std::make_tuple(torch::stable::new_zeros(query, {2, n}, type),
                           torch::stable::new_zeros(query, {4, n}, ScalarType::Long),
                           torch::stable::new_zeros(query, {2, grad_n, d}, type),
                           torch::stable::new_zeros(query, {2, grad_m, d}, type));
  Tensor sums = torch::stable::new_empty(query, {2, n}, type);
  Tensor counts = torch::stable::new_empty(query, {4, n}, ScalarType::Long);
  Tensor grad_query = torch::stable::new_empty(query, {2, grad_n, d}, type);
  Tensor grad_ref = torch::stable::new_empty(query, {2, grad_m, d}, type);
  const SlabBatch batch(query, query_labels, ref, ref_labels, rule.distance, multiply);
  SlabSumArgs args = sum_args(rule);
  args.with_grad = grad_n > 0 && d > 0;
  args.sums = sums.mutable_data_ptr();
  args.counts = mutable_data<int64_t>(counts);
  args.grad = grad_query.mutable_data_ptr();
  SumPass(batch, args, false, scalar_of(sums)).run();
  if (grad_m > 0 && d > 0) {
    args.weight_by_ref = true;
    args.sums = nullptr;
    args.grad = grad_ref.mutable_data_ptr();
    SumPass(batch, args, true, scalar_of(sums)).run();
  }
  return std::make_tuple(sums, counts, grad_query, grad_ref);
}

std::tuple<Tensor, Tensor> slab_pair_sum_backward(const Tensor& grad_sums, const Tensor& query,
                                                  const Tensor& query_labels,
                                                  const OptionalTensor& ref,
                                                  const OptionalTensor& ref_labels,
                                                  const PairSumRule& rule, bool with_ref_grad,
                                                  Multiply multiply) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  check_devices(query, query_labels, ref, ref_labels);
  check_device(grad_sums, query, "grad_sums");
  const int64_t n = query.size(0), d = query.size(1);
  const int64_t m = ref.has_value() ? ref->size(0) : n;
  const int64_t grad_m = with_ref_grad && ref.has_value() ? m : 0;
  STD_TORCH_CHECK(grad_sums.dim() == 2 && grad_sums.size(0) == 2 && grad_sums.size(1) == n,
                  "grad_sums: shape [2, ", n, "] expected");
  if (n == 0 || m == 0 || d == 0)
    return std::make_tuple(torch::stable::new_zeros(query, {n, d}),
                           torch::stable::new_zeros(query, {grad_m, d}));
  Tensor grad_query = torch::stable::new_empty(query, {n, d});
  Tensor grad_ref = torch::stable::new_empty(query, {grad_m, d});
  const Tensor weights = in_type(grad_sums, accumulate_type(query));
  const SlabBatch batch(query, query_labels, ref, ref_labels, rule.distance, multiply);
  SlabSumArgs args = sum_args(rule);
  args.merged = true;
  args.with_grad = true;
  const char* weight = static_cast<const char*>(weights.const_data_ptr());
  args.weight[0] = weight;
  args.weight[1] = weight + n * (batch.type == ScalarType::Double ? sizeof(double) : sizeof(float));
  args.grad = grad_query.mutable_data_ptr();
  SumPass(batch, args, false, scalar_of(query)).run();
  if (grad_m > 0) {
    args.weight_by_ref = true;
    args.grad = grad_ref.mutable_data_ptr();
    SumPass(batch, args, true, scalar_of(query)).run();
  }
  return std::make_tuple(grad_query, grad_ref);
}

}  // namespace flashmetric::cuda
