// SPDX-License-Identifier: Apache-2.0
// pair_distance: one warp a pair, by exact differences. Its gradient: each row of the result
// gathers the pairs that name it and is written once; no atomics, and an order of adding up that
// depends on the list alone. 8 kernels: two for each dtype of the rows.
//
// Gradient: a warp owns one row (all warps of the block, if many pairs name it) and 256 of its
// columns, in registers; blockIdx.y is the part of the columns. Pairs come from a sorted list, by
// the structure of the list (pair t is of row t % n), or from scanning the whole list.
#include <flashmetric/cuda_pairs.h>
#include <exact.cuh>

namespace flashmetric::cuda {
namespace {

__device__ __forceinline__ bool missing(int64_t i, int64_t j) { return i == -1 || j == -1; }
__device__ __forceinline__ bool is_row(int64_t i, int64_t rows) { return i >= 0 && i < rows; }

__device__ __forceinline__ int64_t query_of(const ListedPairs& pairs, int64_t t) {
  if (pairs.query_index != nullptr) return pairs.query_index[t];
  return static_cast<uint32_t>(t) % static_cast<uint32_t>(pairs.n);
}

template <class S>
__global__ void __launch_bounds__(kPairThreads) pair_distance_kernel(const PairDistanceArgs args) {
  using T = accumulate_t<S>;
  const ListedPairs& pairs = args.pairs;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t t = int64_t{blockIdx.x} * kPairWarps + threadIdx.x / kWarp;
  if (t >= pairs.count) return;
  const int64_t i = query_of(pairs, t), j = pairs.ref_index[t];
  T value = 0;
  if (is_row(i, pairs.n) && is_row(j, pairs.m)) {
    const T u = exact_u(pairs.distance, static_cast<const S*>(pairs.query) + i * pairs.d,
                        static_cast<const S*>(pairs.ref) + j * pairs.d, pairs.d, lane);
    value = with_distance(pairs.distance, [=](auto d) { return decltype(d)::value(u); });
  } else if (!missing(i, j)) {
    value = not_a_number<T>();
  }
  if (lane == 0) static_cast<T*>(args.out)[t] = value;
}

// First entry whose row is not below `row`, found by a whole warp: 32 probes at a time.
__device__ int32_t lower_bound(const int32_t* rows, int32_t count, int32_t row, int lane) {
  int32_t begin = 0;
  while (count > 0) {
    const int32_t step = (count + kWarp - 1) / kWarp;
    const int32_t at = lane * step;
    const bool below = at < count && rows[begin + at] < row;
    const int32_t probes = __popc(__ballot_sync(kAllLanes, below));
    if (probes == 0) return begin;
    // After the last probe below, before or at the next one.
    const int32_t low = (probes - 1) * step + 1;
    const int32_t high = probes * step < count ? probes * step : count;
    begin += low;
    count = high - low;
  }
  return begin;
}

// The entries where pairs that name one row may be found, for either of its roles.
struct Entries {
  int32_t begin[2], end[2];

  __device__ bool many() const { return int64_t{end[0]} - begin[0] + end[1] - begin[1] > kLongRow; }
};

constexpr int kAsQuery = 0, kAsRef = 1;

// One row of one of the results.
template <class S>
class GradientRow {
  using T = accumulate_t<S>;

 public:
  // Rows of ref follow those of query.
  __device__ GradientRow(const PairGradientArgs& args, int64_t number)
      : args_(args), pairs_(args.pairs), of_ref_(number >= args.pairs.n) {
    row_ = of_ref_ ? number - pairs_.n : number;
    own_ = static_cast<const S*>(of_ref_ ? pairs_.ref : pairs_.query) + row_ * pairs_.d;
    out_ = static_cast<S*>(of_ref_ ? args.grad_ref : args.grad_query) + row_ * pairs_.d;
  }

