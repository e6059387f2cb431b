// SPDX-License-Identifier: Apache-2.0
// Plain matrix products in the accumulate type: for float64, whose cuBLAS products torch refuses in
// deterministic mode, and for float32 where a product without tensor cores is asked for. A block of
// 256 threads computes a tile of 64 x 64, a thread 4 x 4 of it. 4 kernels.
#include <exact.cuh>
#include <slab.cuh>

namespace flashmetric::cuda {
namespace {

constexpr int kSide = kProductSide;
constexpr int kOwn = kProductTile / kSide;    // outputs of a thread along either side
constexpr int kPadded = kProductTile + kOwn;  // spreads the stores of a transposed load over banks
// Depth that floats sum in one chain: their error then does not grow with the depth.
constexpr int kChain = 256;
template <class T>
constexpr bool kChains = sizeof(T) == 4;
constexpr int kLoads = kProductTile * kProductDepth / kProductThreads;
static_assert(kChain % kProductDepth == 0, "chains end between steps");

// Rows of one operand as [depth][row].
template <class T>
using Tile = T[kProductDepth][kPadded];

// From [rows, k], whose neighbours are neighbours in depth.
template <class T>
__device__ __forceinline__ void load_rows(const T* from, int64_t rows, int64_t row, int64_t k,
                                          int64_t begin, Tile<T>& to) {
#pragma unroll
  for (int q = 0; q < kLoads; ++q) {
    const int at = static_cast<int>(threadIdx.x) + q * kProductThreads;
    const int depth = at % kProductDepth, i = at / kProductDepth;
    const bool inside = row + i < rows && begin + depth < k;
    to[depth][i] = inside ? from[(row + i) * k + begin + depth] : T(0);
  }
}

// From [k, columns].
template <class T>
__device__ __forceinline__ void load_columns(const T* from, int64_t columns, int64_t column,
                                             int64_t k, int64_t begin, Tile<T>& to) {
#pragma unroll
  for (int q = 0; q < kLoads; ++q) {
    const int at = static_cast<int>(threadIdx.x) + q * kProductThreads;
    const int depth = at / kProductTile, i = at % kProductTile;
    const bool inside = column + i < columns && begin + depth < k;
    to[depth][i] = inside ? from[(begin + depth) * columns + column + i] : T(0);
  }
}

template <class T>
__device__ __forceinline__ void close_chain(T (&sum)[kOwn][kOwn], T (&total)[kOwn][kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      total[i][j] += sum[i][j];
      sum[i][j] = T(0);
    }
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(kProductThreads) product_kernel(const ProductArgs args) {
  __shared__ alignas(16) Tile<T> a, b;
  const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
  const int64_t row = int64_t{blockIdx.y} * kProductTile;
  const int64_t column = int64_t{blockIdx.x} * kProductTile;
  T total[kOwn][kOwn] = {}, sum[kOwn][kOwn] = {};
  for (int64_t begin = 0; begin < args.k; begin += kProductDepth) {
    if (kChains<T> && begin % kChain == 0) close_chain(sum, total);
    load_rows(static_cast<const T*>(args.a), args.m, row, args.k, begin, a);
    if constexpr (kTransposed) {
      load_rows(static_cast<const T*>(args.b), args.n, column, args.k, begin, b);
    } else {
      load_columns(static_cast<const T*>(args.b), args.n, column, args.k, begin, b);
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kProductDepth; ++depth) {
      T left[kOwn], right[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) left[i] = a[depth][y * kOwn + i];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) right[j] = b[depth][x * kOwn + j];
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sum[i][j] += left[i] * right[j];
    }
    __syncthreads();  // before the tiles are loaded anew
  }
  close_chain(sum, total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t at_row = row + y * kOwn + i;
    if (at_row >= args.m) break;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t at = column + x * kOwn + j;
      if (at < args.n) static_cast<T*>(args.out)[at_row * args.n + at] = total[i][j];
    }
  }
}

}  // namespace

template <class T>
cudaError_t slab_product(const ProductArgs& args, bool transposed, cudaStream_t stream) {
  const ProductPlan plan = plan_product(args.m, args.n);
  if (plan.grid_x == 0 || plan.grid_y == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  if (transposed) {
    product_kernel<T, true><<<grid, kProductThreads, 0, stream>>>(args);
  } else {
    product_kernel<T, false><<<grid, kProductThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

template cudaError_t slab_product<float>(const ProductArgs&, bool, cudaStream_t);
template cudaError_t slab_product<double>(const ProductArgs&, bool, cudaStream_t);

}  // namespace flashmetric::cuda
