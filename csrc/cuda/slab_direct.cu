// SPDX-License-Identifier: Apache-2.0
// The distances that no inner product yields, summed feature by feature where others have a
// product, and the gradient of a weighted sum of them. Tiles as in slab_product.cu. 8 kernels.
#include <flashmetric/cuda_select.h>
#include <slab_tile.cuh>

namespace flashmetric::cuda {
namespace {

// out = u(a, b).
template <class T, class D>
__global__ void __launch_bounds__(kProductThreads) direct_kernel(const DirectArgs args) {
  __shared__ alignas(16) Tile<T> a, b;
  const ProductArgs& p = args.product;
  const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
  const int64_t row = int64_t{blockIdx.y} * kProductTile;
  const int64_t column = int64_t{blockIdx.x} * kProductTile;
  T total[kOwn][kOwn] = {}, sum[kOwn][kOwn] = {};
  for (int64_t begin = 0; begin < p.k; begin += kProductDepth) {
    if (kChains<T> && begin % kChain == 0) close_chain(sum, total);
    load_rows(static_cast<const T*>(p.a), p.m, row, p.k, begin, a);
    load_rows(static_cast<const T*>(p.b), p.n, column, p.k, begin, b);
    __syncthreads();
    // Features beyond the last are 0 in both rows and add nothing.
#pragma unroll 4
    for (int depth = 0; depth < kProductDepth; ++depth) {
      T left[kOwn], right[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) left[i] = a[depth][y * kOwn + i];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) right[j] = b[depth][x * kOwn + j];
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sum[i][j] += D::term(left[i], right[j]);
    }
    __syncthreads();  // before the tiles are loaded anew
  }
  close_chain(sum, total);
  store_tile(p, row, column, total);
}

// out = a times the gradients of u(x, b) in x.
template <class T, class D>
__global__ void __launch_bounds__(kProductThreads, 1)
    direct_pull_kernel(const DirectPullArgs args) {
  __shared__ alignas(16) Tile<T> a, b;
  const ProductArgs& p = args.product;
  const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
  const int64_t row = int64_t{blockIdx.y} * kProductTile;
  const int64_t column = int64_t{blockIdx.x} * kProductTile;
  T own[kOwn][kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t at_row = row + y * kOwn + i, at = column + x * kOwn + c;
      const bool inside = at_row < p.m && at < p.n;
      own[i][c] = inside ? static_cast<const T*>(args.x)[at_row * p.n + at] : T(0);
    }
  T total[kOwn][kOwn] = {}, sum[kOwn][kOwn] = {};
  for (int64_t begin = 0; begin < p.k; begin += kProductDepth) {
    if (kChains<T> && begin % kChain == 0) close_chain(sum, total);
    load_rows(static_cast<const T*>(p.a), p.m, row, p.k, begin, a);
    load_columns(static_cast<const T*>(p.b), p.n, column, p.k, begin, b);
    __syncthreads();
#pragma unroll 1
    for (int depth = 0; depth < kProductDepth; ++depth) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const T h = a[depth][y * kOwn + i];
        if (h == T(0)) continue;  // most pairs are not of the kind, or beyond their threshold
#pragma unroll
        for (int c = 0; c < kOwn; ++c)
          sum[i][c] += h * D::gradient(own[i][c], b[depth][x * kOwn + c]);
      }
    }
    __syncthreads();  // before the tiles are loaded anew
  }
  close_chain(sum, total);
  store_tile(p, row, column, total);
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, cudaStream_t stream) {
  const ProductPlan plan = plan_product(args.product.m, args.product.n);
  if (plan.grid_x == 0 || plan.grid_y == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  kernel<<<grid, kProductThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t slab_direct(const DirectArgs& args, cudaStream_t stream) {
  return args.distance == Distance::kChi2 ? launch(direct_kernel<T, Chi2>, args, stream)
                                          : launch(direct_kernel<T, Cityblock>, args, stream);
}
template cudaError_t slab_direct<float>(const DirectArgs&, cudaStream_t);
template cudaError_t slab_direct<double>(const DirectArgs&, cudaStream_t);

template <class T>
cudaError_t slab_direct_pull(const DirectPullArgs& args, cudaStream_t stream) {
  return args.distance == Distance::kChi2 ? launch(direct_pull_kernel<T, Chi2>, args, stream)
                                          : launch(direct_pull_kernel<T, Cityblock>, args, stream);
}
template cudaError_t slab_direct_pull<float>(const DirectPullArgs&, cudaStream_t);
template cudaError_t slab_direct_pull<double>(const DirectPullArgs&, cudaStream_t);

}  // namespace flashmetric::cuda
