// SPDX-License-Identifier: Apache-2.0
// Listed pairs of rows, and the gradient of their distances. The gradient is gathered, not
// scattered: each row sums the pairs that name it, in the order of the list, so it needs no atomics
// and does not depend on the number of threads.
#pragma once

#include <batch.h>

#include <tuple>

namespace flashmetric {

// Rows without panels; norms only where the distance treats zero rows apart.
template <class T>
struct PlainRows {
  Tensor tensor;
  Buffer<T> norms;

  PlainRows(const Tensor& x, Distance distance) : tensor(rows_as<T>(x)) {
    if (!has_unit_rows(distance)) return;
    norms = Buffer<T>(x.size(0));
    std::vector<T> origin(static_cast<size_t>(x.size(1)), T(0));
    std::vector<int32_t> all(static_cast<size_t>(x.size(0)));
    std::iota(all.begin(), all.end(), 0);
    cpu_kernels<T>().exact(Distance::kSqeuclidean, origin.data(), T(0), side(), all.data(),
                           x.size(0), norms.data());
  }
  Side<T> side() const {
    return {data<T>(tensor), nullptr,        nullptr,       norms.data(),
            nullptr,         tensor.size(0), tensor.size(1)};
  }
};

// The listed pairs, checked: rows of pairs that name no row (-1) are -1 on both sides.
struct PairList {
  std::vector<int32_t> query, ref;

  PairList(const OptionalTensor& query_index, const Tensor& ref_index, int64_t n, int64_t m) {
    const int64_t count = ref_index.numel();
    STD_TORCH_CHECK(ref_index.scalar_type() == ScalarType::Long, "ref_index: int64 expected");
    STD_TORCH_CHECK(count < std::numeric_limits<int32_t>::max(),
                    "ref_index: fewer than 2^31 pairs expected");
    const Tensor right = as_contiguous(ref_index);
    Tensor left = right;
    if (query_index.has_value()) {
      STD_TORCH_CHECK(query_index->scalar_type() == ScalarType::Long,
                      "query_index: int64 expected");
      STD_TORCH_CHECK(query_index->numel() == count, "query_index: as many as ref_index expected");
      left = as_contiguous(*query_index);
    } else {
      STD_TORCH_CHECK(ref_index.dim() == 2 && ref_index.size(1) == n,
                      "ref_index: one column per query row expected");
    }
    const int64_t* i = data<int64_t>(left);
    const int64_t* j = data<int64_t>(right);
    query.resize(static_cast<size_t>(count));
    ref.resize(static_cast<size_t>(count));
    int64_t column = 0;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t from = query_index.has_value() ? i[t] : column;
      column = column + 1 == n ? 0 : column + 1;
      STD_TORCH_CHECK(from >= -1 && from < n, "query_index: -1 or a row below ", n,
                      " expected, got ", from);
      STD_TORCH_CHECK(j[t] >= -1 && j[t] < m, "ref_index: -1 or a row below ", m, " expected, got ",
                      j[t]);
      const bool named = from >= 0 && j[t] >= 0;
      query[static_cast<size_t>(t)] = named ? static_cast<int32_t>(from) : -1;
      ref[static_cast<size_t>(t)] = named ? static_cast<int32_t>(j[t]) : -1;
    }
  }
  int64_t size() const { return static_cast<int64_t>(query.size()); }
};

inline void check_pair_operands(const Tensor& query, const OptionalTensor& ref) {
  STD_TORCH_CHECK(query.dim() == 2, "query: 2 dimensions expected, got ", query.dim());
  if (!ref.has_value()) return;
  STD_TORCH_CHECK(ref->dim() == 2 && ref->size(1) == query.size(1), "ref: ", query.size(1),
                  " columns expected");
  STD_TORCH_CHECK(ref->scalar_type() == query.scalar_type(), "ref: the dtype of query expected");
}

// grad += contributions of the pairs in which each row of `own` takes part, over rows of `other`.
template <class T>
void gather_gradient(Distance distance, const Side<T>& own, const Side<T>& other,
                     const std::vector<int32_t>& own_index, const std::vector<int32_t>& other_index,
                     const std::vector<T>& coefficient, T* grad) {
  const RowLists lists(own_index.data(), static_cast<int64_t>(own_index.size()), own.n);
  constexpr int64_t kRowsPerTask = 64;
  const bool parallel = static_cast<int64_t>(own_index.size()) * own.d * 4 >= kParallelWork;
  for_each((own.n + kRowsPerTask - 1) / kRowsPerTask, parallel, [&](int64_t task) {
    std::vector<int32_t> rows;
    std::vector<T> weights;
    const int64_t end = std::min((task + 1) * kRowsPerTask, own.n);
    for (int64_t r = task * kRowsPerTask; r < end; ++r) {
      rows.clear();
      weights.clear();
      for (int64_t k = 0; k < lists.count(r); ++k) {
        const size_t t = static_cast<size_t>(lists.begin(r)[k]);
        if (coefficient[t] == T(0)) continue;
        rows.push_back(other_index[t]);
        weights.push_back(coefficient[t]);
      }
      if (!rows.empty())
        cpu_kernels<T>().accumulate(distance, own.rows + r * own.d, other, rows.data(),
                                    weights.data(), static_cast<int64_t>(rows.size()),
                                    grad + r * own.d);
    }
  });
}

// Gradients of query and of ref (no rows unless wanted). grad_at(t) is the gradient of the loss in
// the t-th pair's distance.
template <class T, class F>
std::tuple<Tensor, Tensor> pair_gradients(const Tensor& query, const OptionalTensor& ref,
                                          const OptionalTensor& query_index,
                                          const Tensor& ref_index, const Tensor& value,
                                          const std::string& distance, bool with_ref_grad,
                                          const F& grad_at) {
  check_pair_operands(query, ref);
  const Distance which = parse_distance(distance);
  const PlainRows<T> left(query, which);
  const PlainRows<T> right(ref.has_value() ? *ref : query, which);
  const Side<T> x = left.side(), y = right.side();
  const PairList pairs(query_index, ref_index, x.n, y.n);
  STD_TORCH_CHECK(value.numel() == pairs.size(), "distance_value: one element per pair expected");
  const Tensor values = rows_as<T>(value);
  std::vector<T> coefficient(static_cast<size_t>(pairs.size()), T(0));
  for (size_t t = 0; t < coefficient.size(); ++t) {
    const int32_t i = pairs.query[t], j = pairs.ref[t];
    if (i < 0) continue;
    if (x.norms != nullptr && (x.norms[i] == T(0) || y.norms[j] == T(0))) continue;
    coefficient[t] = grad_at(t) * slope_at(which, data<T>(values)[t]);
  }
  const auto zeros = [&](int64_t rows) {
    return torch::stable::new_zeros(query, {rows, query.size(1)}, scalar_type<T>());
  };
  const bool two_sided = ref.has_value() && with_ref_grad;
  Tensor grad_query = zeros(x.n), grad_ref = zeros(two_sided ? y.n : 0);
  gather_gradient(which, x, y, pairs.query, pairs.ref, coefficient, mutable_data<T>(grad_query));
  if (two_sided || !ref.has_value())
    gather_gradient(which, y, x, pairs.ref, pairs.query, coefficient,
                    mutable_data<T>(two_sided ? grad_ref : grad_query));
  return std::make_tuple(like_input(grad_query, query), like_input(grad_ref, query));
}

}  // namespace flashmetric
