// SPDX-License-Identifier: Apache-2.0
// pair_distance and its gradient: listed pairs by exact differences.
#include <pair_list.h>
#include <torch/csrc/stable/library.h>

namespace flashmetric {
namespace {

// Distances of row i from the listed rows; 0 where i is -1.
template <class T>
void measure(Distance distance, const Side<T>& x, int32_t i, const Side<T>& y, const int32_t* list,
             int64_t count, T* values) {
  if (i < 0) {
    std::fill_n(values, count, T(0));
    return;
  }
  const T norm = x.norms == nullptr ? T(1) : x.norms[i];
  cpu_kernels<T>().exact(distance, x.rows + i * x.d, norm, y, list, count, values);
  with_distance(distance, [&](auto d) {
    for (int64_t t = 0; t < count; ++t) values[t] = decltype(d)::value(values[t]);
  });
}

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
               for (int64_t t = task * kPairsPerTask, next; t < end; t = next) {
                 // Lists go from anchor to anchor: a run of pairs of one row loads it once.
                 const int32_t i = pairs.query[static_cast<size_t>(t)];
                 for (next = t + 1; next < end; ++next)
                   if (pairs.query[static_cast<size_t>(next)] != i) break;
                 measure(which, x, i, y, &pairs.ref[static_cast<size_t>(t)], next - t, values + t);
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
