// SPDX-License-Identifier: Apache-2.0
// Squared row norms. One warp per row, neighbouring lanes read neighbouring columns; a row is
// summed in a fixed order, so results do not change from run to run.
#include <flashmetric/cuda_kernels.h>

#include <algorithm>

namespace flashmetric::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;
constexpr int64_t kMaxBlocks = 1 << 16;

template <typename Scalar>
__global__ void row_sqnorm_kernel(const Scalar* __restrict__ x,
                                  accumulate_t<Scalar>* __restrict__ out, int64_t rows,
                                  int64_t cols) {
  using Acc = accumulate_t<Scalar>;
  const int lane = threadIdx.x;
  const int64_t stride = int64_t(gridDim.x) * kRowsPerBlock;
  for (int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y; row < rows; row += stride) {
    const Scalar* values = x + row * cols;
    Acc sum = 0;
    for (int64_t col = lane; col < cols; col += kWarp) {
      const Acc value = static_cast<Acc>(values[col]);
      sum += value * value;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, offset);
    }
    if (lane == 0) {
      out[row] = sum;
    }
  }
}

}  // namespace

template <typename Scalar>
cudaError_t row_sqnorm(const Scalar* x, accumulate_t<Scalar>* out, int64_t rows, int64_t cols,
                       cudaStream_t stream) {
  if (rows == 0) {
    return cudaSuccess;  // an empty grid is a launch error
  }
  const int64_t blocks = std::min((rows + kRowsPerBlock - 1) / kRowsPerBlock, kMaxBlocks);
  const dim3 block(kWarp, kRowsPerBlock);
  row_sqnorm_kernel<<<static_cast<unsigned>(blocks), block, 0, stream>>>(x, out, rows, cols);
  return cudaGetLastError();
}

template cudaError_t row_sqnorm(const __half*, float*, int64_t, int64_t, cudaStream_t);
template cudaError_t row_sqnorm(const __nv_bfloat16*, float*, int64_t, int64_t, cudaStream_t);
template cudaError_t row_sqnorm(const float*, float*, int64_t, int64_t, cudaStream_t);
template cudaError_t row_sqnorm(const double*, double*, int64_t, int64_t, cudaStream_t);

}  // namespace flashmetric::cuda
