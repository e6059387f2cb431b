// SPDX-License-Identifier: Apache-2.0
// The weights of threshold_sum's gradient. A hinge's weight is the sum of the gradients of all
// thresholds above the distance: one binary search a pair. 4 kernels.
#include <distance_row.cuh>
#include <slab_row.cuh>

namespace flashmetric::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    threshold_table_kernel(const ThresholdTableArgs args) {
  const ThresholdTable& table = args.table;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp;
  T* limits = static_cast<T*>(const_cast<void*>(table.limit));
  T* weights = static_cast<T*>(const_cast<void*>(table.weight));
  const int64_t last = (divide_up(table.count, kWarp) - 1) * kWarp;
  for (int64_t i = warp; i < table.n; i += int64_t{gridDim.x} * kRowWarps) {
    const bool shared = table.limit_rows == 1;
    const double* thresholds = args.thresholds + (shared ? 0 : i * table.count);
    double above = 0;
    for (int64_t begin = last; begin >= 0; begin -= kWarp) {
      const int64_t k = begin + lane;
      const bool inside = k < table.count;
      const double threshold = inside ? thresholds[k] : 0.0;
      // Padding is below every distance. NaN comes last, and no distance is known to be above it.
      const bool unknown = !(threshold == threshold);
      double weight = inside && !is_padding(threshold) ? args.grad[i * table.count + k] : 0.0;
      if (unknown && weight != 0.0) weight = not_a_number<double>();
      if (args.hinge) {
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
          const double other = __shfl_down_sync(kAllLanes, weight, step);
          if (lane + step < kWarp) weight += other;
        }
        weight += above;
        above = __shfl_sync(kAllLanes, weight, 0);
      }
      if (!inside) continue;
      weights[k * table.n + i] = static_cast<T>(weight);
      // A hinge's are compared with distances, the others subtracted from.
      const T limit = !args.hinge ? static_cast<T>(threshold)
                      : unknown   ? static_cast<T>(__int_as_float(0x7f800000))
                                  : limit_of(threshold, T(0));
      if (!shared || i == 0) limits[k * table.limit_rows + i] = limit;
    }
  }
}

// The derivative in d of the objective of row i for a pair at distance d.
template <class F, class T>
__device__ T weight_of(const ThresholdTable& table, int64_t i, T d) {
  const T* limits = static_cast<const T*>(table.limit) + (table.limit_rows == 1 ? 0 : i);
  const T* weights = static_cast<const T*>(table.weight) + i;
  if constexpr (std::is_same_v<F, Hinge>) {
    const int64_t k =
        first_of(table.count, [=](int64_t at) { return d < limits[at * table.limit_rows]; });
    return k < table.count ? -weights[k * table.n] : T(0);
  } else {
    T sum = 0;
    for (int64_t k = 0; k < table.count; ++k) {
      const T weight = weights[k * table.n];
      if (weight != T(0)) sum += weight * F::slope(limits[k * table.limit_rows] - d);
    }
    return -sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    threshold_weigh_kernel(const ThresholdWeighArgs args) {
  __shared__ double totals[kSlabWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const SlabRow<T> row(args.problem, blockIdx.x);
  const int64_t m = row.m();
  T* slab = static_cast<T*>(args.slab) + blockIdx.x * m;
  T* weights = static_cast<T*>(args.weight) + blockIdx.x * m;
  const uint32_t* near = args.near == nullptr ? nullptr : args.near + blockIdx.x * near_words(m);
  const T factor = is_direct(args.problem.distance) ? T(1) : T(2);
  double total = 0;
  for (int64_t j = threadIdx.x; j < m; j += kSlabThreads) {
    const T d = slab[j];
    T h = 0;
    // A zero row is at a constant distance from every row.
    if (d == d && !row.apart(j)) {
      h = with_threshold_term(args.term, [&](auto f) {
        using F = decltype(f);
        T weight = 0;
        if (args.own) weight += weight_of<F>(args.table, row.number(), d);
        if (args.other) weight += weight_of<F>(args.table, j, d);
        return weight;
      });
      if (h != T(0)) h *= factor * slope_at(args.problem.distance, d);
    }
    const bool is_near = near != nullptr && (near[j / kWarp] >> (j % kWarp) & 1) != 0;
    if (is_near) slab[j] = h;
    weights[j] = is_near ? T(0) : h;
    if (!is_near) total += static_cast<double>(h);
  }
  total = warp_sum(total);
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (int w = 0; w < kSlabWarps; ++w) total += totals[w];
  args.total[blockIdx.x] = total;
}

}  // namespace

template <class T>
cudaError_t threshold_table(const ThresholdTableArgs& args, int grid, cudaStream_t stream) {
  threshold_table_kernel<T><<<static_cast<unsigned>(grid), kRowWarps * kWarp, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t threshold_table<float>(const ThresholdTableArgs&, int, cudaStream_t);
template cudaError_t threshold_table<double>(const ThresholdTableArgs&, int, cudaStream_t);

template <class T>
cudaError_t threshold_weigh(const ThresholdWeighArgs& args, int64_t rows, cudaStream_t stream) {
  threshold_weigh_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t threshold_weigh<float>(const ThresholdWeighArgs&, int64_t, cudaStream_t);
template cudaError_t threshold_weigh<double>(const ThresholdWeighArgs&, int64_t, cudaStream_t);

}  // namespace flashmetric::cuda
