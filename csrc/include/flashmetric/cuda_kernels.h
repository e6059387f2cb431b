// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels. No torch header on either side of this line: the kernels then
// compile in seconds, and against a torch that was built without CUDA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashmetric::cuda {

template <typename Scalar>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename Scalar>
using accumulate_t = typename Accumulate<Scalar>::type;

// out[i] = sum_j x[i][j]^2 for a contiguous x of rows x cols. Scalar: __half, __nv_bfloat16, float
// or double.
template <typename Scalar>
cudaError_t row_sqnorm(const Scalar* x, accumulate_t<Scalar>* out, int64_t rows, int64_t cols,
                       cudaStream_t stream);

}  // namespace flashmetric::cuda
