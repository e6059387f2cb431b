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
        lists_(batch.ref_lists()),
        tiled_positives_(batch.large_classes(lists_)),
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
        finish(positive(i, u), i, index, distances);
        finish(negative(i, u), i, index + batch_.n, distances + batch_.n);
      }
    });
  }

 private:
  struct Found {
    int32_t index;
    T u;
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

  Found positive(int64_t i, std::vector<T>& u) const {
    if (!tiled_positives_) return farthest_positive(i, u);
    const Found found = measured(i, positive_.index[i]);
    return trustworthy(i, found) ? found : farthest_positive(i, u);
  }

  Found negative(int64_t i, std::vector<T>& u) const {
    const Found found = measured(i, negative_.index[i]);
    return trustworthy(i, found) ? found : nearest_negative(i, u);
  }

  // Among rows this much closer to each other than to the origin the Gram form may have picked the
  // wrong one, and with a non-finite row no key may have compared at all.
  bool trustworthy(int64_t i, Found found) const {
    if (!batch_.finite()) return false;
    if (found.index < 0 || distance_ == Distance::kDot) return true;
    return found.u >=
           static_cast<T>(kNearFraction) * (batch_.query.norms[i] + batch_.ref.norms[found.index]);
  }

  Found measured(int64_t i, int32_t index) const {
    Found found{index, T(0)};
    if (index >= 0)
      cpu_kernels<T>().exact(distance_, batch_.query.rows + i * batch_.d, batch_.query.norms[i],
                             batch_.ref, &index, 1, &found.u);
    return found;
  }

  // By exact differences over the whole class.
  Found farthest_positive(int64_t i, std::vector<T>& u) const {
    const int32_t own = batch_.query.classes[i];
    if (own < 0) return {-1, T(0)};
    return best(i, lists_.begin(own), lists_.count(own), u,
                [](T candidate, T best) { return candidate > best; });
  }

  // By exact differences over all other classes.
  Found nearest_negative(int64_t i, std::vector<T>& u) const {
    std::vector<int32_t> list;
    for (int64_t j = 0; j < batch_.m; ++j) {
      if (batch_.ref.classes[j] == batch_.query.classes[i]) continue;
      list.push_back(static_cast<int32_t>(j));
      if (!batch_.finite()) break;  // all distances are NaN: one index stands for all
    }
    return best(i, list.data(), static_cast<int64_t>(list.size()), u,
                [](T candidate, T best) { return candidate < best; });
  }

  template <class F>
  Found best(int64_t i, const int32_t* list, int64_t count, std::vector<T>& u,
             const F& beats) const {
    u.resize(static_cast<size_t>(count));
    cpu_kernels<T>().exact(distance_, batch_.query.rows + i * batch_.d, batch_.query.norms[i],
                           batch_.ref, list, count, u.data());
    Found found{-1, T(0)};
    for (int64_t t = 0; t < count; ++t) {
      if (batch_.self && list[t] == i) continue;
      const T candidate = u[static_cast<size_t>(t)];
      if (found.index < 0 || beats(candidate, found.u)) found = {list[t], candidate};
    }
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
