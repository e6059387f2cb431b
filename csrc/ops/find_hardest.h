// SPDX-License-Identifier: Apache-2.0
// Per query row the farthest reference of its class and the nearest of another class.
// Positives are few and compared by exact differences (many: like negatives); negatives by tiles of
// inner products, each tile serving both of its sides in a self-batch; the winners are measured by
// exact differences, and among near rows so is every reference that rounding may have hidden.
#pragma once

#include <batch.h>

namespace flashmetric {

// Running minima of one kind of pair for all rows.
template <class T>
struct Minima {
  Buffer<T> key;
  Buffer<int32_t> index;

  Minima() = default;
  explicit Minima(int64_t n) : key(n, infinity<T>()), index(n, -1) {}
  Nearest<T> at(int64_t offset) { return {key.data() + offset, index.data() + offset}; }
};

template <class T>
class Hardest {
 public:
  // `exact` compares every pair by exact differences, none by its key. Direct distances have no
  // other way.
  Hardest(const Batch<T>& batch, Distance distance, bool exact)
      : batch_(batch),
        distance_(distance),
        exact_(exact || is_direct(distance)),
        lists_(batch.ref_lists()),
        tiled_positives_(!exact_ && batch.large_classes(lists_)),
        negative_(exact_ ? 0 : batch.n),
        positive_(tiled_positives_ ? batch.n : 0),
        undecided_(exact_ ? 0 : batch.n, 0) {}

  // Writes [2, n]: the positive of every row, then the negatives.
  void run(int64_t* index, T* distances) {
    if (!exact_ && batch_.n > 0 && batch_.m > 0) sweep();
    constexpr int64_t kRowsPerTask = 16;
    const int64_t positives = tiled_positives_ ? 1 : batch_.m / (batch_.classes + 1);
    const int64_t pairs_per_row = exact_ ? batch_.m : 1 + positives;
    const bool parallel = batch_.n * batch_.d * pairs_per_row * 4 >= kParallelWork;
    for_each((batch_.n + kRowsPerTask - 1) / kRowsPerTask, parallel, [&](int64_t task) {
      Scratch scratch;
      Found found[2][kRowsPerTask];
      const int64_t begin = task * kRowsPerTask;
      const int64_t end = std::min(begin + kRowsPerTask, batch_.n);
      if (exact_) measure_all(begin, end, scratch, found[0], found[1]);
      for (int64_t i = begin; i < end; ++i) {
        if (!exact_) {
          found[0][i - begin] = positive(i, scratch);
          found[1][i - begin] = negative(i, scratch);
        }
        for (int64_t kind = 0; kind < 2; ++kind)
          finish(found[kind][i - begin], kind * batch_.n + i, index, distances);
      }
    });
    if (!exact_) decide(index + batch_.n, distances + batch_.n);
  }

 private:
  struct Found {
    int32_t index = -1;
    T distance = T(0);
  };
  struct Scratch {
    std::vector<int32_t> positives, negatives;
    std::vector<T> values;
  };

  Extremes<T> extremes(Minima<T>& negative, Minima<T>& positive, int64_t offset) const {
    return {negative.at(offset),
            tiled_positives_ ? positive.at(offset) : Nearest<T>{nullptr, nullptr}};
  }

  void sweep() {
    const CpuKernels<T>& kernels = cpu_kernels<T>();
    const bool parallel = batch_.n * batch_.m * batch_.d >= kParallelWork;
    const Blocks columns(batch_.m, kernels.panel_width, batch_.block_rows());
    if (batch_.self) {
      const Extremes<T> rows = extremes(negative_, positive_, 0);
      Schedule::symmetric(columns.count()).run(parallel, [&](int64_t i, int64_t j) {
        const Block block{columns.begin(i), columns.end(i), columns.begin(j), columns.end(j),
                          i == j};
        kernels.hardest(batch_.query, batch_.ref, block, rows, &rows);
      });
      return;
    }
    // Few queries against many references: split the references too. Minima of parts merge in any
    // order to the same result, ties included.
    const Blocks row_blocks(batch_.n, kernels.panel_width, batch_.block_rows());
    constexpr int64_t kWantedTasks = 64;
    const int64_t parts =
        std::min((kWantedTasks + row_blocks.count() - 1) / row_blocks.count(), columns.count());
    Minima<T> negative(parts * batch_.n), positive(tiled_positives_ ? parts * batch_.n : 0);
    for_each(row_blocks.count() * parts, parallel, [&](int64_t task) {
      const int64_t i = task % row_blocks.count(), part = task / row_blocks.count();
      const Extremes<T> partial = extremes(negative, positive, part * batch_.n);
      for (int64_t j = columns.count() * part / parts; j < columns.count() * (part + 1) / parts;
           ++j) {
        const Block block{row_blocks.begin(i), row_blocks.end(i), columns.begin(j), columns.end(j),
                          false};
        kernels.hardest(batch_.query, batch_.ref, block, partial, nullptr);
      }
    });
    merge(negative, negative_);
    if (tiled_positives_) merge(positive, positive_);
  }

