// SPDX-License-Identifier: Apache-2.0
// nearest_beyond and row_top_k on CUDA: per slab of rows a product, its distances, and one kernel
// that selects.
#include <distance_slab.h>
#include <torch/csrc/stable/library.h>

namespace flashmetric::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor nearest_beyond_cuda(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                           const OptionalTensor& ref_labels, const std::string& rule,
                           const std::string& distance, const std::string& kind, bool farthest,
                           const Tensor& thresholds) {
  check_pairs(query, labels, ref, ref_labels, rule);
  const DeviceGuard guard(query.get_device_index());
  const int64_t n = query.size(0);
  STD_TORCH_CHECK(thresholds.dim() == 2 && thresholds.size(0) == n, "thresholds: shape [", n,
                  ", K] expected");
  check_device(thresholds, query, "thresholds");
  STD_TORCH_CHECK(thresholds.scalar_type() == accumulate_type(query),
                  "thresholds: the dtype of distances expected, float64 for float64 rows and "
                  "float32 for all others");
  const int64_t count = thresholds.size(1);
  Tensor index = torch::stable::new_empty(query, {n, count}, ScalarType::Long);
  const DistanceSlabs slabs(query, labels, ref, ref_labels, rule, distance, kind_of(kind));
  if (count == 0) return index;
  const Tensor limits = as_contiguous(thresholds);
  slabs.for_each_query([&](const DistanceRows& distances, int64_t rows) {
    const NearestArgs args{distances, farthest, limits.const_data_ptr(), count,
                           mutable_data<int64_t>(index)};
    const cudaStream_t stream = slabs.batch().stream;
    check_launch(slabs.batch().type == ScalarType::Double
                     ? nearest_beyond<double>(args, rows, stream)
                     : nearest_beyond<float>(args, rows, stream),
                 "nearest_beyond");
  });
  return index;
}

Tensor row_top_k_cuda(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                      const OptionalTensor& ref_labels, const std::string& rule,
                      const std::string& distance, const std::string& kind, int64_t k,
                      bool farthest) {
  check_pairs(query, labels, ref, ref_labels, rule);
  const DeviceGuard guard(query.get_device_index());
  STD_TORCH_CHECK(k >= 0, "k: at least 0 expected, got ", k);
  Tensor index = torch::stable::new_empty(query, {query.size(0), k}, ScalarType::Long);
  const DistanceSlabs slabs(query, labels, ref, ref_labels, rule, distance, kind_of(kind));
  if (k == 0) return index;
  slabs.for_each_query([&](const DistanceRows& distances, int64_t rows) {
    const TopKArgs args{distances, farthest, k, mutable_data<int64_t>(index)};
    const cudaStream_t stream = slabs.batch().stream;
    check_launch(slabs.batch().type == ScalarType::Double ? row_top_k<double>(args, rows, stream)
                                                          : row_top_k<float>(args, rows, stream),
                 "row_top_k");
  });
  return index;
}

}  // namespace
}  // namespace flashmetric::cuda

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("nearest_beyond", TORCH_BOX(&flashmetric::cuda::nearest_beyond_cuda));
  m.impl("row_top_k", TORCH_BOX(&flashmetric::cuda::row_top_k_cuda));
}
