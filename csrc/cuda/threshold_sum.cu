// SPDX-License-Identifier: Apache-2.0
// threshold_sum: a block adds up the pairs of a row for every threshold. With many thresholds a
// hinge is found from the sorted distances: below a threshold t, sum of max(t - d, 0) is count * t
// - sum of d. 4 kernels.
#include <distance_row.cuh>

namespace flashmetric::cuda {
namespace {

// What the pairs of a row bring to one threshold.
struct ThresholdPart {
  double sum, slope;
  int64_t below;
};

// Numbers that are added up before they go to double.
constexpr int kThresholdRun = 8;

template <class F, class T>
__device__ ThresholdPart sum_below(const DistanceRow<T>& row, double threshold) {
  const T t = static_cast<T>(threshold), limit = limit_of(threshold, T(0));
  ThresholdPart part{0, 0, 0};
  for (int64_t begin = threadIdx.x; begin < row.m(); begin += kThresholdRun * kSlabThreads) {
    T sum = 0, slope = 0;
    for (int r = 0; r < kThresholdRun; ++r) {
      const int64_t j = begin + r * kSlabThreads;
      if (j >= row.m()) break;
      const T d = row[j];
      if (!(d == d)) continue;
      sum += F::value(t - d);
      slope += F::slope(t - d);
      part.below += d < limit;
    }
    part.sum += static_cast<double>(sum);
    part.slope += static_cast<double>(slope);
  }
  return part;
}

template <class T>
__device__ void write(const ThresholdSumArgs& args, int64_t k, const ThresholdPart& total) {
  const int64_t at = (args.rows.begin + blockIdx.x) * args.count + k;
  args.sums[at] = total.sum;
  args.counts[at] = total.below;
  args.slopes[at] = total.slope;
}

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    threshold_sum_kernel(const ThresholdSumArgs args) {
  __shared__ ThresholdPart parts[kSlabWarps][kWarp];
  const DistanceRow<T> row(args.rows);
  const bool spoiled = any_bad(args.rows.bad, args.rows.bad_count) && row.has_candidates();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const double* thresholds = args.thresholds + (args.rows.begin + blockIdx.x) * args.row_stride;
  for (int64_t begin = 0; begin < args.count; begin += kWarp) {
    for (int64_t k = begin; k < args.count && k < begin + kWarp; ++k) {
      ThresholdPart part{0, 0, 0};
      if (!is_padding(thresholds[k]))
        part = with_threshold_term(
            args.term, [&](auto f) { return sum_below<decltype(f)>(row, thresholds[k]); });
      part = {warp_sum(part.sum), warp_sum(part.slope), warp_sum(part.below)};
      if (lane == 0) parts[warp][k - begin] = part;
    }
    __syncthreads();
    const int64_t k = begin + threadIdx.x;
    if (threadIdx.x < kWarp && k < args.count) {
      ThresholdPart total{0, 0, 0};
      for (int w = 0; w < kSlabWarps; ++w) {
        const ThresholdPart& part = parts[w][threadIdx.x];
        total = {total.sum + part.sum, total.slope + part.slope, total.below + part.below};
      }
      // Compare-and-skip rules would drop pairs with NaN.
      if (spoiled && !is_padding(thresholds[k])) total.sum = total.slope = not_a_number<double>();
      write<T>(args, k, total);
    }
    __syncthreads();  // before the next parts
  }
}

// Distances sorted at a time.
constexpr int kSorted = 1024;
constexpr int kSortedShare = kSorted / kSlabThreads;

template <class T>
struct SortedPart {
  T values[kSorted];
  double before[kSorted + 1];  // sums of the values before each
  double warps[kSlabWarps];
  int count;
};

// Ascending, by the whole block; `size` is a power of two.
template <class T>
__device__ void sort(T* values, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int p = static_cast<int>(threadIdx.x); p < size / 2; p += kSlabThreads) {
        const int a = 2 * p - (p & (step - 1)), b = a + step;
        const T low = values[a], high = values[b];
        if ((low > high) == ((a & run) == 0)) {
          values[a] = high;
          values[b] = low;
        }
      }
      __syncthreads();
    }
  }
}

// Sorts what was listed, and sums it up from the lowest.
template <class T>
__device__ void sort_part(SortedPart<T>& part) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  int size = 2;
  while (size < part.count) size *= 2;
  for (int p = part.count + thread; p < kSorted; p += kSlabThreads)
    part.values[p] = static_cast<T>(__int_as_float(0x7f800000));
  __syncthreads();
  sort(part.values, size);

  double own[kSortedShare], sum = 0;
#pragma unroll
  for (int p = 0; p < kSortedShare; ++p) {
    const int at = thread * kSortedShare + p;
    own[p] = sum;
    if (at < part.count) sum += static_cast<double>(part.values[at]);
  }
  double through = sum;  // of the lanes up to this one
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const double other = __shfl_up_sync(kAllLanes, through, step);
    if (lane >= step) through += other;
  }
  if (lane == kWarp - 1) part.warps[warp] = through;
  __syncthreads();
  double base = __shfl_up_sync(kAllLanes, through, 1);
  if (lane == 0) base = 0;
  for (int w = 0; w < warp; ++w) base += part.warps[w];
