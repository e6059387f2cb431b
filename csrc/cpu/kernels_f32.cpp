// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set: FLASHMETRIC_ISA is generic, avx2 or avx512.
#include <cpu_table.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {
extern const CpuKernels<float> kernels_f32 = make_kernels<float>(FLASHMETRIC_TEXT(FLASHMETRIC_ISA));
}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
