// SPDX-License-Identifier: Apache-2.0
// The first and the last step of the ops that look at all distances of a slab of rows: products ->
// distances of the wanted pairs, and weights of pairs -> gradients of the rows. 6 kernels.
#include <flashmetric/cuda_select.h>
#include <slab_row.cuh>

namespace flashmetric::cuda {
namespace {

// Blocks per multiprocessor that still leave registers enough.
template <class T>
constexpr int kDistanceBlocks = sizeof(T) == 8 ? 2 : 3;

template <class T>
__global__ void __launch_bounds__(kSlabThreads, kDistanceBlocks<T>)
    slab_distance_kernel(const SlabDistanceArgs args) {
  const bool poisoned = any_bad(args.problem.bad, args.problem.bad_count);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const LabelledRow<T> row(args.problem, args.labelling, blockIdx.x);
  const int64_t m = row.m();
  T* slab = static_cast<T*>(args.slab) + blockIdx.x * m;
  for (int64_t begin = warp * kWarp; begin < m; begin += kSlabThreads) {
    const int64_t j = begin + lane;
    const int kind = j < m ? row.kind(j) : kNeither;
    const bool wanted = kind == args.kind || (args.kind == kBothKinds && kind != kNeither);
    T u = 0;
    bool is_near = false;
    if (wanted && !poisoned) {
      u = row.u(j, slab[j]);
      is_near = row.difference() && !row.apart(j) && u < row.near_below(j);
    }
    const uint32_t marks = __ballot_sync(kAllLanes, is_near);
    for (uint32_t left = marks; left != 0; left &= left - 1) {
      const int bit = __ffs(static_cast<int>(left)) - 1;
      const T exact = row.measure(begin + bit, lane);
      if (lane == bit) u = exact;
    }
    if (lane == 0 && args.near != nullptr)
      args.near[blockIdx.x * near_words(m) + begin / kWarp] = marks;
    if (j >= m) continue;
    T d = not_a_number<T>();
    if (wanted) d = poisoned ? T(0) : row.value(u);
    slab[j] = d;
  }
}

// S is the type of the gradient. Near pairs are added one by one: in products, rows that all but
// cancel would leave of their difference what rounding does.
template <class S>
__global__ void __launch_bounds__(kSlabThreads) slab_gradient_kernel(const SlabGradientArgs args) {
  using T = accumulate_t<S>;
  __shared__ T grads[kSlabWarps][kSlabThreads];
  const bool poisoned = any_bad(args.problem.bad, args.problem.bad_count);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int64_t i = args.problem.begin + blockIdx.x, column = int64_t{blockIdx.y} * kSlabThreads;
  const int64_t m = args.problem.r.n, d = args.problem.d;
  const T* x = static_cast<const T*>(args.problem.x.rows) + i * d;
  T total = 0;
  if (args.near != nullptr) {
    const T* weights = static_cast<const T*>(args.near_weight) + blockIdx.x * m;
    const uint32_t* near = args.near + blockIdx.x * near_words(m);
    const int64_t left = d - column - lane;
    T sum[kSlabColumns] = {};
    for (int64_t word = warp; word < near_words(m); word += kSlabWarps) {
      for (uint32_t marks = near[word]; marks != 0; marks &= marks - 1) {
        const int64_t j = word * kWarp + __ffs(static_cast<int>(marks)) - 1;
        const T h = weights[j];
        if (h == T(0)) continue;
        const T* r = static_cast<const T*>(args.problem.r.rows) + j * d;
#pragma unroll
        for (int c = 0; c < kSlabColumns; ++c) {
          const int64_t k = column + lane + c * kWarp;
          if (c * kWarp < left) sum[c] += h * (x[k] - r[k]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kSlabColumns; ++c) grads[warp][c * kWarp + lane] = sum[c];
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kSlabWarps; ++w) total += grads[w][thread];
  }
  const int64_t k = column + thread;
  if (k >= d) return;
  const Distance distance = args.problem.distance;
  const double pulled = static_cast<double>(static_cast<const T*>(args.pulled)[blockIdx.x * d + k]);
  const double own =
      is_difference(distance) ? args.total[blockIdx.x] * static_cast<double>(x[k]) : 0.0;
  total += static_cast<T>(is_direct(distance) ? pulled : own - pulled);
  // Without any pair rows that are not finite show nowhere, not in products with zeros either.
  const bool has_pairs = m > (args.problem.self ? 1 : 0);
  if (!has_pairs) total = T(0);
  if (poisoned && has_pairs) total = not_a_number<T>();
  static_cast<S*>(args.grad)[i * d + k] = static_cast<S>(total);
}

}  // namespace

template <class T>
cudaError_t slab_distance(const SlabDistanceArgs& args, int64_t rows, cudaStream_t stream) {
  slab_distance_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t slab_distance<float>(const SlabDistanceArgs&, int64_t, cudaStream_t);
template cudaError_t slab_distance<double>(const SlabDistanceArgs&, int64_t, cudaStream_t);

cudaError_t slab_gradient(const SlabGradientArgs& args, Scalar grad_scalar, int64_t rows,
                          cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(rows),
                  static_cast<unsigned>(plan_gradient_parts(args.problem.d)));
  with_rows(grad_scalar, [&](auto type) {
    slab_gradient_kernel<decltype(type)><<<grid, kSlabThreads, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace flashmetric::cuda
