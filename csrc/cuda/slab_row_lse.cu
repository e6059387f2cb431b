// SPDX-License-Identifier: Apache-2.0
// row_lse on the slab engine: a block looks at the pairs of a row twice, for the largest logit and
// for the sums relative to it, so that nothing is ever rescaled. 2 kernels.
#include <slab_pairs.cuh>

namespace flashmetric::cuda {
namespace {

template <class T>
struct TopOfKind {
  T top;  // -inf: no pair is kept
  int64_t pairs, kept;
};

// sum of e^(l - top), and the same of d e^(l - top).
struct ShareOfKind {
  double sum, moment;
};

template <class T>
__device__ T warp_max(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value = ::fmax(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

// In every thread of the block.
template <class T>
__device__ TopOfKind<T> find_top(const RowPairs<T>& row, const PairForm<T>& form, int kind,
                                 TopOfKind<T>* parts) {
  TopOfKind<T> own{-static_cast<T>(__builtin_huge_valf()), 0, 0};
  own.pairs = row.for_each(
      kind,
      [&](const RoleOfRow<T>& role, T d) {
        own.top = ::fmax(own.top, PairLogit<T>(form, kind, role.z(d)).value);
        own.kept += 1;
      },
      [] {});
  const TopOfKind<T> part{warp_max(own.top), warp_sum(own.pairs), warp_sum(own.kept)};
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = part;
  __syncthreads();
  TopOfKind<T> total = parts[0];
#pragma unroll 1
  for (int w = 1; w < kSlabWarps; ++w)
    total = {::fmax(total.top, parts[w].top), total.pairs + parts[w].pairs,
             total.kept + parts[w].kept};
  return total;
}

template <class T>
__device__ ShareOfKind sum_shares(const RowPairs<T>& row, const PairForm<T>& form, int kind,
                                  T top) {
  ShareOfKind total{};
  T sum = 0, moment = 0;
  row.for_each(
      kind,
      [&](const RoleOfRow<T>& role, T d) {
        const T e = softmax_exp(PairLogit<T>(form, kind, role.z(d)).value - top);
        sum += e;
        moment += e * d;
      },
      [&] {
        total.sum += static_cast<double>(sum);
        total.moment += static_cast<double>(moment);
        sum = moment = T(0);
      });
  return {warp_sum(total.sum), warp_sum(total.moment)};
}

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    slab_row_lse_kernel(const SlabRowLseArgs<T> args) {
  __shared__ TopOfKind<T> tops[2][kSlabWarps];
  __shared__ ShareOfKind shares[2][kSlabWarps];
  const SlabProblem& problem = args.pairs.problem;
  const PairForm<T>& form = args.pairs.form;
  const bool poisoned = any_bad(problem.bad, problem.bad_count);
  const RowPairs<T> row(args.pairs, args.slab);
  // One copy of the code for both kinds.
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    T lse = -static_cast<T>(__builtin_huge_valf()), mean = 0;
    int64_t kept = 0;
    if (form.term[kind] != Term::kNone) {
      const TopOfKind<T> of_kind = find_top(row, form, kind, tops[kind]);
      // Of logits that are all -inf, too, the sum is of e^-inf.
      const T top = of_kind.top == lse ? T(0) : of_kind.top;
      const ShareOfKind part = sum_shares(row, form, kind, top);
      if (threadIdx.x % kWarp == 0) shares[kind][threadIdx.x / kWarp] = part;
      __syncthreads();
      if (threadIdx.x == 0) {
        ShareOfKind total{};
        for (int w = 0; w < kSlabWarps; ++w)
          total = {total.sum + shares[kind][w].sum, total.moment + shares[kind][w].moment};
        kept = of_kind.kept;
        if (total.sum > 0) {
          lse = top + static_cast<T>(log(total.sum));
          mean = static_cast<T>(total.moment / total.sum);
        }
        // Compare-and-skip rules would drop pairs with NaN.
        if (poisoned && of_kind.pairs > 0) lse = mean = not_a_number<T>();
      }
    }
    if (threadIdx.x != 0) continue;
    const int64_t at = kind * problem.x.n + row.number();
    args.lse[at] = lse;
    args.mean[at] = mean;
    args.counts[at] = kept;
  }
}

}  // namespace

template <class T>
cudaError_t slab_row_lse(const SlabRowLseArgs<T>& args, int64_t rows, cudaStream_t stream) {
  slab_row_lse_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t slab_row_lse(const SlabRowLseArgs<float>&, int64_t, cudaStream_t);
template cudaError_t slab_row_lse(const SlabRowLseArgs<double>&, int64_t, cudaStream_t);

}  // namespace flashmetric::cuda
