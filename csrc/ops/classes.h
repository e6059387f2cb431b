// SPDX-License-Identifier: Apache-2.0
// Labels (any int64 values) as dense class ids, and the rows of each class in ascending order.
#pragma once

#include <cstdint>
#include <vector>

namespace flashmetric {

// Numbers labels in order of first appearance, by open addressing: a batch's labels are numbered
// in one pass, which sorting would not do in the microseconds that a small batch allows.
class ClassTable {
 public:
  explicit ClassTable(int64_t labels) {
    size_t slots = 16;
    while (slots < static_cast<size_t>(labels) * 2) slots *= 2;
    keys_.resize(slots);
    ids_.assign(slots, kAbsent);
  }

  int32_t insert(int64_t label) {
    const size_t s = slot(label);
    if (ids_[s] == kAbsent) {
      keys_[s] = label;
      ids_[s] = count_++;
    }
    return ids_[s];
  }

  // -1 when the label was never inserted.
  int32_t find(int64_t label) const { return ids_[slot(label)]; }
  int32_t count() const { return count_; }

 private:
  static constexpr int32_t kAbsent = -1;

  size_t slot(int64_t label) const {
    // Multiplicative hashing: labels that differ in low or in high bits both spread.
    uint64_t h = static_cast<uint64_t>(label) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 32;
    const size_t mask = ids_.size() - 1;
    size_t s = static_cast<size_t>(h) & mask;
    while (ids_[s] != kAbsent && keys_[s] != label) s = (s + 1) & mask;
    return s;
  }

  std::vector<int64_t> keys_;
  std::vector<int32_t> ids_;
  int32_t count_ = 0;
};

// members[offsets[c] .. offsets[c + 1]) are the rows whose key is c; keys below 0 have no list.
struct RowLists {
  std::vector<int32_t> offsets;
  std::vector<int32_t> members;

  template <class Key>
  RowLists(const Key* keys, int64_t n, int64_t lists) : offsets(static_cast<size_t>(lists) + 1, 0) {
    for (int64_t i = 0; i < n; ++i)
      if (keys[i] >= 0) ++offsets[static_cast<size_t>(keys[i]) + 1];
    for (size_t c = 1; c < offsets.size(); ++c) offsets[c] += offsets[c - 1];
    members.resize(static_cast<size_t>(offsets.back()));
    std::vector<int32_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t i = 0; i < n; ++i)
      if (keys[i] >= 0) members[static_cast<size_t>(next[keys[i]]++)] = static_cast<int32_t>(i);
  }

  const int32_t* begin(int64_t list) const { return members.data() + offsets[list]; }
  int64_t count(int64_t list) const { return offsets[list + 1] - offsets[list]; }
};

}  // namespace flashmetric
