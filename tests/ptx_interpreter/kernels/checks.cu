// SPDX-License-Identifier: Apache-2.0
// Small kernels, right (ok_) and wrong (bad_), for the interpreter's own tests. 64 threads a block
// unless a name says warp. Inline assembler keeps what the compiler would rather rearrange.
#include <stdint.h>

namespace {

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void copy_async(void* to, const int* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace

extern "C" {

// ---- races in shared memory ----

__global__ void bad_no_barrier(int* o) {
  __shared__ int s[64];
  s[threadIdx.x] = 1;
  o[threadIdx.x] = s[threadIdx.x ^ 32];
}

__global__ void ok_barrier(int* o) {
  __shared__ int s[64];
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = i;
    __syncthreads();
    o[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x ^ 32];
    __syncthreads();
  }
}

__global__ void bad_overwrite(int* o) {
  __shared__ int s[64];
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = i;
    __syncthreads();
    o[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x ^ 32];
  }
}

__global__ void bad_no_warp_barrier(int* o) {
  __shared__ volatile int s[64];
  s[threadIdx.x] = 1;
  const unsigned b = __ballot_sync(~0u, 1);
  o[threadIdx.x] = s[threadIdx.x ^ 1] + b;
}

__global__ void ok_warp_barrier(int* o) {
  __shared__ int s[64];
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = i;
    __syncwarp();
    o[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x ^ 1];
    __syncwarp();
  }
}

__global__ void bad_warp_barrier_for_block(int* o) {
  __shared__ int s[64];
  s[threadIdx.x] = 1;
  __syncwarp();
  o[threadIdx.x] = s[threadIdx.x ^ 32];
}

// A tree in one warp: lane 0 and lane 16 read one word, then lane 16 alone goes on with it.
__global__ void ok_warp_tree(int* o) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  for (int half = 16; half > 0; half /= 2) {
    int v = 0;
    if (threadIdx.x % 32 < half) v = s[threadIdx.x + half];
    __syncwarp();
    if (threadIdx.x % 32 < half) s[threadIdx.x] += v;
    __syncwarp();
  }
  if (threadIdx.x % 32 == 0) o[blockIdx.x * 2 + threadIdx.x / 32] = s[threadIdx.x];
}

__global__ void bad_same_word(int* o) {
  __shared__ int s[64];
  s[threadIdx.x / 2] = threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x / 2];
}

