// SPDX-License-Identifier: Apache-2.0
// row_sum on the slab engine: a block adds up the terms of the pairs of a row, one kind after the
// other. 2 kernels.
#include <slab_pairs.cuh>

namespace flashmetric::cuda {
namespace {

// What pairs of one kind bring to their row.
struct SumOfKind {
  double sum, slope, moment;  // of f(z), f'(z), f'(z) d
  int64_t pairs, kept, active;

  __device__ SumOfKind plus(const SumOfKind& other) const {
    return {sum + other.sum,     slope + other.slope, moment + other.moment,
            pairs + other.pairs, kept + other.kept,   active + other.active};
  }
};

template <class F, class T>
__device__ SumOfKind sum_of_share(const RowPairs<T>& row, int kind) {
  SumOfKind total{};
  T sum = 0, slope = 0, moment = 0;
  total.pairs = row.for_each(
      kind,
      [&](const RoleOfRow<T>& own, T d) {
        const T z = own.z(d), value = F::value(z), slope_z = F::slope(z);
        sum += value;
        slope += slope_z;
        moment += slope_z * d;
        total.kept += 1;
        total.active += value > T(0);
      },
      [&] {
        total.sum += static_cast<double>(sum);
        total.slope += static_cast<double>(slope);
        total.moment += static_cast<double>(moment);
        sum = slope = moment = T(0);
      });
  return total;
}

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    slab_row_sum_kernel(const SlabRowSumArgs<T> args) {
  __shared__ SumOfKind parts[2][kSlabWarps];
  const SlabProblem& problem = args.pairs.problem;
  const bool poisoned = any_bad(problem.bad, problem.bad_count);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const RowPairs<T> row(args.pairs, args.slab);
  // One copy of the code for both kinds.
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    const SumOfKind own = with_any_term(
        args.pairs.form.term[kind], [&](auto f) { return sum_of_share<decltype(f)>(row, kind); });
    const SumOfKind part{warp_sum(own.sum),   warp_sum(own.slope), warp_sum(own.moment),
                         warp_sum(own.pairs), warp_sum(own.kept),  warp_sum(own.active)};
    if (lane == 0) parts[kind][warp] = part;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  const int kind = static_cast<int>(threadIdx.x);
  SumOfKind total{};
  for (int w = 0; w < kSlabWarps; ++w) total = total.plus(parts[kind][w]);
  // Compare-and-skip rules would drop pairs with NaN.
  if (poisoned && total.pairs > 0) total.sum = total.slope = total.moment = not_a_number<double>();
  const int64_t n = problem.x.n, i = row.number();
  args.sums[kind * n + i] = static_cast<T>(total.sum);
  args.counts[kind * n + i] = total.kept;
  args.counts[(2 + kind) * n + i] = total.active;
  args.slopes[kind * n + i] = static_cast<T>(total.slope);
  args.slopes[(2 + kind) * n + i] = static_cast<T>(total.moment);
}

}  // namespace

template <class T>
cudaError_t slab_row_sum(const SlabRowSumArgs<T>& args, int64_t rows, cudaStream_t stream) {
  slab_row_sum_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t slab_row_sum(const SlabRowSumArgs<float>&, int64_t, cudaStream_t);
template cudaError_t slab_row_sum(const SlabRowSumArgs<double>&, int64_t, cudaStream_t);

}  // namespace flashmetric::cuda
