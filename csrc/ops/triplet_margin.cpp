// SPDX-License-Identifier: Apache-2.0
// triplet_margin: the loss of mined triplets and its derivative in their distances. O(N), so plain
// loops; an op of its own because twenty small torch operations would cost more than the mining.
#include <batch.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

struct TripletOptions {
  double margin;
  bool smooth, keep;
  std::string reduction;
};

template <class F, class T>
T reduce(const int64_t* index, const T* distance, int64_t n, const TripletOptions& options,
         T* grad) {
  const bool nonzero_only = options.reduction == "mean_nonzero";
  double total = 0;
  int64_t counted = 0;
  bool poisoned = false;
  for (int64_t i = 0; i < n; ++i) {
    const bool has_positive = index[i] >= 0, has_negative = index[n + i] >= 0;
    // Kept anchors: a missing positive is at distance 0 already; a missing negative is as far as
    // the positive, so that neither distance moves the loss.
    const bool moving = has_negative && (has_positive || options.keep);
    const T margin = static_cast<T>(options.margin);
    const T v = moving ? distance[i] - distance[n + i] + margin : margin;
    const T loss = F::value(v);
    poisoned = poisoned || std::isnan(distance[i]) || std::isnan(distance[n + i]);
    grad[i] = moving ? F::slope(v) : T(0);
    if (!moving && !options.keep) continue;
    total += static_cast<double>(loss);
    counted += !nonzero_only || loss != T(0);
  }
  // Also where only a skipped anchor met the NaN: no finite loss may have a NaN gradient.
  if (poisoned) {
    std::fill(grad, grad + 2 * n, std::numeric_limits<T>::quiet_NaN());
    return std::numeric_limits<T>::quiet_NaN();
  }
  const double divisor =
      options.reduction == "sum" ? 1.0 : static_cast<double>(std::max<int64_t>(counted, 1));
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = static_cast<T>(grad[i] / divisor);
    grad[n + i] = -grad[i];
  }
  return static_cast<T>(total / divisor);
}

std::tuple<Tensor, Tensor> triplet_margin_cpu(const Tensor& index, const Tensor& distance,
                                              double margin, bool smooth, std::string reduction,
                                              bool keep) {
  STD_TORCH_CHECK(index.dim() == 2 && index.size(0) == 2, "index: shape [2, N] expected");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "index: int64 expected");
  STD_TORCH_CHECK(distance.dim() == 2 && distance.size(0) == 2 && distance.size(1) == index.size(1),
                  "distance: the shape of index expected");
  STD_TORCH_CHECK(reduction == "mean" || reduction == "mean_nonzero" || reduction == "sum",
                  "reduction: 'mean', 'mean_nonzero' or 'sum' expected, got '", reduction, "'");
  const TripletOptions options{margin, smooth, keep, std::move(reduction)};
  return with_accumulate_type(distance, [&](auto type) {
    using T = decltype(type);
    const Tensor found = as_contiguous(index), values = rows_as<T>(distance);
    const int64_t n = index.size(1);
    Tensor loss = torch::stable::new_empty(distance, {}, scalar_type<T>());
    Tensor grad = torch::stable::new_empty(distance, {2, n}, scalar_type<T>());
    const auto run = [&](auto formula) {
      return reduce<decltype(formula)>(data<int64_t>(found), data<T>(values), n, options,
                                       mutable_data<T>(grad));
    };
    *mutable_data<T>(loss) = smooth ? run(Softplus{}) : run(Hinge{});
    return std::make_tuple(loss, grad);
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("triplet_margin", TORCH_BOX(&flashmetric::triplet_margin_cpu));
}
