// SPDX-License-Identifier: Apache-2.0
// pair_distance and its gradient: listed pairs by exact differences. The gradient is gathered, not
// scattered: each row sums the pairs that name it, in the order of the list, so it needs no atomics
// and does not depend on the number of threads.
#include <batch.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

// Rows without panels; norms only where the distance treats zero rows apart.
template <class T>
struct PlainRows {
  Tensor tensor;
  Buffer<T> norms;

  PlainRows(const Tensor& x, Distance distance) : tensor(rows_as<T>(x)) {
    if (!with_distance(distance, [](auto d) { return decltype(d)::kUnitRows; })) return;
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
    for (int64_t t = 0; t < count; ++t) {
      const int64_t from = query_index.has_value() ? i[t] : t % n;
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

void check_pair_operands(const Tensor& query, const OptionalTensor& ref) {
  STD_TORCH_CHECK(query.dim() == 2, "query: 2 dimensions expected, got ", query.dim());
  if (!ref.has_value()) return;
  STD_TORCH_CHECK(ref->dim() == 2 && ref->size(1) == query.size(1), "ref: ", query.size(1),
                  " columns expected");
  STD_TORCH_CHECK(ref->scalar_type() == query.scalar_type(), "ref: the dtype of query expected");
}

Tensor pair_distance_cpu(const Tensor& query, const OptionalTensor& ref,
                         const OptionalTensor& query_index, const Tensor& ref_index,
                         const std::string& distance) {
  check_pair_operands(query, ref);
  const Distance which = parse_distance(distance);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const PlainRows<T> left(query, which);
    const PlainRows<T> right(ref.has_value() ? *ref : query, which);
    const Side<T> x = left.side(), y = right.side();
    const PairList pairs(query_index, ref_index, x.n, y.n);
    Tensor out = torch::stable::new_empty(query, ref_index.sizes(), scalar_type<T>());
    T* values = mutable_data<T>(out);
    constexpr int64_t kPairsPerTask = 256;
    for_each((pairs.size() + kPairsPerTask - 1) / kPairsPerTask,
             pairs.size() * x.d * 4 >= kParallelWork, [&](int64_t task) {
               const int64_t end = std::min((task + 1) * kPairsPerTask, pairs.size());
               for (int64_t t = task * kPairsPerTask; t < end; ++t) {
                 const int32_t i = pairs.query[static_cast<size_t>(t)];
                 const int32_t j = pairs.ref[static_cast<size_t>(t)];
                 values[t] = T(0);
                 if (i < 0) continue;
                 T u;
                 const T norm = x.norms == nullptr ? T(1) : x.norms[i];
                 cpu_kernels<T>().exact(which, x.rows + i * x.d, norm, y, &j, 1, &u);
                 values[t] = with_distance(which, [&](auto d) { return decltype(d)::value(u); });
               }
             });
    return out;
  });
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

std::tuple<Tensor, Tensor> pair_distance_backward_cpu(const Tensor& grad, const Tensor& query,
                                                      const OptionalTensor& ref,
                                                      const OptionalTensor& query_index,
                                                      const Tensor& ref_index, const Tensor& value,
                                                      const std::string& distance,
                                                      bool with_ref_grad) {
  check_pair_operands(query, ref);
  const Distance which = parse_distance(distance);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const PlainRows<T> left(query, which);
    const PlainRows<T> right(ref.has_value() ? *ref : query, which);
    const Side<T> x = left.side(), y = right.side();
    const PairList pairs(query_index, ref_index, x.n, y.n);
    STD_TORCH_CHECK(grad.numel() == pairs.size() && value.numel() == pairs.size(),
                    "grad and distance_value: one element per pair expected");
    const Tensor grads = rows_as<T>(grad), values = rows_as<T>(value);
    std::vector<T> coefficient(static_cast<size_t>(pairs.size()), T(0));
    for (size_t t = 0; t < coefficient.size(); ++t) {
      const int32_t i = pairs.query[t], j = pairs.ref[t];
      if (i < 0) continue;
      if (x.norms != nullptr && (x.norms[i] == T(0) || y.norms[j] == T(0))) continue;
      const T distance_of_pair = data<T>(values)[t];
      // A NaN distance has a NaN gradient, also where the slope is a constant.
      const T slope =
          std::isnan(distance_of_pair)
              ? distance_of_pair
              : with_distance(which, [&](auto d) { return decltype(d)::slope(distance_of_pair); });
      coefficient[t] = data<T>(grads)[t] * slope;
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
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("pair_distance", TORCH_BOX(&flashmetric::pair_distance_cpu));
  m.impl("pair_distance_backward", TORCH_BOX(&flashmetric::pair_distance_backward_cpu));
}
