// SPDX-License-Identifier: Apache-2.0
// hardest: per query row the farthest reference of its class and the nearest of another class.
// Positives are few and compared by exact differences; negatives by tiles of inner products, each
// tile serving both of its sides in a self-batch; the winners are measured by exact differences.
#include <batch.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

template <class T>
class Hardest {
 public:
  Hardest(const Batch<T>& batch, Distance distance)
      : batch_(batch), distance_(distance), positives_(batch.ref.classes, batch.m, batch.classes) {}

  void run(int64_t* index, T* distances) {
    Buffer<T> key(batch_.n, infinity<T>());
    Buffer<int32_t> nearest(batch_.n, -1);
    if (batch_.n > 0 && batch_.m > 0) sweep({key.data(), nearest.data()});
    constexpr int64_t kRowsPerTask = 16;
    const bool parallel =
        batch_.n * batch_.d * (2 + batch_.m / (batch_.classes + 1)) * 4 >= kParallelWork;
    for_each((batch_.n + kRowsPerTask - 1) / kRowsPerTask, parallel, [&](int64_t task) {
      std::vector<T> u;
      const int64_t end = std::min((task + 1) * kRowsPerTask, batch_.n);
      for (int64_t i = task * kRowsPerTask; i < end; ++i) {
        finish(farthest_positive(i, u), i, index, distances);
        finish(measured_negative(i, nearest[i]), i, index + batch_.n, distances + batch_.n);
      }
    });
  }

 private:
  struct Found {
    int32_t index;
    T u;
  };

  void sweep(Nearest<T> rows) const {
    const CpuKernels<T>& kernels = cpu_kernels<T>();
    const bool parallel = batch_.n * batch_.m * batch_.d >= kParallelWork;
    const Blocks columns(batch_.m, kernels.panel_width, batch_.block_rows());
    if (batch_.self) {
      Schedule::symmetric(columns.count()).run(parallel, [&](int64_t i, int64_t j) {
        const Block block{columns.begin(i), columns.end(i), columns.begin(j), columns.end(j),
                          i == j};
        kernels.nearest_negative(batch_.query, batch_.ref, block, rows, rows);
      });
      return;
    }
    // Few queries against many references: split the references too. Minima of parts merge in any
    // order to the same result, ties included.
    const Blocks row_blocks(batch_.n, kernels.panel_width, batch_.block_rows());
    constexpr int64_t kWantedTasks = 64;
    const int64_t parts =
        std::min((kWantedTasks + row_blocks.count() - 1) / row_blocks.count(), columns.count());
    Buffer<T> key(parts * batch_.n, infinity<T>());
    Buffer<int32_t> index(parts * batch_.n, -1);
    for_each(row_blocks.count() * parts, parallel, [&](int64_t task) {
      const int64_t i = task % row_blocks.count(), part = task / row_blocks.count();
      const Nearest<T> partial{key.data() + part * batch_.n, index.data() + part * batch_.n};
      for (int64_t j = columns.count() * part / parts; j < columns.count() * (part + 1) / parts;
           ++j) {
        const Block block{row_blocks.begin(i), row_blocks.end(i), columns.begin(j), columns.end(j),
                          false};
        kernels.nearest_negative(batch_.query, batch_.ref, block, partial, {nullptr, nullptr});
      }
    });
    // Parts cover ascending references, so the first of equal keys has the lowest index.
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < batch_.n; ++i)
        if (key[part * batch_.n + i] < rows.key[i]) {
          rows.key[i] = key[part * batch_.n + i];
          rows.index[i] = index[part * batch_.n + i];
        }
  }

  Found farthest_positive(int64_t i, std::vector<T>& u) const {
    const int32_t own = batch_.query.classes[i];
    Found best{-1, T(0)};
    if (own < 0) return best;
    const int32_t* list = positives_.begin(own);
    const int64_t count = positives_.count(own);
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

  Found measured_negative(int64_t i, int32_t nearest) const {
    // With a non-finite row no key may have compared below infinity: any negative stands for all.
    if (nearest < 0 && !batch_.finite())
      for (int64_t j = 0; j < batch_.m && nearest < 0; ++j)
        if (batch_.ref.classes[j] != batch_.query.classes[i]) nearest = static_cast<int32_t>(j);
    Found found{nearest, T(0)};
    if (nearest >= 0)
      cpu_kernels<T>().exact(distance_, batch_.query.rows + i * batch_.d, batch_.query.norms[i],
                             batch_.ref, &nearest, 1, &found.u);
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
  const RowLists positives_;
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
