// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of threshold_sum, nearest_beyond and row_top_k read and write. All of them
// look at one kind of pair, block by block, and never at the same query row from two threads.
#pragma once

#include <flashmetric/formula.h>
#include <stdint.h>

namespace flashmetric {

// One row of ascending numbers per query row, made for searching.
template <class T>
struct Ascending {
  const T* rows;       // [n or 1, length], padded with +inf
  int64_t row_stride;  // 0: one row serves all
  int64_t count;       // of the numbers in a row
  int32_t length;      // a power of two above `count`

  const T* row(int64_t i) const { return rows + i * row_stride; }
};

// Sums over the pairs of a row of f(threshold - d), number of pairs below each threshold, sums of
// f'. With few thresholds (`binned` not set) the three are added up as they are.
//
// A hinge takes short cuts. Pairs below the lowest finite threshold go to base_below and base_sum
// (of lowest threshold - d), which hold for all thresholds. With `binned`, below[k] and sum[k] are
// number and sum of the distances d from threshold k - 1 on, below threshold k.
template <class T>
struct ThresholdSum {
  Term term;
  bool positives;
  bool binned;
  Ascending<T> thresholds;
  const int32_t* first;  // [n or 1]: the first finite threshold of each row
  double* sum;           // [n, count]
  double* slope;         // [n, count], not for a hinge
  int64_t* below;        // [n, count]
  double* base_sum;      // [n]
  int64_t* base_below;   // [n]
};

// Gradient of the sum over all pairs of w(d), dw/dd = -sum over k of weight_k f'(threshold_k - d)
// for the thresholds of the query row.
template <class T>
struct ThresholdGrad {
  Term term;
  bool positives;
  bool symmetric;           // one self-batch: the thresholds of a pair's reference count as well
  Ascending<T> thresholds;  // row_stride is `length`
  const T* weight;   // [n, length]: hinge: sums over this and all later thresholds; else each
  const T* lowest;   // [padded n]: the lowest finite threshold of each row
  const T* highest;  // [padded n]: and the highest
  const T* total;    // [padded n]: sum of the weights of a row
  T* grad_query;     // [n, d], null if not wanted
  T* grad_ref;       // [m, d], null if not wanted; symmetric: grad_query again
};

// For every row and limit the pair of lowest key above the limit: the key of a pair is d, or -d.
template <class T>
struct NearestBeyond {
  bool positives;
  bool farthest;  // keys are -d
  Ascending<T> limits;
  T* key;          // [n, limits.length]: of limit k at place k + 1, +inf before there is one; at
                   // place 0 -inf
  int32_t* index;  // [n, limits.length], likewise; -1 before there is one
};

// Lists the pairs of every row with keys below the row's bound, in the order of the references.
template <class T>
struct Candidates {
  bool positives;
  bool farthest;
  int64_t row_begin;  // the row that the first entry of what follows is for
  const T* bound;     // [rows]
  int64_t capacity;   // of a list; leaves room for a block
  T* key;             // [rows, capacity]
  int32_t* index;     // [rows, capacity]
  int64_t* count;     // [rows]: lengths of the lists, which are continued
};

}  // namespace flashmetric
