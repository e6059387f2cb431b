// SPDX-License-Identifier: Apache-2.0
// row_top_k: the k nearest or farthest pairs of a kind of every row. The kernel lists the pairs
// that are below the k-th best key so far; a list is cut down to k pairs when it has grown to 2 k.
#include <row_sweep.h>
#include <torch/csrc/stable/library.h>

#include <utility>

namespace flashmetric {
namespace {

template <class T>
class TopK {
 public:
  TopK(const PairOperands<T>& pairs, bool positives, bool farthest, int64_t k)
      : pairs_(pairs),
        positives_(positives),
        farthest_(farthest),
        wanted_(k),
        k_(std::min(k, pairs.m)),
        capacity_(2 * k_ + kMaxBlockRows) {}

  void run(int64_t* index) const {
    // Of a range of rows: what its lists can hold is never all in use.
    constexpr int64_t kListBytes = int64_t{1} << 22;
    const int64_t rows = kListBytes / (capacity_ * int64_t{sizeof(T) + sizeof(int32_t)});
    for_row_ranges(pairs_, rows, [&](int64_t begin, int64_t end) {
      Lists lists(end - begin, capacity_);
      const Candidates<T> op{positives_,         farthest_,         begin,
                             lists.bound.data(), capacity_,         lists.key.data(),
                             lists.index.data(), lists.count.data()};
      sweep_references(pairs_, begin, end, [&](const Block& block, T* tile) {
        cpu_kernels<T>().list_candidates(pairs_.batch(), block, op, tile);
        for (int64_t row = 0; row < end - begin; ++row)
          if (lists.count[row] >= (lists.bound[row] == infinity<T>() ? k_ : 2 * k_))
            lists.cut(row, k_);
      });
      for (int64_t row = 0; row < end - begin; ++row)
        lists.write(row, k_, wanted_, index + (begin + row) * wanted_);
    });
  }

 private:
  struct Lists {
    Buffer<T> bound, key;
    Buffer<int32_t> index;
    Buffer<int64_t> count;
    int64_t capacity;
    std::vector<std::pair<T, int32_t>> pairs;  // of the row at hand, ordered by key, then by index

    Lists(int64_t rows, int64_t capacity)
        : bound(rows, infinity<T>()),
          key(rows * capacity),
          index(rows * capacity),
          count(rows, 0),
          capacity(capacity) {}

    void load(int64_t row) {
      pairs.resize(static_cast<size_t>(count[row]));
      for (int64_t c = 0; c < count[row]; ++c)
        pairs[static_cast<size_t>(c)] = {key[row * capacity + c], index[row * capacity + c]};
    }

    // Keeps the first k, in any order. Later pairs have higher indices: they must be below the k-th
    // key to be among the first.
    void cut(int64_t row, int64_t k) {
      load(row);
      const auto last = pairs.begin() + (k - 1);
      std::nth_element(pairs.begin(), last, pairs.end());
      bound[row] = last->first;
      count[row] = k;
      for (int64_t c = 0; c < k; ++c) {
        key[row * capacity + c] = pairs[static_cast<size_t>(c)].first;
        index[row * capacity + c] = pairs[static_cast<size_t>(c)].second;
      }
    }

    void write(int64_t row, int64_t k, int64_t wanted, int64_t* out) {
      if (count[row] > k) cut(row, k);
      load(row);
      const int64_t found = count[row];
      std::sort(pairs.begin(), pairs.end());
      for (int64_t c = 0; c < wanted; ++c)
        out[c] = c < found ? pairs[static_cast<size_t>(c)].second : -1;
    }
  };

  const PairOperands<T>& pairs_;
  const bool positives_, farthest_;
  const int64_t wanted_, k_, capacity_;
};

Tensor row_top_k_cpu(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                     const OptionalTensor& ref_labels, const std::string& rule,
                     const std::string& distance, const std::string& kind, int64_t k,
                     bool farthest) {
  check_pairs(query, labels, ref, ref_labels, rule);
  STD_TORCH_CHECK(k >= 0, "k: at least 0 expected, got ", k);
  const bool positives = parse_kind(kind);
  Tensor index = torch::stable::new_empty(query, {query.size(0), k}, ScalarType::Long);
  int64_t* out = mutable_data<int64_t>(index);
  std::fill(out, out + query.size(0) * k, int64_t{-1});
  const auto select = [&](const auto& pairs) {
    if (k > 0 && pairs.m > 0) TopK(pairs, positives, farthest, k).run(out);
  };
  with_accumulate_type(query, [&](auto type) {
    const PairOperands<decltype(type)> pairs(query, labels, ref, ref_labels, rule,
                                             parse_distance(distance));
    if (pairs.finite()) {
      select(pairs);
    } else {
      with_equal_distances(query, labels, ref, ref_labels, rule, select);
    }
  });
  return index;
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("row_top_k", TORCH_BOX(&flashmetric::row_top_k_cpu));
}
