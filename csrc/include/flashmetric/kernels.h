// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels offer to the ops: one table of functions per instruction set and dtype.
// Included by the per-ISA translation units: keep it free of the standard library and of inline
// functions (the linker could keep the AVX-512 copy of one on a machine without AVX-512).
#pragma once

#include <flashmetric/formula.h>
#include <flashmetric/row_kernels.h>
#include <stdint.h>

namespace flashmetric {

// A block is at most this many rows of one side against as many of the other: a multiple of every
// panel width and tile height, and small enough for one side to stay in a 1 MB second-level cache.
constexpr int64_t kMaxBlockRows = 288;

// What a kernel for a block may use as working memory.
constexpr int64_t kTileElements = 2 * kMaxBlockRows * kMaxBlockRows;

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

// Which pairs are positives and which are negatives: kEqual: of one class, of different classes.
// kAny: with a bit in common, without. kGroup: of one class, of different classes, and each with a
// relation between the groups of the two rows.
enum class Rule : int { kEqual, kAny, kGroup };
enum class GroupRule : int { kAny, kSame, kDifferent };

// Class ids below 0: a query whose class no reference has, the end of a side, a row of no pair.
constexpr int32_t kAbsentClass = -1;
constexpr int32_t kPaddingClass = -2;
constexpr int32_t kIgnoredClass = -3;

// The labels of one side, padded to whole panels.
struct Labels {
  const int32_t* classes;  // [padded]: dense ids, for kAny 0, or one of the ids below 0
  const int32_t* groups;   // [padded]: dense ids; kGroup only
  const int64_t* words;    // [words, padded]: the bits; kAny only
  int64_t padded;
};

// Both sides of a batch, and what a pair of it is.
template <class T>
struct PairBatch {
  Distance distance;
  Rule rule;
  GroupRule positive_groups, negative_groups;
  int64_t words;
  bool self;  // one batch on both sides: a row is no pair with itself
  Side<T> query, ref;
  Labels query_labels, ref_labels;
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

// Rows with their lowest keys, and per row the references whose keys may be lowest but for
// rounding.
template <class T>
struct Closest {
  const int32_t* rows;  // [count]
  int64_t count;
  const T* key;     // per row of the side
  int32_t* list;    // [count, capacity]
  int32_t* listed;  // [count]
  int64_t capacity;
};

// A pair of one kind brings f(scale d + offset) to the sum of its query row. All arrays are per
// query row and padded to whole panels.
template <class T>
struct RowTerm {
  Term term;
  const T* scale;
  const T* offset;
  const T* bound;   // positives are kept if d > bound, negatives if d < bound; null: all are kept
  const T* weight;  // weight of each row's sum in the objective; null: no gradient
  const T* low;     // f is 0 unless low < u < high for the pair's row; either null: not known
  const T* high;
};

template <class T>
struct RowSum {
  RowTerm<T> kinds[2];  // positives, negatives
  bool uniform;         // scale and offset are those of all rows and there is no bound
  bool slopes;          // whether slope and moment are wanted
};

// Results for the rows of one side. A null `sum` or `grad` means that it is not wanted.
template <class T>
struct RowSumSide {
  double* sum;      // [2, n]: sum of f over positives, over negatives
  double* slope;    // [2, n]: sum of f'
  double* moment;   // [2, n]: sum of f' d
  int64_t* active;  // [2, n]: how many f are positive
  int64_t* kept;    // [2, n]; null: without bounds all are
  int64_t n;
  T* grad[2];  // [n, d] gradients of the weighted sums over positives and over negatives; or both
               // the same: their sum
};

// The logit of a pair, a function of z = scale d + offset. kCircle: max(z + shape, 0) (z - shape),
// of which the first factor counts as a constant in the derivative.
enum class Logit : int { kNone, kAffine, kCircle };

template <class T>
struct RowLogit {
  Logit form;
  const T* scale;  // [padded n], as the two that follow
  const T* offset;
  const T* bound;  // as in RowTerm
  // A number that no logit exceeds, and none is so far below that its exponential vanishes; not
  // finite where there is none.
  T top;
};

template <class T>
struct RowLse {
  RowLogit<T> kinds[2];
  T shape;
  bool uniform;
};

// exp(top) * sum is the sum of exp(logit), exp(top) * moment that of exp(logit) d.
struct LseSide {
  double* top;     // [2, n]: -inf before the first logit
  double* sum;     // [2, n]
  double* moment;  // [2, n]
  int64_t* kept;   // [2, n]; null: without bounds all are
  int64_t n;
};

// One side's part in the backward of log-sum-exps.
template <class T>
struct LseGradSide {
  const T* lse;     // [2, padded n], +inf where there is none
  const T* weight;  // [2, padded n], 0 where there is none; null: the side has no sums
  int64_t padded;
  T* grad;  // [n, d]; null: not wanted
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

  // Lists, of references [begin, end) of other classes, those whose distance from a row may be the
  // smallest. Only for rows with a reference so near that kNearFraction asks for exact differences.
  void (*list_closest)(const Side<T>& query, const Side<T>& ref, int64_t begin, int64_t end,
                       const Closest<T>& op);

  // u[t] of row x against rows other[list[t]], by exact differences.
  void (*exact)(Distance distance, const T* x, T x_norm, const Side<T>& other, const int32_t* list,
                int64_t count, T* u);

  // out[d] += sum over t of coefficient[t] * du/dx.
  void (*accumulate)(Distance distance, const T* x, const Side<T>& other, const int32_t* list,
                     const T* coefficient, int64_t count, T* out);

  // Adds how many pairs of each kind the rows have in a block; of a self-batch's block, all but the
  // rows themselves.
  void (*count_pairs)(const PairBatch<T>& batch, const Block& block, int64_t* positives,
                      int64_t* negatives);

  // Sums over the pairs of a block, with gradients. In a self-batch for both sides; otherwise
  // columns have gradients only. `tile` holds kTileElements elements.
  void (*row_sum)(const RowSum<T>& op, const PairBatch<T>& batch, const Block& block,
                  const RowSumSide<T>& rows, const RowSumSide<T>& columns, T* tile);

  // Log-sum-exps over the pairs of a block; columns may be null.
  void (*row_lse)(const RowLse<T>& op, const PairBatch<T>& batch, const Block& block,
                  const LseSide& rows, const LseSide* columns, T* tile);
  void (*row_lse_backward)(const RowLse<T>& op, const PairBatch<T>& batch, const Block& block,
                           const LseGradSide<T>& rows, const LseGradSide<T>& columns, T* tile);

  // Pairs of a block below thresholds, with the gradient of sums over them, and picked by distance;
  // see row_kernels.h. Up to `few_thresholds` per row it is best to compare with each.
  int64_t few_thresholds;
  void (*threshold_sum)(const PairBatch<T>& batch, const Block& block, const ThresholdSum<T>& op,
                        T* tile);
  void (*threshold_grad)(const PairBatch<T>& batch, const Block& block, const ThresholdGrad<T>& op,
                         T* tile);
  void (*nearest_beyond)(const PairBatch<T>& batch, const Block& block, const NearestBeyond<T>& op,
                         T* tile);
  void (*list_candidates)(const PairBatch<T>& batch, const Block& block, const Candidates<T>& op,
                          T* tile);
};

// The table of the best instruction set of this processor; FLASHMETRIC_CPU_ISA overrides.
template <class T>
const CpuKernels<T>& cpu_kernels();

}  // namespace flashmetric