  __device__ Entries entries(int lane) const {
    Entries e;
#pragma unroll
    for (int role = kAsQuery; role <= kAsRef; ++role) {
      e.begin[role] = e.end[role] = 0;
      if (!(role == kAsRef ? of_ref_ || args_.self : !of_ref_)) continue;
      const SortedPairs& sorted = role == kAsQuery ? args_.by_query : args_.by_ref;
      const int32_t count = static_cast<int32_t>(pairs_.count);
      if (structured(role)) {
        e.end[role] = count / static_cast<int32_t>(pairs_.n);
      } else if (sorted.rows != nullptr) {
        const int32_t row = static_cast<int32_t>(row_);
        e.begin[role] = lower_bound(sorted.rows, count, row, lane);
        e.end[role] = lower_bound(sorted.rows, count, row + 1, lane);
      } else {
        e.end[role] = count;
      }
    }
    return e;
  }

  // sum[c] += what the entries give to column `column + c * kWarp`; this warp takes every
  // `warps`-th 32 of them.
  __device__ void gather(const Entries& e, int warp, int warps, int64_t column, int lane,
                         T (&sum)[kLaneColumns]) const {
    T x[kLaneColumns];
    load(own_ + column, column, x);
#pragma unroll 1
    for (int role = kAsQuery; role <= kAsRef; ++role) {
      for (int32_t at = e.begin[role] + warp * kWarp; at < e.end[role]; at += warps * kWarp) {
        const Term term = at + lane < e.end[role] ? find(role, at + lane) : Term{};
        add(role, term, x, column, lane, sum);
      }
    }
  }

  __device__ void write(int64_t column, T value) const {
    if (column < pairs_.d) out_[column] = static_cast<S>(value);
  }

 private:
  // What one pair brings: a multiple of x - y, or (dot) of y, or (direct distances) of a function
  // of both, where y is a row of the other side.
  struct Term {
    T weight = 0;
    int32_t other = 0;   // -1: names no row
    bool apart = false;  // may join a zero row of a distance of unit rows
  };

  __device__ bool structured(int role) const {
    return role == kAsQuery && pairs_.query_index == nullptr;
  }

  __device__ Term find(int role, int32_t entry) const {
    const SortedPairs& sorted = role == kAsQuery ? args_.by_query : args_.by_ref;
    const int64_t t = structured(role)         ? entry * pairs_.n + row_
                      : sorted.rows != nullptr ? sorted.pairs[entry]
                                               : entry;
    const int64_t i = query_of(pairs_, t), j = pairs_.ref_index[t];
    // Also of a sorted list, in which a number beyond 32 bits may stand among those of this row.
    if ((role == kAsQuery ? i : j) != row_ || missing(i, j)) return {};
    const int64_t other = role == kAsQuery ? j : i;
    if (!is_row(other, role == kAsQuery ? pairs_.m : pairs_.n))
      return {not_a_number<T>(), -1, false};
    T grad = static_cast<const T*>(args_.grad)[t];
    if (args_.factor[0] != nullptr)
      grad *= *static_cast<const T*>(args_.factor[0]) * *static_cast<const T*>(args_.factor[1]);
    const T value = static_cast<const T*>(args_.value)[t];
    const Distance distance = pairs_.distance;
    const T du_dx = is_direct(distance) ? T(1) : is_difference(distance) ? T(2) : T(-2);
    // A pair with a zero row is at u = 2, or NaN in a batch that is not finite.
    const T flat = with_distance(distance, [](auto d) { return decltype(d)::value(T(2)); });
    constexpr T kSlack = sizeof(T) == 8 ? T(1e-14) : T(1e-6);
    const bool apart = has_unit_rows(distance) && !(value < flat - kSlack * flat) &&
                       !(value > flat + kSlack * flat);
    return {du_dx * (grad * slope_at(pairs_.distance, value)), static_cast<int32_t>(other), apart};
  }

  __device__ void add(int role, const Term& term, const T (&x)[kLaneColumns], int64_t column,
                      int lane, T (&sum)[kLaneColumns]) const {
    const S* others = static_cast<const S*>(role == kAsQuery ? pairs_.ref : pairs_.query);
    const Distance distance = pairs_.distance;
    const bool difference = is_difference(distance);
    uint32_t found = __ballot_sync(kAllLanes, term.weight != T(0));
    while (found != 0) {
      const int from = __ffs(static_cast<int>(found)) - 1;
      found &= found - 1;
      const T weight = __shfl_sync(kAllLanes, term.weight, from);
      const int32_t other = __shfl_sync(kAllLanes, term.other, from);
      const bool apart = __shfl_sync(kAllLanes, term.apart, from);
      const S* y = other < 0 ? own_ : others + other * pairs_.d;
      if (apart && (is_zero(own_, lane) || is_zero(y, lane))) continue;
      T b[kLaneColumns];
      load(y + column, column, b);
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) {
        T step = difference ? x[c] - b[c] : b[c];
        if (distance == Distance::kCityblock) step = Cityblock::gradient(x[c], b[c]);
        if (distance == Distance::kChi2) step = Chi2::gradient(x[c], b[c]);
        sum[c] += weight * step;
      }
    }
  }