#pragma unroll
  for (int p = 0; p < kSortedShare; ++p) part.before[thread * kSortedShare + p] = base + own[p];
  if (thread == kSlabThreads - 1) part.before[kSorted] = base + sum;
  __syncthreads();
}

// Results serve as accumulators: thread t owns thresholds t, t + kSlabThreads and so on.
template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    threshold_hinge_kernel(const ThresholdSumArgs args) {
  __shared__ SortedPart<T> part;
  __shared__ double base_sums[kSlabWarps];
  __shared__ int64_t base_counts[kSlabWarps];
  const DistanceRow<T> row(args.rows);
  const bool candidates = row.has_candidates();
  const bool spoiled = any_bad(args.rows.bad, args.rows.bad_count) && candidates;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const double* thresholds = args.thresholds + (args.rows.begin + blockIdx.x) * args.row_stride;
  const int64_t first = first_of(args.count, [=](int64_t k) { return !is_padding(thresholds[k]); });
  for (int64_t k = thread; k < args.count; k += kSlabThreads) write<T>(args, k, {0, 0, 0});
  if (thread == 0) part.count = 0;
  __syncthreads();
  if (first == args.count) return;
  const T lowest = limit_of(thresholds[first], T(0));
  // NaN comes last, as a sort puts it: then the highest number is not known.
  const double last = thresholds[args.count - 1];
  const T highest =
      last == last ? limit_of(last, T(0)) : static_cast<T>(__int_as_float(0x7f800000));

  // Adds what was listed to the thresholds of this thread.
  const auto flush = [&] {
    sort_part(part);
    const int64_t at = (args.rows.begin + blockIdx.x) * args.count;
    for (int64_t k = thread; k < args.count; k += kSlabThreads) {
      const T limit = limit_of(thresholds[k], T(0));
      const int64_t below =
          first_of(part.count, [&](int64_t p) { return !(part.values[p] < limit); });
      args.counts[at + k] += below;
      args.sums[at + k] += part.before[below];
    }
    __syncthreads();
    if (thread == 0) part.count = 0;
    __syncthreads();
  };

  double base_sum = 0;  // of the pairs below all thresholds
  int64_t base_count = 0;
  for (int64_t begin = 0; begin < row.m(); begin += kSlabThreads) {
    const int64_t j = begin + thread;
    const T d = j < row.m() ? row[j] : not_a_number<T>();
    if (d < lowest) {
      base_sum += static_cast<double>(d);
      base_count += 1;
    }
    const bool listed = d >= lowest && d < highest;
    const uint32_t lanes = __ballot_sync(kAllLanes, listed);
    // In whatever order: they are sorted.
    int at = 0;
    if (lane == 0) at = atomicAdd(&part.count, __popc(lanes));
    at = __shfl_sync(kAllLanes, at, 0) + __popc(lanes & ((1u << lane) - 1));
    if (listed) part.values[at] = d;
    __syncthreads();
    const bool full = part.count > kSorted - kSlabThreads;
    __syncthreads();  // all have seen the count
    if (full) flush();
  }
  if (part.count > 0) flush();

  base_sum = warp_sum(base_sum);
  base_count = warp_sum(base_count);
  if (lane == 0) {
    base_sums[warp] = base_sum;
    base_counts[warp] = base_count;
  }
  __syncthreads();
  base_sum = 0;
  base_count = 0;
  for (int w = 0; w < kSlabWarps; ++w) {
    base_sum += base_sums[w];
    base_count += base_counts[w];
  }
  for (int64_t k = thread; k < args.count; k += kSlabThreads) {
    if (k < first) continue;
    const int64_t at = (args.rows.begin + blockIdx.x) * args.count + k;
    const int64_t below = args.counts[at] + base_count;
    const double count = static_cast<double>(below);
    double sum = below == 0 ? 0.0 : count * thresholds[k] - (args.sums[at] + base_sum);
    sum = sum < 0.0 ? 0.0 : sum;
    const bool unknown = !(thresholds[k] == thresholds[k]);
    const bool nan = spoiled || (unknown && candidates);
    write<T>(args, k,
             {nan ? not_a_number<double>() : sum, nan ? not_a_number<double>() : count,
              unknown ? 0 : below});
  }
}

}  // namespace

template <class T>
cudaError_t threshold_sum(const ThresholdSumArgs& args, int64_t rows, cudaStream_t stream) {
  const bool sorted = args.term == Term::kHinge && args.count > kSweptThresholds;
  const auto kernel = sorted ? threshold_hinge_kernel<T> : threshold_sum_kernel<T>;
  kernel<<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t threshold_sum<float>(const ThresholdSumArgs&, int64_t, cudaStream_t);
template cudaError_t threshold_sum<double>(const ThresholdSumArgs&, int64_t, cudaStream_t);

}  // namespace flashmetric::cuda
