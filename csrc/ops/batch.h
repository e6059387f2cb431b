// SPDX-License-Identifier: Apache-2.0
// From tensors to what the kernels read: contiguous rows in the accumulate type, packed panels,
// norms, class ids.
#pragma once

#include <buffer.h>
#include <classes.h>
#include <flashmetric/kernels.h>
#include <schedule.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <type_traits>

namespace flashmetric {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Distance parse_distance(const std::string& name);
Term parse_term(const std::string& name);
Reduction parse_reduction(const std::string& name);

// Memory-safety checks only: the messages that users see are the functional layer's.
void check_batch(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
                 const OptionalTensor& ref_labels);

template <class T>
constexpr ScalarType scalar_type() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a value of the accumulate type of `query`: double for float64, else float.
template <class F>
auto with_accumulate_type(const Tensor& query, F&& f) {
  switch (query.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return f(float{});
    default:
      STD_TORCH_CHECK(false, "query: a float64, float32, float16 or bfloat16 tensor expected");
  }
}

// Asks first: a call through torch's dispatcher costs microseconds even when it changes nothing.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

template <class T>
Tensor rows_as(const Tensor& x) {
  return as_contiguous(
      x.scalar_type() == scalar_type<T>() ? x : torch::stable::to(x, scalar_type<T>()));
}

// A result in the accumulate type, rounded once to the dtype of the input it belongs to.
inline Tensor like_input(const Tensor& result, const Tensor& input) {
  return result.scalar_type() == input.scalar_type()
             ? result
             : torch::stable::to(result, input.scalar_type());
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
T infinity() {
  return std::numeric_limits<T>::infinity();
}

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Rows, norms and (for the side that is swept as columns) panels of one tensor.
template <class T>
class Operand {
 public:
  Operand(const Tensor& x, Distance distance, bool with_panels)
      : tensor_(rows_as<T>(x)), n_(x.size(0)), d_(x.size(1)) {
    const CpuKernels<T>& kernels = cpu_kernels<T>();
    const int64_t width = kernels.panel_width;
    const int64_t padded = round_up(n_, width);
    norms_ = Buffer<T>(padded);
    bias_ = Buffer<T>(padded);
    if (with_panels) panels_ = Buffer<T>(padded * d_);
    const T* rows = data<T>(tensor_);
    const bool parallel = n_ * d_ >= kParallelWork / 16;
    constexpr int64_t kPanelsPerTask = 8;
    for_each((padded / width + kPanelsPerTask - 1) / kPanelsPerTask, parallel, [&](int64_t task) {
      const int64_t begin = task * kPanelsPerTask * width;
      const int64_t end = std::min(begin + kPanelsPerTask * width, padded);
      if (with_panels) {
        kernels.pack(rows, n_, d_, begin, end, panels_.data(), norms_.data());
      } else {
        Buffer<T> panel(width * d_);
        for (int64_t p = begin; p < end; p += width)
          kernels.pack(rows + p * d_, n_ - p, d_, 0, width, panel.data(), norms_.data() + p);
      }
    });
    const bool difference = is_difference(distance), unit = has_unit_rows(distance);
    for (int64_t i = 0; i < padded; ++i) {
      // A squared distance is at most four times the larger squared norm.
      finite_ = finite_ && std::isfinite(T(4) * norms_[i]);
      bias_[i] = i >= n_ ? infinity<T>() : !difference ? T(0) : norms_[i];
      // A zero row is at cosine distance 1 from every unit row: u = 1 + 1 - 0.
      if (unit && i < n_ && norms_[i] == T(0)) bias_[i] = T(1);
    }
  }

  Side<T> side(const int32_t* classes) const {
    return {data<T>(tensor_), panels_.data(), bias_.data(), norms_.data(), classes, n_, d_};
  }
  bool finite() const { return finite_; }

 private:
  Tensor tensor_;
  int64_t n_, d_;
  Buffer<T> norms_, bias_, panels_;
  bool finite_ = true;
};

// Queries, references (the queries themselves when `ref` is absent) and their classes.
template <class T>
class Batch {
 public:
  Batch(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
        const OptionalTensor& ref_labels, Distance distance)
      : self(!ref.has_value()),
        query_operand_(query, distance, self),
        query_classes_(padded_size(query.size(0)), kPadding),
        n(query.size(0)),
        m(self ? n : ref->size(0)),
        d(query.size(1)) {
    if (!self) ref_operand_.emplace(*ref, distance, true);
    const Tensor labels = as_contiguous(query_labels);
    ClassTable table(m);
    if (self) {
      number(labels, n, [&](int64_t label) { return table.insert(label); }, query_classes_);
    } else {
      ref_classes_.assign(padded_size(m), kPadding);
      number(
          as_contiguous(*ref_labels), m, [&](int64_t label) { return table.insert(label); },
          ref_classes_);
      number(labels, n, [&](int64_t label) { return table.find(label); }, query_classes_);
    }
    classes = table.count();
    this->query = query_operand_.side(query_classes_.data());
    this->ref = self ? this->query : ref_operand_->side(ref_classes_.data());
  }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  // Whether no distance of the batch can be NaN or overflow.
  bool finite() const { return query_operand_.finite() && (self || ref_operand_->finite()); }

  bool has_pairs() const { return self ? n > 1 : n > 0 && m > 0; }

  // Reference rows of each class.
  RowLists ref_lists() const { return {ref.classes, m, classes}; }

  // An exact difference costs about eight times a multiply-add of a tile: with large classes
  // positives go through the tiles as negatives do.
  bool large_classes(const RowLists& refs) const {
    int64_t pairs = 0;
    for (int64_t i = 0; i < n; ++i)
      if (query.classes[i] >= 0) pairs += refs.count(query.classes[i]);
    return pairs > n * m / 32;
  }

  // Rows per block: what keeps one block of rows in half of a 1 MB second-level cache.
  int64_t block_rows() const {
    const int64_t fits = (int64_t{1} << 19) / std::max<int64_t>(d * int64_t{sizeof(T)}, 1);
    return std::min(std::max<int64_t>(fits, 1), kMaxBlockRows);
  }

  const bool self;

 private:
  static constexpr int32_t kPadding = -2;

  static size_t padded_size(int64_t n) {
    return static_cast<size_t>(round_up(n, cpu_kernels<T>().panel_width));
  }

  template <class F>
  static void number(const Tensor& labels, int64_t n, const F& id, std::vector<int32_t>& out) {
    const int64_t* p = data<int64_t>(labels);
    for (int64_t i = 0; i < n; ++i) out[static_cast<size_t>(i)] = id(p[i]);
  }

  Operand<T> query_operand_;
  std::optional<Operand<T>> ref_operand_;
  std::vector<int32_t> query_classes_, ref_classes_;

 public:
  const int64_t n, m, d;
  int64_t classes = 0;
  Side<T> query, ref;
};

}  // namespace flashmetric
