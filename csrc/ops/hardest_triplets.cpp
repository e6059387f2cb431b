// SPDX-License-Identifier: Apache-2.0
// hardest_triplets: the hardest pairs, the reduced margin loss of the triplets they make, and its
// derivative in their distances; and the gradient from that. One op each way, because at a few
// hundred rows every further call costs a noticeable part of the mining.
#include <find_hardest.h>
#include <pair_list.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

template <class T>
struct Reduced {
  T loss, scale;
};

template <class T>
Reduced<T> reduce(const TripletRule<T>& rule, const int64_t* index, const T* distance, int64_t n,
                  T* slope) {
  double total = 0;
  int64_t counted = 0;
  bool poisoned = false;
  for (int64_t i = 0; i < n; ++i) {
    const TripletTerm<T> term =
        rule.term(index[i] >= 0, index[n + i] >= 0, distance[i], distance[n + i]);
    total += static_cast<double>(term.loss);
    counted += term.counted;
    poisoned = poisoned || term.poisoned;
    slope[i] = term.slope;
    slope[n + i] = -term.slope;
  }
  const double divisor = rule.divisor(counted);
  Reduced<T> result{static_cast<T>(total / divisor), static_cast<T>(1 / divisor)};
  // Also where only a skipped anchor met the NaN.
  if (poisoned) {
    std::fill(slope, slope + 2 * n, std::numeric_limits<T>::quiet_NaN());
    result.loss = std::numeric_limits<T>::quiet_NaN();
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hardest_triplets_cpu(
    const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& distance, double margin, bool smooth,
    const std::string& reduction, bool keep, bool exact) {
  check_batch(query, query_labels, ref, ref_labels);
  const Distance which = parse_distance(distance);
  const Reduction reduced_by = parse_reduction(reduction);
  return with_accumulate_type(query, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = query.size(0);
    Tensor loss = torch::stable::new_empty(query, {}, scalar_type<T>());
    Tensor index = torch::stable::new_empty(query, {2, n}, ScalarType::Long);
    Tensor distances = torch::stable::new_empty(query, {2, n}, scalar_type<T>());
    Tensor slope = torch::stable::new_empty(query, {2, n}, scalar_type<T>());
    Tensor scale = torch::stable::new_empty(query, {}, scalar_type<T>());
    const Batch<T> batch(query, query_labels, ref, ref_labels, which);
    Hardest<T>(batch, which, exact).run(mutable_data<int64_t>(index), mutable_data<T>(distances));
    const TripletRule<T> rule{static_cast<T>(margin), smooth, keep, reduced_by};
    const Reduced<T> reduced =
        reduce(rule, data<int64_t>(index), data<T>(distances), n, mutable_data<T>(slope));
    *mutable_data<T>(loss) = reduced.loss;
    *mutable_data<T>(scale) = reduced.scale;
    return std::make_tuple(loss, index, distances, slope, scale);
  });
}

std::tuple<Tensor, Tensor> hardest_triplets_backward_cpu(const Tensor& grad, const Tensor& slope,
                                                         const Tensor& scale, const Tensor& query,
                                                         const OptionalTensor& ref,
                                                         const Tensor& index, const Tensor& value,
                                                         const std::string& distance,
                                                         bool with_ref_grad) {
  STD_TORCH_CHECK(grad.numel() == 1 && scale.numel() == 1, "grad and scale: scalars expected");
  STD_TORCH_CHECK(slope.numel() == index.numel(), "slope: the shape of index expected");
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const Tensor of_loss = rows_as<T>(grad), factor = rows_as<T>(scale), slopes = rows_as<T>(slope);
    const T weight = *data<T>(of_loss) * *data<T>(factor);
    const T* slope_of = data<T>(slopes);
    return pair_gradients<T>(query, ref, std::nullopt, index, value, distance, with_ref_grad,
                             [=](size_t t) { return slope_of[t] * weight; });
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("hardest_triplets", TORCH_BOX(&flashmetric::hardest_triplets_cpu));
  m.impl("hardest_triplets_backward", TORCH_BOX(&flashmetric::hardest_triplets_backward_cpu));
}
