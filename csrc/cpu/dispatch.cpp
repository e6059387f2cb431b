// SPDX-License-Identifier: Apache-2.0
// Picks the kernel table once, at first use.
#include <flashmetric/kernels.h>

#include <cstdlib>
#include <cstring>

namespace flashmetric {

#define FLASHMETRIC_DECLARE(isa)               \
  namespace isa {                              \
  extern const CpuKernels<float> kernels_f32;  \
  extern const CpuKernels<double> kernels_f64; \
  }
FLASHMETRIC_DECLARE(generic)
FLASHMETRIC_DECLARE(avx2)
FLASHMETRIC_DECLARE(avx512)
#undef FLASHMETRIC_DECLARE

namespace {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(FLASHMETRIC_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
#endif
#if defined(FLASHMETRIC_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
#endif
  return Isa::kGeneric;
}

// FLASHMETRIC_CPU_ISA asks for less than the processor has; asking for more changes nothing.
Isa pick() {
  const Isa best = supported();
  const char* wanted = std::getenv("FLASHMETRIC_CPU_ISA");
  if (wanted == nullptr) return best;
  if (std::strcmp(wanted, "generic") == 0) return Isa::kGeneric;
  if (std::strcmp(wanted, "avx2") == 0 && best == Isa::kAvx512) return Isa::kAvx2;
  return best;
}

Isa isa() {
  static const Isa picked = pick();
  return picked;
}

}  // namespace

template <>
const CpuKernels<float>& cpu_kernels<float>() {
  switch (isa()) {
#if defined(FLASHMETRIC_HAVE_AVX512)
    case Isa::kAvx512:
      return avx512::kernels_f32;
#endif
#if defined(FLASHMETRIC_HAVE_AVX2)
    case Isa::kAvx2:
      return avx2::kernels_f32;
#endif
    default:
      return generic::kernels_f32;
  }
}

template <>
const CpuKernels<double>& cpu_kernels<double>() {
  switch (isa()) {
#if defined(FLASHMETRIC_HAVE_AVX512)
    case Isa::kAvx512:
      return avx512::kernels_f64;
#endif
#if defined(FLASHMETRIC_HAVE_AVX2)
    case Isa::kAvx2:
      return avx2::kernels_f64;
#endif
    default:
      return generic::kernels_f64;
  }
}

}  // namespace flashmetric