  // Parts cover ascending references, so the first of equal keys has the lowest index.
  void merge(const Minima<T>& parts, Minima<T>& out) const {
    for (int64_t k = 0; k < parts.key.size(); ++k) {
      const int64_t i = k % batch_.n;
      if (parts.key[k] < out.key[i]) {
        out.key[i] = parts.key[k];
        out.index[i] = parts.index[k];
      }
    }
  }

  Found positive(int64_t i, Scratch& scratch) const {
    const int32_t own = batch_.query.classes[i];
    Found found;
    if (tiled_positives_ && measured(i, positive_.index[i], found)) return found;
    // By exact differences over the whole class.
    found = {};
    if (own >= 0) compare(i, true, lists_.begin(own), lists_.count(own), scratch, found);
    return found;
  }

  Found negative(int64_t i, Scratch& scratch) {
    Found found;
    if (measured(i, negative_.index[i], found)) return found;
    if (batch_.finite()) {
      undecided_[i] = 1;
      return found;
    }
    found = {};
    split(i, 0, batch_.m, scratch);
    compare(i, false, scratch.negatives, scratch, found);
    return found;
  }

  // Negatives of rows whose lowest key cannot be trusted: by exact differences from the references
  // that can be nearest, which are few even where most rows are near.
  void decide(int64_t* index, T* distances) const {
    constexpr int64_t kRowsPerTask = 48;
    std::vector<int32_t> rows;
    for (int64_t i = 0; i < batch_.n; ++i)
      if (undecided_[i] != 0) rows.push_back(static_cast<int32_t>(i));
    const auto all = static_cast<int64_t>(rows.size());
    const CpuKernels<T>& kernels = cpu_kernels<T>();
    const int64_t step = round_up(batch_.block_rows(), kernels.panel_width);
    const bool parallel = all * batch_.m * batch_.d >= kParallelWork;
    for_each((all + kRowsPerTask - 1) / kRowsPerTask, parallel, [&](int64_t task) {
      const int64_t begin = task * kRowsPerTask;
      const int64_t count = std::min(kRowsPerTask, all - begin);
      Buffer<int32_t> list(kRowsPerTask * step), listed(kRowsPerTask);
      const Closest<T> op{rows.data() + begin, count,         negative_.key.data(),
                          list.data(),         listed.data(), step};
      Found found[kRowsPerTask];
      Scratch scratch;
      for (int64_t j = 0; j < batch_.m; j += step) {
        kernels.list_closest(batch_.query, batch_.ref, j, std::min(j + step, batch_.m), op);
        for (int64_t t = 0; t < count; ++t)
          compare(op.rows[t], false, op.list + t * step, listed[t], scratch, found[t]);
      }
      for (int64_t t = 0; t < count; ++t) finish(found[t], op.rows[t], index, distances);
    });
  }

  // Measures what the keys found; whether it can be trusted. Among rows this much closer to each
  // other than to the origin the Gram form may have picked the wrong one, and with a non-finite row
  // no key may have compared at all.
  bool measured(int64_t i, int32_t index, Found& found) const {
    found.index = index;
    if (!batch_.finite()) return false;
    if (index < 0) return true;
    T u;
    cpu_kernels<T>().exact(distance_, batch_.query.rows + i * batch_.d, batch_.query.norms[i],
                           batch_.ref, &index, 1, &u);
    found.distance = with_distance(distance_, [&](auto d) { return decltype(d)::value(u); });
    return distance_ == Distance::kDot ||
           u >= static_cast<T>(kNearFraction) * (batch_.query.norms[i] + batch_.ref.norms[index]);
  }

