// SPDX-License-Identifier: Apache-2.0
// _row_sqnorm: squared row norms in the accumulation type. Private: it exercises the chain from
// schema to kernel on every device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

namespace flashmetric {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Scalar>
Tensor row_sqnorm_of(const Tensor& x) {
  constexpr bool kDouble = std::is_same_v<Scalar, double>;
  using Acc = std::conditional_t<kDouble, double, float>;
  const Tensor rows = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0)},
                                        kDouble ? ScalarType::Double : ScalarType::Float);
  const auto* values = static_cast<const Scalar*>(rows.const_data_ptr());
  auto* sums = static_cast<Acc*>(out.mutable_data_ptr());
  const int64_t cols = rows.size(1);
  for (int64_t i = 0; i < rows.size(0); ++i) {
    Acc sum = 0;
    for (int64_t j = 0; j < cols; ++j) {
      const Acc value = static_cast<Acc>(values[i * cols + j]);
      sum += value * value;
    }
    sums[i] = sum;
  }
  return out;
}

Tensor row_sqnorm(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "_row_sqnorm: x must have 2 dimensions, got ", x.dim());
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return row_sqnorm_of<torch::headeronly::Half>(x);
    case ScalarType::BFloat16:
      return row_sqnorm_of<torch::headeronly::BFloat16>(x);
    case ScalarType::Float:
      return row_sqnorm_of<float>(x);
    case ScalarType::Double:
      return row_sqnorm_of<double>(x);
    default:
      STD_TORCH_CHECK(false, "_row_sqnorm: x must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_FRAGMENT(flashmetric, m) { m.def("_row_sqnorm(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("_row_sqnorm", TORCH_BOX(&flashmetric::row_sqnorm));
}
