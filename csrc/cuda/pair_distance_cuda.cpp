// SPDX-License-Identifier: Apache-2.0
// pair_distance, its gradient and that of hardest_triplets on CUDA.
#include <cuda_ops.h>
#include <flashmetric/cuda_pairs.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

namespace flashmetric::cuda {
namespace {

// The arguments that name pairs, checked and contiguous; holds the memory that list() points to.
class PairTensors {
 public:
  PairTensors(const Tensor& query, const OptionalTensor& ref, const OptionalTensor& query_index,
              const Tensor& ref_index, const std::string& distance)
      : distance_(parse_distance(distance)), self(!ref.has_value()) {
    STD_TORCH_CHECK(query.dim() == 2, "query: 2 dimensions expected, got ", query.dim());
    query_ = as_contiguous(query);
    ref_ = query_;
    if (!self) {
      check_device(*ref, query, "ref");
      STD_TORCH_CHECK(ref->dim() == 2 && ref->size(1) == query.size(1), "ref: ", query.size(1),
                      " columns expected");
      STD_TORCH_CHECK(ref->scalar_type() == query.scalar_type(),
                      "ref: the dtype of query expected");
      ref_ = as_contiguous(*ref);
    }
    constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - kPairThreads;
    STD_TORCH_CHECK(n() < kLimit && m() < kLimit && ref_index.numel() < kLimit,
                    "query, ref, ref_index: fewer than 2^31 rows and pairs expected");
    check_device(ref_index, query, "ref_index");
    STD_TORCH_CHECK(ref_index.scalar_type() == ScalarType::Long, "ref_index: int64 expected");
    ref_index_ = as_contiguous(ref_index);
    if (query_index.has_value()) {
      check_device(*query_index, query, "query_index");
      STD_TORCH_CHECK(query_index->scalar_type() == ScalarType::Long,
                      "query_index: int64 expected");
      STD_TORCH_CHECK(query_index->numel() == count(),
                      "query_index: as many as ref_index expected");
      query_index_ = as_contiguous(*query_index);
    } else {
      STD_TORCH_CHECK(ref_index.dim() == 2 && ref_index.size(1) == n(),
                      "ref_index: one column per query row expected");
    }
  }

  int64_t n() const { return query_.size(0); }
  int64_t m() const { return ref_.size(0); }
  int64_t d() const { return query_.size(1); }
  int64_t count() const { return ref_index_.numel(); }
  const Tensor& query() const { return query_; }
  const OptionalTensor& query_index() const { return query_index_; }
  const Tensor& ref_index() const { return ref_index_; }

  ListedPairs list() const {
    return {query_.const_data_ptr(),
            ref_.const_data_ptr(),
            n(),
            m(),
            d(),
            query_index_.has_value() ? data<int64_t>(*query_index_) : nullptr,
            data<int64_t>(ref_index_),
            count(),
            scalar_of(query_),
            distance_};
  }

 private:
  const Distance distance_;
  Tensor query_, ref_, ref_index_;
  OptionalTensor query_index_;

 public:
  const bool self;
};

Tensor pair_distance_cuda(const Tensor& query, const OptionalTensor& ref,
                          const OptionalTensor& query_index, const Tensor& ref_index,
                          const std::string& distance) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const PairTensors pairs(query, ref, query_index, ref_index, distance);
  Tensor out = torch::stable::new_empty(query, ref_index.sizes(), accumulate_type(query));
  const PairDistanceArgs args{pairs.list(), out.mutable_data_ptr()};
  check_launch(pair_distance(args, current_stream(query)), "pair_distance");
  return out;
}

// Stable, so that the pairs of a row keep the order of the list. Row numbers that do not fit 32
// bits name no row: wherever they end up, the kernel looks at the list itself.
struct SortedList {
  Tensor rows, order;

