// SPDX-License-Identifier: Apache-2.0
// Peak rate of float32 multiply-adds: register-only chains, no memory traffic. Built on its own
// by peak.py; it is not part of the library.
#include <time.h>

#include <algorithm>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Twelve independent chains: latency 4 on two ports needs eight, and twelve still leave AVX2 four
// registers for the operands. They start from different values: the compiler would merge equal ones.
constexpr int kChains = 12;
constexpr long kBurst = 1 << 16;

// CPU time of the thread, so that a neighbour on the machine does not lower the peak and thereby
// flatter what is compared with it.
double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

volatile float g_sink;

#if defined(__x86_64__)

__attribute__((target("avx512f"))) void burst_avx512(float x, float y) {
  const __m512 a = _mm512_set1_ps(x), b = _mm512_set1_ps(y);
  __m512 sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(x * i);
  for (long k = 0; k < kBurst; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_fmadd_ps(a, b, sum[i]);
  }
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  g_sink = _mm512_cvtss_f32(sum[0]);
}

__attribute__((target("avx2,fma"))) void burst_avx2(float x, float y) {
  const __m256 a = _mm256_set1_ps(x), b = _mm256_set1_ps(y);
  __m256 sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm256_set1_ps(x * i);
  for (long k = 0; k < kBurst; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = _mm256_fmadd_ps(a, b, sum[i]);
  }
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) sum[0] = _mm256_add_ps(sum[0], sum[i]);
  g_sink = _mm256_cvtss_f32(sum[0]);
}

#endif

using Vector4 = float __attribute__((vector_size(16)));

// SSE on x86 (a multiply and an add), NEON on Arm (fused where the compiler contracts). The
// product depends on the sum, or it would be hoisted out of the loop.
void burst_generic(float x, float y) {
  const Vector4 a = {x, x, x, x}, b = {y, y, y, y};
  Vector4 sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = a * static_cast<float>(i);
  for (long k = 0; k < kBurst; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * a + b;
  }
  for (int i = 1; i < kChains; ++i) sum[0] += sum[i];
  g_sink = sum[0][0];
}

struct Kernel {
  void (*burst)(float, float);
  int lanes;
};

Kernel kernel_of(int isa) {
#if defined(__x86_64__)
  if (isa == 2) return {burst_avx512, 16};
  if (isa == 1) return {burst_avx2, 8};
#endif
  (void)isa;
  return {burst_generic, 4};
}

double thread_rate(Kernel kernel, double seconds) {
  const double flops = 2.0 * kChains * kernel.lanes * kBurst;
  double best = 0.0;
  const double end = cpu_seconds() + seconds;
  for (double start = cpu_seconds(); start < end;) {
    for (int i = 0; i < 8; ++i) kernel.burst(0.5F, 1e-3F);
    const double stop = cpu_seconds();
    best = std::max(best, 8.0 * flops / (stop - start));
    start = stop;
  }
  return best;
}

}  // namespace

// Widest instruction set of this processor: 0 generic, 1 AVX2 with FMA, 2 AVX-512.
extern "C" int flashmetric_peak_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// Flop per second of all threads together; each runs for that many seconds of CPU time.
extern "C" double flashmetric_peak(int isa, int threads, double seconds) {
  const Kernel kernel = kernel_of(isa);
  std::vector<double> rate(static_cast<size_t>(threads));
  std::vector<std::thread> pool;
  for (double& slot : rate) {
    pool.emplace_back([&slot, kernel, seconds] { slot = thread_rate(kernel, seconds); });
  }
  for (std::thread& worker : pool) worker.join();
  double sum = 0.0;
  for (double value : rate) sum += value;
  return sum;
}
