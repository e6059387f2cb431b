// SPDX-License-Identifier: Apache-2.0
// pair_distance and its gradient: listed pairs by exact differences.
#include <pair_list.h>
#include <torch/csrc/stable/library.h>

namespace flashmetric {
namespace {

Tensor pair_distance_cpu(const Tensor& query, const OptionalTensor& ref,
                         const OptionalTensor& query_index, const Tensor& ref_index,
                         const std::string& distance) {
  check_pair_operands(query, ref);
  const Distance which = parse_distance(distance);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const PlainRows<T> left(query, which);
    const PlainRows<T> right(ref.has_value() ? *ref : query, which);
    const Side<T> x = left.side(), y = right.side();
    const PairList pairs(query_index, ref_index, x.n, y.n);
    Tensor out = torch::stable::new_empty(query, ref_index.sizes(), scalar_type<T>());
    T* values = mutable_data<T>(out);
    constexpr int64_t kPairsPerTask = 256;
    for_each((pairs.size() + kPairsPerTask - 1) / kPairsPerTask,
             pairs.size() * x.d * 4 >= kParallelWork, [&](int64_t task) {
               const int64_t end = std::min((task + 1) * kPairsPerTask, pairs.size());
               for (int64_t t = task * kPairsPerTask; t < end; ++t) {
                 const int32_t i = pairs.query[static_cast<size_t>(t)];
                 const int32_t j = pairs.ref[static_cast<size_t>(t)];
                 values[t] = T(0);
                 if (i < 0) continue;
                 T u;
                 const T norm = x.norms == nullptr ? T(1) : x.norms[i];
                 cpu_kernels<T>().exact(which, x.rows + i * x.d, norm, y, &j, 1, &u);
                 values[t] = with_distance(which, [&](auto d) { return decltype(d)::value(u); });
               }
             });
    return out;
  });
}

std::tuple<Tensor, Tensor> pair_distance_backward_cpu(const Tensor& grad, const Tensor& query,
                                                      const OptionalTensor& ref,
                                                      const OptionalTensor& query_index,
                                                      const Tensor& ref_index, const Tensor& value,
                                                      const std::string& distance,
                                                      bool with_ref_grad) {
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    STD_TORCH_CHECK(grad.numel() == ref_index.numel(), "grad: one element per pair expected");
    const Tensor grads = rows_as<T>(grad);
    const T* grad_of = data<T>(grads);
    return pair_gradients<T>(query, ref, query_index, ref_index, value, distance, with_ref_grad,
                             [=](size_t t) { return grad_of[t]; });
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("pair_distance", TORCH_BOX(&flashmetric::pair_distance_cpu));
  m.impl("pair_distance_backward", TORCH_BOX(&flashmetric::pair_distance_backward_cpu));
}
