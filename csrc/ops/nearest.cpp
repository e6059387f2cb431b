// SPDX-License-Identifier: Apache-2.0
// nearest_beyond: for every row and threshold the nearest pair that is farther, or the farthest
// that is nearer. The kernel looks for the lowest key above a limit: for the farthest pairs, keys
// and limits are minus the distances and thresholds.
#include <row_sweep.h>
#include <torch/csrc/stable/library.h>

namespace flashmetric {
namespace {

template <class T>
class Beyond {
 public:
  // `thresholds` [n, count], or null: none is a restriction.
  Beyond(const PairOperands<T>& pairs, bool positives, bool farthest, const T* thresholds,
         int64_t count)
      : pairs_(pairs),
        positives_(positives),
        farthest_(farthest),
        thresholds_(thresholds),
        count_(count),
        length_(padded_length(count)),
        limits_(pairs.n * length_, infinity<T>()),
        key_(pairs.n * length_, infinity<T>()),
        index_(pairs.n * length_, -1) {}

  void run(int64_t* index) {
    const NearestBeyond<T> op{positives_,
                              farthest_,
                              {limits_.data(), length_, count_, length_},
                              key_.data(),
                              index_.data()};
    for_row_ranges(pairs_, kRowsPerSweep, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) prepare(i);
      sweep_references(pairs_, begin, end, [&](const Block& block, T* tile) {
        cpu_kernels<T>().nearest_beyond(pairs_.batch(), block, op, tile);
      });
      for (int64_t i = begin; i < end; ++i) write(i, index + i * count_);
    });
  }

 private:
  T limit(int64_t i, int64_t k) const {
    if (thresholds_ == nullptr) return -infinity<T>();
    const T t = thresholds_[i * count_ + k];
    // Nothing is beyond NaN.
    return t != t ? infinity<T>() : farthest_ ? -t : t;
  }

  void prepare(int64_t i) {
    T* limits = limits_.data() + i * length_;
    for (int64_t k = 0; k < count_; ++k) limits[k] = limit(i, k);
    // Thresholds that ascend or descend already are common: distances of a sorted list.
    if (count_ > 1 && limits[0] > limits[count_ - 1]) std::reverse(limits, limits + count_);
    if (!std::is_sorted(limits, limits + count_)) std::sort(limits, limits + count_);
    key_[i * length_] = -infinity<T>();
  }

  // Results are in the order of the limits; those of equal limits are equal.
  void write(int64_t i, int64_t* out) const {
    const T* limits = limits_.data() + i * length_;
    for (int64_t k = 0; k < count_; ++k) {
      const int64_t at = std::lower_bound(limits, limits + count_, limit(i, k)) - limits;
      out[k] = index_[i * length_ + at + 1];
    }
  }

  const PairOperands<T>& pairs_;
  const bool positives_, farthest_;
  const T* thresholds_;
  const int64_t count_;
  const int32_t length_;
  Buffer<T> limits_, key_;
  Buffer<int32_t> index_;
};

Tensor nearest_beyond_cpu(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                          const OptionalTensor& ref_labels, const std::string& rule,
                          const std::string& distance, const std::string& kind, bool farthest,
                          const Tensor& thresholds) {
  check_pairs(query, labels, ref, ref_labels, rule);
  STD_TORCH_CHECK(thresholds.dim() == 2 && thresholds.size(0) == query.size(0),
                  "thresholds: shape [", query.size(0), ", K] expected");
  const bool positives = parse_kind(kind);
  const int64_t count = thresholds.size(1);
  Tensor index = torch::stable::new_empty(query, {query.size(0), count}, ScalarType::Long);
  int64_t* out = mutable_data<int64_t>(index);
  with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    STD_TORCH_CHECK(thresholds.scalar_type() == scalar_type<T>(),
                    "thresholds: the dtype of distances expected, float64 for float64 rows and "
                    "float32 for all others");
    const PairOperands<T> pairs(query, labels, ref, ref_labels, rule, parse_distance(distance));
    if (pairs.finite()) {
      const Tensor limits = as_contiguous(thresholds);
      Beyond<T>(pairs, positives, farthest, data<T>(limits), count).run(out);
    } else {
      with_equal_distances(query, labels, ref, ref_labels, rule, [&](const auto& equal) {
        Beyond<float>(equal, positives, farthest, nullptr, count).run(out);
      });
    }
  });
  return index;
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("nearest_beyond", TORCH_BOX(&flashmetric::nearest_beyond_cpu));
}
