// SPDX-License-Identifier: Apache-2.0
// The best of many numbered values, by the threads of a block.
#pragma once

#include <exact.cuh>

namespace flashmetric::cuda {

// A candidate; the smaller value wins, of equals the lower index. NaN wins against no candidate
// only.
template <class T>
struct Candidate {
  T value;
  int32_t index;  // -1: none

  __device__ bool beats(const Candidate& other) const {
    if (index < 0 || other.index < 0) return index >= 0 && other.index < 0;
    return value < other.value || (value == other.value && index < other.index);
  }
};

template <class T>
__device__ Candidate<T> warp_best(Candidate<T> best) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Candidate<T> other{__shfl_xor_sync(kAllLanes, best.value, mask),
                             __shfl_xor_sync(kAllLanes, best.index, mask)};
    if (other.beats(best)) best = other;
  }
  return best;
}

}  // namespace flashmetric::cuda
