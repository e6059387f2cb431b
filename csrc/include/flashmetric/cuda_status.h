// SPDX-License-Identifier: Apache-2.0
// What csrc/ops/info.cpp asks of the CUDA part, in terms that need no CUDA header.
#pragma once

#include <cstdint>
#include <string>

namespace flashmetric::cuda {

int64_t device_count();
// The CUDA runtime's own words on whether it can be used here.
std::string status();
// False in a torch without CUDA, where the CUDA ops cannot be called.
bool shims_bound();

}  // namespace flashmetric::cuda
