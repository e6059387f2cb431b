// SPDX-License-Identifier: Apache-2.0
// hardest: the pairs that find_hardest.h finds, and their distances.
#include <find_hardest.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

std::tuple<Tensor, Tensor> hardest_cpu(const Tensor& query, const Tensor& query_labels,
                                       const OptionalTensor& ref, const OptionalTensor& ref_labels,
                                       const std::string& distance, bool exact) {
  check_batch(query, query_labels, ref, ref_labels);
  const Distance which = parse_distance(distance);
  return with_accumulate_type(query, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = query.size(0);
    Tensor index = torch::stable::new_empty(query, {2, n}, ScalarType::Long);
    Tensor distances = torch::stable::new_empty(query, {2, n}, scalar_type<T>());
    const Batch<T> batch(query, query_labels, ref, ref_labels, which);
    Hardest<T>(batch, which, exact).run(mutable_data<int64_t>(index), mutable_data<T>(distances));
    return std::make_tuple(index, distances);
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("hardest", TORCH_BOX(&flashmetric::hardest_cpu));
}
