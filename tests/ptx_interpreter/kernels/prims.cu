// SPDX-License-Identifier: Apache-2.0
// One kernel for each wrapper of prims.cuh, of one warp, with raw words in and out: conformance.py
// runs them in the interpreter and on a GPU.
#include <prims.cuh>

namespace prims = flashmetric::cuda;

namespace {

extern __shared__ __align__(128) uint32_t smem[];

// Words of a lane in memory, four each.
__device__ void fill(const uint32_t* x) {
  for (int i = 0; i < 4; ++i) smem[threadIdx.x * 4 + i] = x[threadIdx.x * 4 + i];
  __syncwarp();
}

}  // namespace

extern "C" {

// Reads shared memory through the 32-bit address.
__global__ void smem_address(const uint32_t* x, uint32_t* out) {
  fill(x);
  const uint32_t address = prims::smem_address(smem + (threadIdx.x ^ 5));
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  out[threadIdx.x] = word;
}

// Two groups of copies; the first is read while the second may be under way.
__global__ void cp_async(const uint32_t* x, uint32_t* out) {
  const uint32_t lane = threadIdx.x;
  const uint32_t* from = x + lane * 4;
  prims::cp_async_16(prims::smem_address(smem + lane * 4), from);
  prims::cp_async_commit();
  prims::cp_async_16(prims::smem_address(smem + 128 + lane * 4), from + 128);
  prims::cp_async_commit();
  prims::cp_async_wait<1>();
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = smem[(lane ^ 1) * 4 + i];
  prims::cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[128 + lane * 4 + i] = smem[128 + (lane ^ 1) * 4 + i];
}

__global__ void ldmatrix_x4(const uint32_t* x, uint32_t* out) {
  fill(x);
  uint32_t r[4];
  prims::ldmatrix_x4(r, prims::smem_address(smem + threadIdx.x * 4));
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

__global__ void ldmatrix_x4_trans(const uint32_t* x, uint32_t* out) {
  fill(x);
  uint32_t r[4];
  prims::ldmatrix_x4_trans(r, prims::smem_address(smem + threadIdx.x * 4));
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

__global__ void mma_f16(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const uint32_t lane = threadIdx.x;
  uint32_t left[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[lane * 4 + i];
    sums[i] = c[lane * 4 + i];
  }
  prims::mma_f16(sums, left, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

__global__ void exp2_fast(const float* x, float* y) {
  y[threadIdx.x] = prims::exp2_fast(x[threadIdx.x]);
}

}  // extern "C"