__global__ void ok_halves_of_a_word(short* o) {
  __shared__ short s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  o[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void ok_shared_atomics(int* o) {
  __shared__ int s;
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  atomicAdd(&s, int(threadIdx.x));
  __syncthreads();
  o[blockIdx.x * 64 + threadIdx.x] = s;
}

__global__ void bad_shared_atomics(int* o) {
  __shared__ int s;
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  atomicAdd(&s, int(threadIdx.x));
  o[blockIdx.x * 64 + threadIdx.x] = *const_cast<volatile int*>(&s);
}

// ---- shared memory itself ----

__global__ void bad_unwritten_shared(int* o) {
  __shared__ int s[64];
  if (threadIdx.x != 5) s[threadIdx.x] = 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}

__global__ void bad_shared_bounds(int* o) {
  extern __shared__ int s[];
  s[threadIdx.x] = 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void bad_shared_alignment(int* o) {
  __shared__ __align__(16) int s[68];
  for (int i = threadIdx.x; i < 68; i += 64) s[i] = i;
  __syncthreads();
  const int2 v = *reinterpret_cast<int2*>(s + threadIdx.x);
  o[threadIdx.x] = v.x + v.y;
}

// ---- barriers ----

__global__ void bad_divergent_barrier(int* o) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    if (threadIdx.x == 50) o[blockIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void bad_left_before_barrier(int* o) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  o[threadIdx.x] = 1;
}

__global__ void ok_barrier_reductions(int* o) {
  const int t = threadIdx.x;
  o[blockIdx.x * 64 + t] = __syncthreads_count(t % 3 == 0) + 100 * __syncthreads_or(t == 63) +
                           1000 * __syncthreads_and(t < 63);
}

// ---- warps ----

__global__ void bad_shuffle_diverged(int* o) {
  int v = threadIdx.x;
  if (o[threadIdx.x] == 0) v = __shfl_xor_sync(~0u, v, 1);
  __syncthreads();
  o[threadIdx.x] = v;
}

__global__ void bad_shuffle_outside_mask(int* o) {
  const unsigned mask = 0xffu << (threadIdx.x & 24);
  o[threadIdx.x] = __shfl_xor_sync(mask, int(threadIdx.x), 8);
}

__global__ void bad_not_in_mask(int* o) {
  o[threadIdx.x] = __ballot_sync(0xffffu, threadIdx.x & 1);
}

__global__ void ok_groups(int* o) {
  const unsigned mask = 0xffu << (threadIdx.x & 24);
  int v = threadIdx.x;
  if (threadIdx.x % 32 < 8) {
    v += __shfl_xor_sync(0xffu, v, 3);
  } else {
    v -= __shfl_xor_sync(mask, v, 5);
  }
  o[blockIdx.x * 64 + threadIdx.x] = v + __shfl_sync(~0u, v, 7);
}

__global__ void bad_read_of_lane_that_left(int* o) {
  if (threadIdx.x % 32 == 3) return;
  o[threadIdx.x] = __shfl_sync(~0u, int(threadIdx.x), 3);
}

// ---- global memory ----

__global__ void bad_plus_equals(int* o) {
  if (threadIdx.x == 0) o[0] += 1;
}

__global__ void ok_atomic_add(int* o) { atomicAdd(o, 1); }

__global__ void bad_atomic_and_plain(int* o) {
  atomicAdd(o, 1);
  if (threadIdx.x == 40) o[1] = *const_cast<volatile int*>(o);
}

__global__ void ok_global_after_barrier(int* o) {
  o[blockIdx.x * 64 + threadIdx.x] = threadIdx.x;
  __syncthreads();
  o[512 + blockIdx.x * 64 + threadIdx.x] = o[blockIdx.x * 64 + (threadIdx.x ^ 33)];
}

__global__ void bad_global_no_barrier(int* o) {
  o[blockIdx.x * 64 + threadIdx.x] = 1;
  o[512 + blockIdx.x * 64 + threadIdx.x] =
      const_cast<volatile int*>(o)[blockIdx.x * 64 + (threadIdx.x ^ 33)];
}

__global__ void bad_global_overwrite(int* o) {
  const int v = const_cast<volatile int*>(o)[threadIdx.x ^ 1];
  if (blockIdx.x == 0) o[threadIdx.x] = v + 1;
}

__global__ void last_block(int* o, int fence) {
  if (threadIdx.x == 0) {
    o[1 + blockIdx.x] = 1;
    if (fence) __threadfence();
    if (atomicAdd(o, 1) == int(gridDim.x) - 1) {
      int s = 0;
      for (int i = 0; i < int(gridDim.x); ++i) s += const_cast<volatile int*>(o)[1 + i];
      o[100] = s;
    }
  }
}

__global__ void bad_global_bounds(int* o) { o[threadIdx.x + 1000] = 1; }
__global__ void bad_global_before_start(int* o) { o[int(threadIdx.x) - 1] = 1; }
__global__ void bad_null(int* o, int* nothing) { o[threadIdx.x] = nothing[threadIdx.x]; }

__global__ void bad_global_alignment(int* o) {
  *reinterpret_cast<int4*>(o + threadIdx.x * 4 + 1) = make_int4(1, 2, 3, 4);
}

__global__ void bad_cache_of_written(int* o) {
  o[threadIdx.x] = 1;
  o[64 + threadIdx.x] = __ldg(o + threadIdx.x);
}

__global__ void copy(const int* x, int* o, int n) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  if (i < n) o[i] = x[i];
}

// ---- asynchronous copies ----

__global__ void ok_copy(const int* x, int* o) {
  __shared__ int s[2][64];
  copy_async(&s[0][threadIdx.x], x + threadIdx.x);
  commit();
  copy_async(&s[1][threadIdx.x], x + 64 + threadIdx.x);
  commit();
  wait<1>();
  int v = s[0][threadIdx.x];
  wait<0>();
  __syncthreads();
  o[blockIdx.x * 64 + threadIdx.x] = v + s[1][threadIdx.x ^ 32];
}

__global__ void bad_copy_no_wait(const int* x, int* o) {
  __shared__ int s[64];
  copy_async(&s[threadIdx.x], x + threadIdx.x);
  commit();
  o[threadIdx.x] = s[threadIdx.x];
  wait<0>();
}

__global__ void bad_copy_lax_wait(const int* x, int* o) {
  __shared__ int s[64];
  copy_async(&s[threadIdx.x], x + threadIdx.x);
  commit();
  wait<1>();
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
  wait<0>();
}

__global__ void bad_copy_no_barrier(const int* x, int* o) {
  __shared__ int s[64];
  copy_async(&s[threadIdx.x], x + threadIdx.x);
  commit();
  wait<0>();
  o[threadIdx.x] = s[threadIdx.x ^ 32];
}

__global__ void bad_copy_overwritten(const int* x, int* o) {
  __shared__ int s[64];
  copy_async(&s[threadIdx.x], x + threadIdx.x);
  s[threadIdx.x] = 1;
  commit();
  wait<0>();
  o[threadIdx.x] = s[threadIdx.x];
}

__global__ void bad_copy_never_waited(const int* x, int* o) {
  __shared__ int s[64];
  copy_async(&s[threadIdx.x], x + threadIdx.x);
  commit();
  o[threadIdx.x] = 1;
}

// ---- others ----

__global__ void bad_trap(int* o) {
  if (o[threadIdx.x] == 0) __trap();
}

__global__ void bad_division(int* o) { o[threadIdx.x] = 99 / (o[threadIdx.x] + int(threadIdx.x)); }

__global__ void __launch_bounds__(32) bounded(int* o) { o[threadIdx.x] = 1; }

// One pointer that is now of shared, now of global memory.
__global__ void ok_generic(int* o) {
  __shared__ int s[64];
  s[threadIdx.x] = 5;
  o[blockIdx.x * 64 + threadIdx.x] = 7;
  int* p = threadIdx.x % 2 ? s + threadIdx.x : o + blockIdx.x * 64 + threadIdx.x;
  asm volatile("{ .reg .b32 v; ld.u32 v, [%0]; add.u32 v, v, 1; st.u32 [%0], v; }" ::"l"(p)
               : "memory");
  o[512 + blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];
}

struct Arguments {
  const float* x;
  bool twice;
  float* out;
  int64_t sizes[2];
  float scale;
};

__global__ void by_value(Arguments a) {
  for (int64_t i = threadIdx.x; i < a.sizes[1]; i += blockDim.x) {
    a.out[i] = a.x[i + a.sizes[0]] * (a.twice ? 2.f : 1.f) * a.scale;
  }
}

}  // extern "C"
