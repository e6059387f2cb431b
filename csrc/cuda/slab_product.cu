// SPDX-License-Identifier: Apache-2.0
// Plain matrix products in the accumulate type: for float64, whose cuBLAS products torch refuses in
// deterministic mode, and for float32 where a product without tensor cores is asked for. A block of
// 256 threads computes a tile of 64 x 64, a thread 4 x 4 of it. 4 kernels.
#include <slab_tile.cuh>

namespace flashmetric::cuda {
namespace {

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
  store_tile(args, row, column, total);
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
