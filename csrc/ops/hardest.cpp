// SPDX-License-Identifier: Apache-2.0
// hardest: per query row the farthest reference of its class and the nearest of another class.
// Positives are few and compared by exact differences (many: like negatives); negatives by tiles of
// inner products, each tile serving both of its sides in a self-batch; the winners are measured by
// exact differences.
#include <batch.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

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
  Hardest(const Batch<T>& batch, Distance distance)
      : batch_(batch),
        distance_(distance),
        lists_(batch.ref.classes, batch.m, batch.classes),
        tiled_positives_(positives_outweigh_tiles()),
        negative_(batch.n),
        positive_(tiled_positives_ ? batch.n : 0) {}

  void run(int64_t* index, T* distances) {
    if (batch_.n > 0 && batch_.m > 0) sweep();
    constexpr int64_t kRowsPerTask = 16;
    const int64_t pairs_per_row = 1 + (tiled_positives_ ? 1 : batch_.m / (batch_.classes + 1));
    const bool parallel = batch_.n * batch_.d * pairs_per_row * 4 >= kParallelWork;
    for_each((batch_.n + kRowsPerTask - 1) / kRowsPerTask, parallel, [&](int64_t task) {
      std::vector<T> u;
      const int64_t end = std::min((task + 1) * kRowsPerTask, batch_.n);
      for (int64_t i = task * kRowsPerTask; i < end; ++i) {
        finish(tiled_positives_ ? measured(i, stand_in(i, positive_.index[i], true))
                                : farthest_positive(i, u),
               i, index, distances);
        finish(measured(i, stand_in(i, negative_.index[i], false)), i, index + batch_.n,
               distances + batch_.n);
      }
    });
  }

 private:
  struct Found {
    int32_t index;
    T u;
  };

  // An exact difference costs about eight times a multiply-add of a tile, so with large classes
  // positives are selected in the tiles too, where a far pair loses nothing to cancellation.
  bool positives_outweigh_tiles() const {
    int64_t pairs = 0;
    for (int64_t i = 0; i < batch_.n; ++i)
      if (batch_.query.classes[i] >= 0) pairs += lists_.count(batch_.query.classes[i]);
    return pairs > batch_.n * batch_.m / 32;
  }

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

  Found farthest_positive(int64_t i, std::vector<T>& u) const {
    const int32_t own = batch_.query.classes[i];
    Found best{-1, T(0)};
    if (own < 0) return best;
    const int32_t* list = lists_.begin(own);
    const int64_t count = lists_.count(own);
    u.resize(static_cast<size_t>(count));
    cpu_kernels<T>().exact(distance_, batch_.query.rows + i * batch_.d, batch_.query.norms[i],
                           batch_.ref, list, count, u.data());
    for (int64_t t = 0; t < count; ++t) {
      if (batch_.self && list[t] == i) continue;
      if (best.index < 0 || u[static_cast<size_t>(t)] > best.u)
        best = {list[t], u[static_cast<size_t>(t)]};
    }
    return best;
  }

  // With a non-finite row no key may have compared below infinity: any pair stands for all.
  int32_t stand_in(int64_t i, int32_t found, bool same_class) const {
    if (found >= 0 || batch_.finite()) return found;
    for (int64_t j = 0; j < batch_.m; ++j) {
      const bool same = batch_.ref.classes[j] == batch_.query.classes[i];
      if (same == same_class && !(batch_.self && j == i)) return static_cast<int32_t>(j);
    }
    return -1;
  }

  Found measured(int64_t i, int32_t index) const {
    Found found{index, T(0)};
    if (index >= 0)
      cpu_kernels<T>().exact(distance_, batch_.query.rows + i * batch_.d, batch_.query.norms[i],
                             batch_.ref, &index, 1, &found.u);
    return found;
  }

  void finish(Found found, int64_t i, int64_t* index, T* distances) const {
    index[i] = found.index;
    if (found.index < 0) {
      distances[i] = T(0);
    } else if (!batch_.finite()) {
      // The true winner is unknown, and a finite loss with a NaN gradient would hide that.
      distances[i] = std::numeric_limits<T>::quiet_NaN();
    } else {
      distances[i] = with_distance(distance_, [&](auto d) { return decltype(d)::value(found.u); });
    }
  }

  const Batch<T>& batch_;
  const Distance distance_;
  const RowLists lists_;
  const bool tiled_positives_;
  Minima<T> negative_, positive_;
};

std::tuple<Tensor, Tensor> hardest_cpu(const Tensor& query, const Tensor& query_labels,
                                       const OptionalTensor& ref, const OptionalTensor& ref_labels,
                                       const std::string& distance) {
  check_batch(query, query_labels, ref, ref_labels);
  const Distance which = parse_distance(distance);
  return with_accumulate_type(query, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = query.size(0);
    Tensor index = torch::stable::new_empty(query, {2, n}, ScalarType::Long);
    Tensor distances = torch::stable::new_empty(query, {2, n}, scalar_type<T>());
    const Batch<T> batch(query, query_labels, ref, ref_labels, which);
    Hardest<T>(batch, which).run(mutable_data<int64_t>(index), mutable_data<T>(distances));
    return std::make_tuple(index, distances);
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("hardest", TORCH_BOX(&flashmetric::hardest_cpu));
}
