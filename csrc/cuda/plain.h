// SPDX-License-Identifier: Apache-2.0
// The PyTorch implementations of ops/plain.py, for what no kernel here serves.
#pragma once

#include <batch.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>

namespace flashmetric::cuda {

template <class Result, size_t... k>
Result tensors_of(const StableIValue* stack, std::index_sequence<k...>) {
  return Result(torch::stable::detail::to<Tensor>(stack[k])...);
}

// Calls flashmetric::_plain_<op>, which returns as many tensors as Result has.
template <class Result, class... Args>
Result call_plain(const std::string& op, const Args&... args) {
  constexpr size_t kResults = std::tuple_size_v<Result>;
  constexpr size_t kSize = sizeof...(Args) > kResults ? sizeof...(Args) : kResults;
  std::array<StableIValue, kSize> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(("flashmetric::_plain_" + op).c_str(), "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return tensors_of<Result>(stack.data(), std::make_index_sequence<kResults>{});
}

}  // namespace flashmetric::cuda
