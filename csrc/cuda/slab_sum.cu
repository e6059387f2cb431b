// SPDX-License-Identifier: Apache-2.0
// The slab engine's pair sums. slab_weigh turns a slab of inner products in place into the weights
// h = 2 d(loss)/du of a gradient sum_j h_ij (x_i - r_j), and adds up the losses. Pairs so near that
// products have lost their digits are only marked there; slab_sum_finish measures them by exact
// differences and completes sums and gradient: sum_j h_ij x_i - (h r)_i, and the marked pairs one
// by one. 6 kernels.
#include <slab_row.cuh>

namespace flashmetric::cuda {
namespace {

// The loss of one pair and its derivative in u.
template <class T>
struct PairLoss {
  T loss, slope;
  bool active;
};

template <class T>
class SumRow : public SlabRow<T> {
 public:
  __device__ SumRow(const SlabSumArgs& args, int64_t row_of_slab)
      : SlabRow<T>(args.problem, row_of_slab), args_(args) {}

  __device__ PairLoss<T> loss(bool same, T u) const {
    const T d = this->value(u);
    const T margin = static_cast<T>(args_.margin[same ? 0 : 1]);
    const T z = same ? d - margin : margin - d;
    if (!(z > T(0))) return {T(0), T(0), false};
    const T outer = slope_at(args_.problem.distance, d);
    return with_formula(args_.formula, [=](auto f) {
      const T slope = decltype(f)::slope(z) * outer;
      return PairLoss<T>{decltype(f)::value(z), same ? slope : -slope, true};
    });
  }

  // Of the pair with row j in the objective.
  __device__ T weight(bool same, int64_t j) const {
    const T* weights = static_cast<const T*>(args_.weight[same ? 0 : 1]);
    if (args_.problem.self) return weights == nullptr ? T(2) : weights[this->number()] + weights[j];
    if (weights == nullptr) return T(1);
    return weights[args_.weight_by_ref ? j : this->number()];
  }

