// SPDX-License-Identifier: Apache-2.0
// Which pairs are positives and which are negatives: the label rules of ops/labels.py on words as
// they came, for host and device. No CUDA header.
#pragma once

#include <flashmetric/kernels.h>
#include <stdint.h>

namespace flashmetric::cuda {

struct Labelling {
  Rule rule;
  int32_t words;       // of each row
  GroupRule group[2];  // of positives, of negatives

  // Whether one comparison of numbers settles a pair.
  FLASHMETRIC_HD constexpr bool simple() const { return rule == Rule::kEqual && words == 1; }
};

// First word of a row that is in no pair.
constexpr int64_t kIgnoredLabel = INT64_MIN;

constexpr int kPositive = 0, kNegative = 1, kNeither = 2;

// Of a pair from the words of its rows.
FLASHMETRIC_HD int pair_kind(const Labelling& labelling, const int64_t* x, const int64_t* r) {
  if (x[0] == kIgnoredLabel || r[0] == kIgnoredLabel) return kNeither;
  if (labelling.rule == Rule::kGroup) {
    const int kind = x[0] == r[0] ? kPositive : kNegative;
    const GroupRule group = labelling.group[kind];
    if (group == GroupRule::kAny || (x[1] == r[1]) == (group == GroupRule::kSame)) return kind;
    return kNeither;
  }
  bool common = false, equal = true;
  for (int32_t w = 0; w < labelling.words; ++w) {
    common = common || (x[w] & r[w]) != 0;
    equal = equal && x[w] == r[w];
  }
  return (labelling.rule == Rule::kAny ? common : equal) ? kPositive : kNegative;
}

}  // namespace flashmetric::cuda