  // Columns `column + c * kWarp` of a row, from a pointer to the first; 0 beyond the last.
  __device__ void load(const S* from, int64_t column, T (&to)[kLaneColumns]) const {
    const int left = columns_left(column);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      to[c] = c * kWarp < left ? static_cast<T>(from[c * kWarp]) : T(0);
  }
  __device__ int columns_left(int64_t column) const {
    const int64_t left = pairs_.d - column;
    return left < kPartColumns ? static_cast<int>(left) : kPartColumns;
  }

  // As exact_u judges it.
  __device__ bool is_zero(const S* y, int lane) const {
    T norm = 0;
    for (int64_t k = lane; k < pairs_.d; k += kWarp) {
      const T b = static_cast<T>(y[k]);
      norm += b * b;
    }
    return warp_sum(norm) == T(0);
  }

  const PairGradientArgs& args_;
  const ListedPairs& pairs_;
  const bool of_ref_;
  int64_t row_;
  const S* own_;
  S* out_;
};

// Blocks per multiprocessor that still leave registers enough.
template <class S>
constexpr int kGradientBlocks = sizeof(S) == 8 ? 2 : 3;

template <class S>
__global__ void __launch_bounds__(kPairThreads, kGradientBlocks<S>)
    pair_gradient_kernel(const PairGradientArgs args) {
  using T = accumulate_t<S>;
  __shared__ T partial[kPairWarps][kPartColumns];
  __shared__ Entries entries[kPairWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int64_t rows = args.pairs.n + (args.ref_rows ? args.pairs.m : 0);
  const int64_t first = int64_t{blockIdx.x} * args.rows_per_block;
  const int64_t left = rows - first;
  const int own_rows = static_cast<int>(left < args.rows_per_block ? left : args.rows_per_block);
  const int64_t part = int64_t{blockIdx.y} * kPartColumns, column = part + lane;

  if (warp < own_rows) {
    const Entries e = GradientRow<S>(args, first + warp).entries(lane);
    if (lane == 0) entries[warp] = e;
  }
  __syncthreads();

  // Rows named by many pairs in turn, by all warps, 32 entries to each at a time; then each warp
  // its own row.
#pragma unroll 1
  for (int turn = 0; turn <= own_rows; ++turn) {
    const bool together = turn < own_rows;
    const int r = together ? turn : warp;
    if (r >= own_rows || entries[r].many() != together) continue;
    const GradientRow<S> row(args, first + r);
    T sum[kLaneColumns] = {};
    row.gather(entries[r], together ? warp : 0, together ? kPairWarps : 1, column, lane, sum);
    if (!together) {
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) row.write(column + c * kWarp, sum[c]);
      break;
    }
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) partial[warp][c * kWarp + lane] = sum[c];
    __syncthreads();
    T total = 0;
#pragma unroll
    for (int w = 0; w < kPairWarps; ++w) total += partial[w][thread];
    row.write(part + thread, total);
    __syncthreads();  // before the next row's sums
  }
}

}  // namespace

cudaError_t pair_distance(const PairDistanceArgs& args, cudaStream_t stream) {
  const int64_t grid = plan_pair_distance(args.pairs.count);
  if (grid == 0) return cudaSuccess;
  with_rows(args.pairs.scalar, [&](auto type) {
    pair_distance_kernel<decltype(type)>
        <<<static_cast<unsigned>(grid), kPairThreads, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

cudaError_t pair_gradient(const PairGradientArgs& args, const PairGradientPlan& plan,
                          cudaStream_t stream) {
  if (plan.grid_x == 0 || plan.grid_y == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  with_rows(args.pairs.scalar, [&](auto type) {
    pair_gradient_kernel<decltype(type)><<<grid, kPairThreads, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace flashmetric::cuda