  // All pairs of rows [begin, end) by exact differences, few references at a time, so that they
  // are in the first-level cache for all but the first of the rows.
  void measure_all(int64_t begin, int64_t end, Scratch& scratch, Found* positives,
                   Found* negatives) const {
    constexpr int64_t kCached = int64_t{1} << 14;
    const int64_t step =
        std::max<int64_t>(kCached / std::max<int64_t>(batch_.d * int64_t{sizeof(T)}, 1), 8);
    for (int64_t j = 0; j < batch_.m; j += step) {
      const int64_t j_end = std::min(j + step, batch_.m);
      for (int64_t i = begin; i < end; ++i) {
        split(i, j, j_end, scratch);
        compare(i, true, scratch.positives, scratch, positives[i - begin]);
        compare(i, false, scratch.negatives, scratch, negatives[i - begin]);
      }
    }
  }

  // References [begin, end) of the class of row i, itself included, and of others.
  void split(int64_t i, int64_t begin, int64_t end, Scratch& scratch) const {
    int64_t count[2] = {0, 0};
    scratch.positives.resize(static_cast<size_t>(end - begin));
    scratch.negatives.resize(static_cast<size_t>(end - begin));
    int32_t* lists[2] = {scratch.negatives.data(), scratch.positives.data()};
    // Without a branch, which would be mispredicted.
    for (int64_t j = begin; j < end; ++j) {
      const bool same = batch_.ref.classes[j] == batch_.query.classes[i];
      lists[same][count[same]++] = static_cast<int32_t>(j);
    }
    scratch.negatives.resize(static_cast<size_t>(count[0]));
    scratch.positives.resize(static_cast<size_t>(count[1]));
  }

  void compare(int64_t i, bool positives, const std::vector<int32_t>& list, Scratch& scratch,
               Found& found) const {
    compare(i, positives, list.data(), static_cast<int64_t>(list.size()), scratch, found);
  }

  // Distances, not u, are compared: of several u with the same root the first one wins.
  void compare(int64_t i, bool positives, const int32_t* list, int64_t count, Scratch& scratch,
               Found& found) const {
    const int64_t own = batch_.self ? i : -1;
    if (!batch_.finite()) {
      // All distances are NaN: one index stands for all.
      for (int64_t t = 0; t < count && found.index < 0; ++t)
        if (list[t] != own) found.index = list[t];
      return;
    }
    scratch.values.resize(static_cast<size_t>(count));
    T* u = scratch.values.data();
    cpu_kernels<T>().exact(distance_, batch_.query.rows + i * batch_.d, batch_.query.norms[i],
                           batch_.ref, list, count, u);
    const T sign = positives ? T(1) : T(-1);
    // The extreme first and its place afterwards: a running place costs mispredicted branches.
    T best = -infinity<T>();
    for (int64_t t = 0; t < count; ++t) {
      u[t] = list[t] == own ? -infinity<T>() : sign * u[t];
      best = max(best, u[t]);
    }
    if (best == -infinity<T>()) return;
    with_distance(distance_, [&](auto d) {
      const T distance = decltype(d)::value(sign * best);
      if (found.index >= 0 && !(sign * distance > sign * found.distance)) return;
      // Smaller u may have the same root.
      const T close = best - 4 * std::numeric_limits<T>::epsilon() * std::abs(best);
      int64_t t = 0;
      while (u[t] < close || decltype(d)::value(sign * u[t]) != distance) ++t;
      found = {list[t], distance};
    });
  }

  void finish(Found found, int64_t at, int64_t* index, T* distances) const {
    index[at] = found.index;
    // The true winner is unknown, and a finite loss with a NaN gradient would hide that.
    distances[at] =
        found.index >= 0 && !batch_.finite() ? std::numeric_limits<T>::quiet_NaN() : found.distance;
  }

  const Batch<T>& batch_;
  const Distance distance_;
  const bool exact_;
  const RowLists lists_;
  const bool tiled_positives_;
  Minima<T> negative_, positive_;
  Buffer<int32_t> undecided_;
};

}  // namespace flashmetric
