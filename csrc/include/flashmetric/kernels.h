// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels offer to the ops: one table of functions per instruction set and dtype.
// Included by the per-ISA translation units: keep it free of the standard library and of inline
// functions (the linker could keep the AVX-512 copy of one on a machine without AVX-512).
#pragma once

#include <flashmetric/formula.h>
#include <stdint.h>

namespace flashmetric {

// A block is at most this many rows of one side against as many of the other: a multiple of every
// panel width and tile height, and small enough for one side to stay in a 1 MB second-level cache.
constexpr int64_t kMaxBlockRows = 288;

// u below this fraction of the squared norms has lost its leading digits to cancellation: such a
// pair is measured by exact differences instead.
constexpr double kNearFraction = 1.0 / 1024;

// One side (queries or references) of a pairwise computation.
template <class T>
struct Side {
  const T* rows;           // [n, d], contiguous
  const T* panels;         // [n / width, d, width]: groups of rows, transposed, zero padded
  const T* bias;           // [n]: additive part of u, padded with +inf to whole panels
  const T* norms;          // [n]: squared row norms, padded with 0
  const int32_t* classes;  // [n]: dense class ids, padded with -2
  int64_t n;
  int64_t d;
};

// Query rows [row_begin, row_end) against reference rows [col_begin, col_end). Columns begin at a
// whole panel and end at one or at the last reference.
struct Block {
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  bool diagonal;  // the same rows of one self-batch on both sides: only pairs with column > row
};

// Running minimum per row and the lowest index that attains it.
template <class T>
struct Nearest {
  T* key;          // +inf before the first candidate
  int32_t* index;  // -1 before the first candidate
};

// The keys minimised are bias - 2 x.r over negatives, its negation over positives.
template <class T>
struct Extremes {
  Nearest<T> negative;
  Nearest<T> positive;  // null pointers: positives are found elsewhere
};

template <class T>
struct PairSum {
  Distance distance;
  Formula formula;
  bool positives;  // pairs of one class; otherwise pairs of different classes
  T margin;
  bool symmetric;   // one self-batch: a pair counts for both of its rows
  const T* weight;  // [n] weight of each query row in the objective that is differentiated
};

// Results per row of one side. A null `sum` or `grad` means that it is not wanted.
template <class T>
struct PairSumRows {
  double* sum;      // [n] sum of the pair losses
  int64_t* active;  // [n] how many of them are positive
  T* grad;          // [n, d] gradient of the weighted objective
};

template <class T>
struct CpuKernels {
  const char* isa;
  int panel_width;

  // Transposes the panels of rows [begin, end) and writes those rows' squared norms.
  void (*pack)(const T* x, int64_t n, int64_t d, int64_t begin, int64_t end, T* panels, T* norms);

  // Hardest pairs of a block by Gram-form keys: updates its rows and, unless null, its columns.
  void (*hardest)(const Side<T>& query, const Side<T>& ref, const Block& block,
                  const Extremes<T>& rows, const Extremes<T>* columns);

  // u[t] of row x against rows other[list[t]], by exact differences.
  void (*exact)(Distance distance, const T* x, T x_norm, const Side<T>& other, const int32_t* list,
                int64_t count, T* u);

  // out[d] += sum over t of coefficient[t] * du/dx.
  void (*accumulate)(Distance distance, const T* x, const Side<T>& other, const int32_t* list,
                     const T* coefficient, int64_t count, T* out);

  // The positives or the negatives of a block, loss and gradient. `scratch` holds kMaxBlockRows^2
  // elements.
  void (*pair_sum)(const PairSum<T>& op, const Side<T>& query, const Side<T>& ref,
                   const Block& block, const PairSumRows<T>& rows, const PairSumRows<T>& columns,
                   T* scratch);
};

// The table of the best instruction set of this processor; FLASHMETRIC_CPU_ISA overrides.
template <class T>
const CpuKernels<T>& cpu_kernels();

}  // namespace flashmetric
