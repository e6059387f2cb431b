// SPDX-License-Identifier: Apache-2.0
// The order of blocks for ops whose results belong to query rows alone: each task takes a range of
// rows through all references, so that rows never wait for each other.
#pragma once

#include <pair_batch.h>

namespace flashmetric {

// Rows of a task: few enough that the rows and their distances stay in the second-level cache with
// the panels that they meet.
constexpr int64_t kRowsPerSweep = 96;

// Ranges of at most `max_rows` rows, and about 64 of them where there are enough rows. Depends on
// sizes only, never on the thread count.
inline int64_t rows_per_sweep(int64_t n, int64_t max_rows) {
  constexpr int64_t kTileRows = 8, kWantedTasks = 64;
  const int64_t wanted = round_up(std::max<int64_t>(n / kWantedTasks, 1), kTileRows);
  return std::min({wanted, std::max(max_rows, kTileRows), kRowsPerSweep});
}

// Calls f(begin, end) for ranges of rows that cover all query rows.
template <class T, class F>
void for_row_ranges(const PairOperands<T>& pairs, int64_t max_rows, const F& f) {
  const int64_t step = rows_per_sweep(pairs.n, max_rows);
  const bool parallel = pairs.n * pairs.m * std::max<int64_t>(pairs.d, 16) >= kParallelWork;
  for_each((pairs.n + step - 1) / step, parallel,
           [&](int64_t task) { f(task * step, std::min((task + 1) * step, pairs.n)); });
}

// Calls f(block, tile) for rows [begin, end) against all references, in ascending order.
template <class T, class F>
void sweep_references(const PairOperands<T>& pairs, int64_t begin, int64_t end, const F& f) {
  // Kept for the life of the thread: a fresh one per range would be all page faults.
  thread_local Buffer<T> tile(kRowsPerSweep * kMaxBlockRows);
  const int64_t width = cpu_kernels<T>().panel_width;
  const int64_t fits = (int64_t{1} << 18) / std::max<int64_t>(pairs.d * int64_t{sizeof(T)}, 1);
  const int64_t columns = std::min(std::max(fits / width * width, width), kMaxBlockRows);
  for (int64_t j = 0; j < pairs.m; j += columns) {
    const Block block{begin, end, j, std::min(j + columns, pairs.m), false};
    f(block, tile.data());
  }
}

// A batch of the same labels in which all distances are equal: what selections by distance fall
// back to where a row is not finite.
template <class F>
auto with_equal_distances(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                          const OptionalTensor& ref_labels, const std::string& rule, const F& f) {
  const auto zeros = [](const Tensor& rows) {
    return torch::stable::new_zeros(rows, {rows.size(0), 1}, ScalarType::Float);
  };
  const PairOperands<float> pairs(zeros(query), labels,
                                  ref.has_value() ? OptionalTensor(zeros(*ref)) : OptionalTensor(),
                                  ref_labels, rule, Distance::kSqeuclidean);
  return f(pairs);
}

inline bool parse_kind(const std::string& kind) {
  STD_TORCH_CHECK(kind == "positive" || kind == "negative",
                  "kind: 'positive' or 'negative' expected, got '", kind, "'");
  return kind == "positive";
}

// The length of a row of ascending numbers for Ascending.
inline int32_t padded_length(int64_t count) {
  STD_TORCH_CHECK(count < int64_t{1} << 24, "thresholds: fewer than 2^24 per row expected, got ",
                  count);
  int32_t length = 1;
  while (length <= count) length *= 2;
  return length;
}

}  // namespace flashmetric
