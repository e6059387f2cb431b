// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <flashmetric/cuda_kernels.h>

namespace flashmetric::cuda {

// The shapes that this code is compiled for.
#if defined(__CUDA_ARCH__)
template <int kPlanes>
using ShapesHere = Shapes<kPlanes, arch_class(__CUDA_ARCH__ / 10)>;
#else
template <int kPlanes>
using ShapesHere = Shapes<kPlanes, ArchClass::kLarge>;  // for signatures; threads do not differ
#endif

// Launches a kernel of the tile engine.
template <class Args>
cudaError_t launch_tiles(void (*kernel)(Args), const Args& args, const TilePlan& plan,
                         cudaStream_t stream) {
  if (plan.grid_x == 0) return cudaSuccess;  // no columns: nothing to find
  // Not plan.smem but always the same value: threads that launch the kernel with different plans
  // share the setting.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem_limit);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  kernel<<<grid, static_cast<unsigned>(plan.threads), static_cast<size_t>(plan.smem), stream>>>(
      args);
  return cudaGetLastError();
}

}  // namespace flashmetric::cuda
