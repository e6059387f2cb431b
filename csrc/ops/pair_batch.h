// SPDX-License-Identifier: Apache-2.0
// The arguments that all row statistics begin with (both sides, labels, rule, distance) as what
// kernels read, and the sweep over all blocks of pairs.
#pragma once

#include <batch.h>

namespace flashmetric {

// Memory-safety checks of the arguments that PairOperands takes.
void check_pairs(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                 const OptionalTensor& ref_labels, const std::string& rule);

struct LabelRule {
  Rule rule;
  GroupRule positive = GroupRule::kAny, negative = GroupRule::kAny;
};
LabelRule parse_rule(const std::string& name);

// Labels of both sides as ids and bits, padded to whole panels.
class LabelTables {
 public:
  LabelTables(const Tensor& labels, const OptionalTensor& ref_labels, const LabelRule& rule,
              int64_t panel_width);

  Labels query() const { return view(query_); }
  Labels ref() const { return view(ref_); }
  int64_t words() const { return words_; }

  // Positives and negatives of every query row (of_refs: of every reference) whatever their
  // distance, [2, n]; not for kAny.
  std::vector<int64_t> count(const LabelRule& rule, bool self, bool of_refs) const;

 private:
  struct Table {
    std::vector<int32_t> classes, groups;
    std::vector<int64_t> words;
    int64_t rows = 0;
  };
  Labels view(const Table& table) const {
    return {table.classes.data(), table.groups.data(), table.words.data(),
            static_cast<int64_t>(table.classes.size())};
  }

  int64_t words_;
  Table query_, ref_;
};

// Working memory of kernels for blocks. Kept for the life of the thread: a fresh one per block
// would be all page faults.
template <class T>
T* thread_tile() {
  thread_local Buffer<T> tile(kTileElements);
  return tile.data();
}

template <class T>
class PairOperands {
 public:
  PairOperands(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
               const OptionalTensor& ref_labels, const std::string& rule, Distance distance)
      : self(!ref.has_value()),
        n(query.size(0)),
        m(self ? n : ref->size(0)),
        d(query.size(1)),
        rule_(parse_rule(rule)),
        query_(query, distance, self),
        labels_(labels, self ? OptionalTensor() : ref_labels, rule_, cpu_kernels<T>().panel_width) {
    if (!self) ref_.emplace(*ref, distance, true);
    const Side<T> left = query_.side(labels_.query().classes);
    batch_ = {distance,
              rule_.rule,
              rule_.positive,
              rule_.negative,
              labels_.words(),
              self,
              left,
              self ? left : ref_->side(labels_.ref().classes),
              labels_.query(),
              self ? labels_.query() : labels_.ref()};
  }
  PairOperands(const PairOperands&) = delete;
  PairOperands& operator=(const PairOperands&) = delete;

  const PairBatch<T>& batch() const { return batch_; }

  // Whether no distance of the batch can be NaN or overflow.
  bool finite() const { return query_.finite() && (self || ref_->finite()); }
  bool has_pairs() const { return self ? n > 1 : n > 0 && m > 0; }

  // Positives and negatives of every query row (of_refs: of every reference), [2, n], whatever
  // their distance.
  std::vector<int64_t> counts(bool of_refs = false) const {
    if (rule_.rule != Rule::kAny) return labels_.count(rule_, self, of_refs);
    PairBatch<T> batch = batch_;
    if (of_refs) {
      std::swap(batch.query, batch.ref);
      std::swap(batch.query_labels, batch.ref_labels);
    }
    const int64_t size = batch.query.n;
    std::vector<int64_t> counts(static_cast<size_t>(2 * size), 0);
    // Whole rows of one block of rows, so that a row belongs to one task.
    const Blocks rows = blocks(size), columns = blocks(batch.ref.n);
    for_each(rows.count(), n * m >= kParallelWork / 64, [&](int64_t i) {
      for (int64_t j = 0; j < columns.count(); ++j) {
        const Block block{rows.begin(i), rows.end(i), columns.begin(j), columns.end(j), false};
        cpu_kernels<T>().count_pairs(batch, block, counts.data(), counts.data() + size);
      }
    });
    return counts;
  }

  // Calls f(block, tile) for all blocks in the order of schedule.h, tile with room for
  // kTileElements. A self-batch: blocks with columns from their rows on, each pair once.
  // `positives_only`: blocks that certainly hold no positive may be left out, which are nearly all
  // if the rows come class by class.
  template <class F>
  void sweep(bool positives_only, const F& f) const {
    if (n == 0 || m == 0) return;
    const Blocks rows = blocks(n), columns = blocks(m);
    std::vector<ClassRange> of_rows, of_columns;
    if (positives_only && rule_.rule != Rule::kAny) {
      of_rows = class_ranges(rows, batch_.query_labels);
      of_columns = class_ranges(columns, batch_.ref_labels);
    }
    const Schedule schedule = self ? Schedule::symmetric(rows.count())
                                   : Schedule::rectangular(rows.count(), columns.count());
    schedule.run(n * m * std::max<int64_t>(d, 16) >= kParallelWork, [&](int64_t i, int64_t j) {
      if (!of_rows.empty() &&
          !of_rows[static_cast<size_t>(i)].meets(of_columns[static_cast<size_t>(j)]))
        return;
      const Block block{rows.begin(i), rows.end(i), columns.begin(j), columns.end(j),
                        self && i == j};
      f(block, thread_tile<T>());
    });
  }

  const bool self;
  const int64_t n, m, d;

 private:
  // The ids of the classes of a block of rows lie between these.
  struct ClassRange {
    int32_t low = std::numeric_limits<int32_t>::max(), high = -1;
    bool meets(const ClassRange& o) const { return low <= o.high && o.low <= high; }
  };

  static std::vector<ClassRange> class_ranges(const Blocks& blocks, const Labels& labels) {
    std::vector<ClassRange> ranges(static_cast<size_t>(blocks.count()));
    for (int64_t b = 0; b < blocks.count(); ++b) {
      ClassRange& range = ranges[static_cast<size_t>(b)];
      for (int64_t i = blocks.begin(b); i < blocks.end(b); ++i) {
        const int32_t id = labels.classes[i];
        if (id < 0) continue;  // of no class, or in no pair
        range.low = std::min(range.low, id);
        range.high = std::max(range.high, id);
      }
    }
    return ranges;
  }

  // What keeps one block of rows in half of a 1 MB second-level cache.
  Blocks blocks(int64_t size) const {
    const int64_t fits = (int64_t{1} << 19) / std::max<int64_t>(d * int64_t{sizeof(T)}, 1);
    return {size, cpu_kernels<T>().panel_width,
            std::min(std::max<int64_t>(fits, 1), kMaxBlockRows)};
  }

  const LabelRule rule_;
  Operand<T> query_;
  std::optional<Operand<T>> ref_;
  LabelTables labels_;
  PairBatch<T> batch_;
};

// Compare-and-skip rules would drop pairs with NaN: no finite loss, and no finite gradient.
template <class T>
void poison_unless_finite(const PairOperands<T>& pairs, Tensor& grad_query, Tensor& grad_ref) {
  if (pairs.finite() || !pairs.has_pairs()) return;
  torch::stable::fill_(grad_query, std::numeric_limits<double>::quiet_NaN());
  torch::stable::fill_(grad_ref, std::numeric_limits<double>::quiet_NaN());
}

}  // namespace flashmetric
