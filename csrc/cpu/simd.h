// SPDX-License-Identifier: Apache-2.0
// Vec<T>: the widest vector of this instruction set, with the vocabulary that formula.h and the
// kernels use. Everything lives in a namespace named after the instruction set, so that no symbol
// of one build of the kernels can be taken for another's.
#pragma once

#include <flashmetric/kernels.h>

#define FLASHMETRIC_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include <simd_avx512.h>
#elif defined(__AVX2__)
#include <simd_avx2.h>
#else
#include <simd_generic.h>
#endif
#include <elementary.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// Register tile of the micro-kernels: kRows broadcast rows x kVecs vectors. All
// accumulators, one row of operands and one broadcast must fit the register file.
template <class T>
struct Tile {
  static constexpr int kRows = kSimdTileRows;
  static constexpr int kVecs = kSimdTileVecs;
  static constexpr int kLanes = Vec<T>::kLanes;
  static constexpr int kCols = kVecs * kLanes;
  static_assert(kMaxBlockRows % kCols == 0, "blocks are whole panels");
};

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