  explicit SortedList(const Tensor& index) {
    const Tensor flat = torch::stable::view(index, {index.numel()});
    const Tensor keys = torch::stable::to(flat, ScalarType::Int);
    std::array<StableIValue, 4> stack{
        torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
        torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    rows = torch::stable::detail::to<Tensor>(stack[0]);
    order = torch::stable::detail::to<Tensor>(stack[1]);
  }
  SortedPairs pointers() const { return {data<int32_t>(rows), data<int64_t>(order)}; }
};

// Gradients of query and of ref (no rows unless wanted). `grad` [count] times the product of
// `factors`, where given, is the gradient of the loss in the distances.
std::tuple<Tensor, Tensor> pair_gradients(const PairTensors& pairs, const Tensor& value,
                                          const Tensor& grad, const std::array<Tensor, 2>* factors,
                                          bool with_ref_grad, const char* op) {
  const Tensor& query = pairs.query();
  const ScalarType type = accumulate_type(query);
  STD_TORCH_CHECK(value.numel() == pairs.count(), "distance_value: one element per pair expected");
  STD_TORCH_CHECK(grad.numel() == pairs.count(), "grad: one element per pair expected");
  check_device(value, query, "distance_value");
  check_device(grad, query, "grad");
  const Tensor values = in_type(value, type), grads = in_type(grad, type);

  PairGradientArgs args{};
  args.pairs = pairs.list();
  args.self = pairs.self;
  args.ref_rows = !pairs.self && with_ref_grad;
  args.value = values.const_data_ptr();
  args.grad = grads.const_data_ptr();
  std::array<Tensor, 2> scalars;
  for (size_t k = 0; factors != nullptr && k < 2; ++k) {
    check_device((*factors)[k], query, "grad, scale");
    scalars[k] = in_type((*factors)[k], type);
    args.factor[k] = scalars[k].const_data_ptr();
  }

  const int64_t ref_rows = args.ref_rows ? pairs.m() : 0;
  Tensor grad_query = torch::stable::new_empty(query, {pairs.n(), pairs.d()});
  Tensor grad_ref = torch::stable::new_empty(query, {ref_rows, pairs.d()});
  args.grad_query = grad_query.mutable_data_ptr();
  args.grad_ref = grad_ref.mutable_data_ptr();

  const PairGradientPlan plan = plan_pair_gradient(pairs.n() + ref_rows, pairs.count(), pairs.d());
  args.rows_per_block = plan.rows_per_block;
  std::optional<SortedList> by_query, by_ref;
  if (plan.sorted && pairs.query_index().has_value())
    args.by_query = by_query.emplace(*pairs.query_index()).pointers();
  if (plan.sorted && (pairs.self || args.ref_rows))
    args.by_ref = by_ref.emplace(pairs.ref_index()).pointers();
  check_launch(pair_gradient(args, plan, current_stream(query)), op);
  return std::make_tuple(grad_query, grad_ref);
}

std::tuple<Tensor, Tensor> pair_distance_backward_cuda(const Tensor& grad, const Tensor& query,
                                                       const OptionalTensor& ref,
                                                       const OptionalTensor& query_index,
                                                       const Tensor& ref_index, const Tensor& value,
                                                       const std::string& distance,
                                                       bool with_ref_grad) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const PairTensors pairs(query, ref, query_index, ref_index, distance);
  return pair_gradients(pairs, value, grad, nullptr, with_ref_grad, "pair_distance_backward");
}

std::tuple<Tensor, Tensor> hardest_triplets_backward_cuda(const Tensor& grad, const Tensor& slope,
                                                          const Tensor& scale, const Tensor& query,
                                                          const OptionalTensor& ref,
                                                          const Tensor& index, const Tensor& value,
                                                          const std::string& distance,
                                                          bool with_ref_grad) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  STD_TORCH_CHECK(grad.numel() == 1 && scale.numel() == 1, "grad and scale: scalars expected");
  const PairTensors pairs(query, ref, std::nullopt, index, distance);
  const std::array<Tensor, 2> factors{grad, scale};
  return pair_gradients(pairs, value, slope, &factors, with_ref_grad, "hardest_triplets_backward");
}

}  // namespace
}  // namespace flashmetric::cuda

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("pair_distance", TORCH_BOX(&flashmetric::cuda::pair_distance_cuda));
  m.impl("pair_distance_backward", TORCH_BOX(&flashmetric::cuda::pair_distance_backward_cuda));
  m.impl("hardest_triplets_backward",
         TORCH_BOX(&flashmetric::cuda::hardest_triplets_backward_cuda));
}
