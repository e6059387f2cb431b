// SPDX-License-Identifier: Apache-2.0
// The pairs of a row of a slab, by kind: how the blocks of row_sum and row_lse go through them.
#pragma once

#include <flashmetric/cuda_slab_rows.h>
#include <row_term.cuh>
#include <slab_row.cuh>

namespace flashmetric::cuda {

// Numbers of T that are added up before they go to double: many devices have few units for it.
constexpr int kPairRun = 8;

template <class T>
class RowPairs {
 public:
  __device__ RowPairs(const SlabRowPairs<T>& pairs, const T* slab)
      : row_(pairs.problem, pairs.labelling, blockIdx.x),
        role_(pairs.own),
        slab_(slab + blockIdx.x * row_.m()) {}

  __device__ int64_t number() const { return row_.number(); }

  // Calls keep(own, d) for each kept pair of the kind in this thread's share, and settle() now and
  // then, and in the end. Returns the number of the share's pairs of the kind, kept or not.
  template <class Keep, class Settle>
  __device__ int64_t for_each(int kind, Keep&& keep, Settle&& settle) const {
    const RoleOfRow<T> own(role_, kind, row_.number());
    const int64_t m = row_.m();
    int64_t pairs = 0;
    for (int64_t begin = threadIdx.x; begin < m; begin += kPairRun * kSlabThreads) {
#pragma unroll 1
      for (int run = 0; run < kPairRun; ++run) {
        const int64_t j = begin + run * kSlabThreads;
        if (j >= m) break;
        const T d = slab_[j];
        if (!(d == d) || row_.kind(j) != kind) continue;
        pairs += 1;
        if (is_kept(role_, kind, own.bound, d)) keep(own, d);
      }
      settle();
    }
    return pairs;
  }

 private:
  const LabelledRow<T> row_;
  const PairRole<T>& role_;
  const T* slab_;
};

}  // namespace flashmetric::cuda