 private:
  const SlabSumArgs& args_;
};

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2) slab_weigh_kernel(const SlabSumArgs args) {
  __shared__ SlabPart found[2][kSlabWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t slab_row = blockIdx.x, m = args.problem.r.n;
  const SumRow<T> row(args, slab_row);
  T* products = static_cast<T*>(args.products) + slab_row * m;
  T* positive = static_cast<T*>(args.positive) + slab_row * m;
  uint32_t* near = args.near + slab_row * near_words(m);

  SlabPart part[2] = {};
  for (int64_t begin = warp * kWarp; begin < m; begin += kSlabThreads) {
    const int64_t j = begin + lane;
    const bool inside = j < m && !row.is_self(j);
    const bool same = inside && row.same(j);
    bool is_near = false;
    T h = 0;
    if (inside) {
      const T u = row.u(j, products[j]);
      is_near = row.difference() && !row.apart(j) && u < row.near_below(j);
      PairLoss<T> pair{T(0), T(0), false};
      if (!is_near) pair = row.loss(same, u);
      // A zero row is at a constant cosine distance from every row.
      if (pair.active && !row.apart(j)) h = T(2) * pair.slope * row.weight(same, j);
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        if (same != (kind == 0)) continue;
        part[kind].loss += static_cast<double>(pair.loss);
        part[kind].weight += static_cast<double>(h);
        part[kind].pairs += 1;
        part[kind].active += pair.active;
      }
    }
    const uint32_t marks = __ballot_sync(kAllLanes, is_near);
    if (lane == 0) near[begin / kWarp] = marks;
    if (!args.with_grad || j >= m) continue;
    products[j] = same && !args.merged ? T(0) : h;
    if (!args.merged) positive[j] = same ? h : T(0);
  }

#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    const SlabPart sum{warp_sum(part[kind].loss), warp_sum(part[kind].weight),
                       warp_sum(part[kind].pairs), warp_sum(part[kind].active)};
    if (lane == 0) found[kind][warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  SlabPart total{};
  for (int w = 0; w < kSlabWarps; ++w) {
    const SlabPart& other = found[threadIdx.x][w];
    total.loss += other.loss;
    total.weight += other.weight;
    total.pairs += other.pairs;
    total.active += other.active;
  }
  args.parts[threadIdx.x * int64_t{gridDim.x} + slab_row] = total;
}

// What a block, or one of its warps, adds for the marked pairs of a row.
template <class T>
struct NearSum {
  double loss = 0;
  int64_t active = 0;
  T grad[kSlabColumns] = {};  // columns `column + c * kWarp`
};

template <class T>
__device__ void near_pair(const SlabSumArgs& args, const SumRow<T>& row, int64_t j, bool same,
                          int64_t column, int lane, NearSum<T>& sum) {
  const PairLoss<T> pair = row.loss(same, row.measure(j, lane));
  if (!pair.active) return;
  sum.loss += static_cast<double>(pair.loss);
  sum.active += 1;
  if (!args.with_grad) return;
  const T h = T(2) * pair.slope * row.weight(same, j);
  const T* x = row.x() + column;
  const T* r = row.r(j) + column;
  const int64_t left = args.problem.d - column;
#pragma unroll
  for (int c = 0; c < kSlabColumns; ++c)
    if (c * kWarp < left) sum.grad[c] += h * (x[c * kWarp] - r[c * kWarp]);
}

// S is the type of the gradient.
template <class S>
__global__ void __launch_bounds__(kSlabThreads, 2) slab_sum_finish_kernel(const SlabSumArgs args) {
  using T = accumulate_t<S>;
  __shared__ T grads[kSlabWarps][kSlabThreads];
  __shared__ double losses[kSlabWarps];
  __shared__ int64_t actives[kSlabWarps];
  const bool poisoned = any_bad(args.problem.bad, args.problem.bad_count);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int kind = static_cast<int>(blockIdx.z);
  const int64_t slab_row = blockIdx.x, column = int64_t{blockIdx.y} * kSlabThreads;
  const int64_t n = args.problem.x.n, m = args.problem.r.n, d = args.problem.d;
  const SumRow<T> row(args, slab_row);

  NearSum<T> sum;
  const int64_t words = near_words(m);
  const uint32_t* near = args.near + slab_row * words;
  for (int64_t begin = warp * kWarp; begin < words; begin += kSlabThreads) {
    const uint32_t own = begin + lane < words ? near[begin + lane] : 0;
    uint32_t filled = __ballot_sync(kAllLanes, own != 0);
    while (filled != 0) {
      const int word = __ffs(static_cast<int>(filled)) - 1;
      filled &= filled - 1;
      uint32_t marks = __shfl_sync(kAllLanes, own, word);
      while (marks != 0) {
        const int64_t j = (begin + word) * kWarp + __ffs(static_cast<int>(marks)) - 1;
        marks &= marks - 1;
        const bool same = row.same(j);
        if (args.merged || same == (kind == 0))
          near_pair(args, row, j, same, column + lane, lane, sum);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kSlabColumns; ++c) grads[warp][c * kWarp + lane] = sum.grad[c];
  if (lane == 0) {
    losses[warp] = sum.loss;
    actives[warp] = sum.active;
  }
  __syncthreads();

  const SlabPart* parts = args.parts + slab_row;
  const int64_t kind_stride = gridDim.x;
  if (args.sums != nullptr && blockIdx.y == 0 && thread == 0) {
    const SlabPart& part = parts[kind * kind_stride];
    double loss = part.loss;
    int64_t active = part.active;
    for (int w = 0; w < kSlabWarps; ++w) {
      loss += losses[w];
      active += actives[w];
    }
    const int64_t at = kind * n + row.number();
    // Compare-and-skip rules would drop pairs with NaN.
    static_cast<T*>(args.sums)[at] =
        poisoned && part.pairs > 0 ? not_a_number<T>() : static_cast<T>(loss);
    args.counts[at] = part.pairs;
    args.counts[2 * n + at] = active;
  }
  if (!args.with_grad || column + thread >= d) return;
  double weight = parts[kind * kind_stride].weight;
  if (args.merged) weight += parts[kind_stride].weight;
  T total = 0;
#pragma unroll
  for (int w = 0; w < kSlabWarps; ++w) total += grads[w][thread];
  const int64_t k = column + thread;
  const double pulled =
      static_cast<double>(static_cast<const T*>(args.pulled[kind])[slab_row * d + k]);
  const double own = row.difference() ? weight * static_cast<double>(row.x()[k]) : 0.0;
  total += static_cast<T>(own - pulled);
  // Without any pair rows that are not finite show nowhere, not in products with zeros either.
  const bool has_pairs = m > (args.problem.self ? 1 : 0);
  if (!has_pairs) total = T(0);
  if (poisoned && has_pairs) total = not_a_number<T>();
  static_cast<S*>(args.grad)[(kind * n + row.number()) * d + k] = static_cast<S>(total);
}

}  // namespace

template <class T>
cudaError_t slab_weigh(const SlabSumArgs& args, int64_t rows, cudaStream_t stream) {
  slab_weigh_kernel<T><<<static_cast<unsigned>(rows), kSlabThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t slab_weigh<float>(const SlabSumArgs&, int64_t, cudaStream_t);
template cudaError_t slab_weigh<double>(const SlabSumArgs&, int64_t, cudaStream_t);

cudaError_t slab_sum_finish(const SlabSumArgs& args, Scalar grad_scalar, int64_t rows,
                            cudaStream_t stream) {
  const SlabFinishPlan plan = plan_slab_finish(args.problem.d, args.with_grad, args.merged);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(plan.grid_y),
                  static_cast<unsigned>(plan.grid_z));
  with_rows(grad_scalar, [&](auto type) {
    slab_sum_finish_kernel<decltype(type)><<<grid, kSlabThreads, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace flashmetric::cuda
