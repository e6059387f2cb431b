// SPDX-License-Identifier: Apache-2.0
// The slab engine on the host: the search.
#include <flashmetric/cuda_slab.h>
#include <slab_batch.h>

namespace flashmetric::cuda {
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

}  // namespace flashmetric::cuda
