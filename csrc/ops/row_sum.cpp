// SPDX-License-Identifier: Apache-2.0
// row_sum: per query row the sums, over its positives and over its negatives, of a function of
// scale * distance + offset; with the gradient of both totals in the same pass. row_sum_backward:
// the gradient of any weighted total.
#include <row_parameters.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

// What is computed for a kind. One that is not wanted must be counted all the same, and within
// bounds that takes its distances: the hinge of 0 adds nothing and has no slope.
Term computed(Term term, bool bounded) {
  return term == Term::kNone && bounded ? Term::kHinge : term;
}

// f of every row for one kind, and where it is 0.
template <class T>
struct TermRows {
  std::vector<T> scale, offset, bound, weight, low, high;

  TermRows(const RowParameters<T>& parameters, int kind, Distance distance, Term term)
      : scale(parameters.scale(kind)),
        offset(parameters.offset(kind)),
        bound(parameters.bound(kind)) {
    if (term == Term::kNone) {
      std::fill(scale.begin(), scale.end(), T(0));
      std::fill(offset.begin(), offset.end(), T(0));
    }
    const bool hinge = term == Term::kHinge || term == Term::kSquaredHinge;
    // With bounds the pairs that are kept are counted, whether active or not.
    if (!hinge || !bound.empty()) return;
    low.assign(scale.size(), -infinity<T>());
    high.assign(scale.size(), infinity<T>());
    with_distance(distance, [&](auto d) {
      for (size_t i = 0; i < scale.size(); ++i) limit<decltype(d)>(i, distance);
    });
    // Of the two usually one says nothing.
    const size_t n = static_cast<size_t>(parameters.rows());
    const auto all = [n](std::vector<T>& limits, T same) {
      if (std::all_of(limits.begin(), limits.begin() + static_cast<std::ptrdiff_t>(n),
                      [same](T limit) { return limit == same; }))
        limits.clear();
    };
    all(low, -infinity<T>());
    all(high, infinity<T>());
  }

  RowTerm<T> view(Term term) const {
    return {term,         scale.data(), offset.data(), pointer(bound), pointer(weight),
            pointer(low), pointer(high)};
  }

 private:
  // scale d + offset > 0 by u alone, widened by more than the rounding of the functions involved:
  // no pair may be lost.
  template <class D>
  void limit(size_t i, Distance distance) {
    constexpr T kSlack = sizeof(T) == 4 ? T(1e-5) : T(1e-13);
    if (!(scale[i] != T(0)) || !std::isfinite(scale[i]) || !std::isfinite(offset[i])) return;
    const T at = -offset[i] / scale[i];
    if (!std::isfinite(at)) return;  // overflow: nothing is known
    const T widened = scale[i] < T(0) ? at + kSlack * std::abs(at) : at - kSlack * std::abs(at);
    // No distance but dot is negative.
    const bool beyond = widened <= T(0) && distance != Distance::kDot;
    const T u = D::inverse(widened);
    const T slack = std::isfinite(u) ? kSlack * std::abs(u) : T(0);
    if (scale[i] < T(0)) {
      high[i] = u + slack;
    } else if (!beyond) {
      low[i] = u - slack;
    }
  }
};

// Everything that the forward and the backward share.
template <class T>
struct RowSums {
  const PairOperands<T> pairs;
  const RowParameters<T> parameters;
  const Term terms[2];
  TermRows<T> rows[2];

  RowSums(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
          const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
          const std::string& positive, const std::string& negative, const Tensor& scale,
          const Tensor& offset, const OptionalTensor& bound)
      : pairs(query, labels, ref, ref_labels, rule, parse_distance(distance)),
        parameters(scale, offset, bound, pairs.n),
        terms{computed(parse_term(positive), bound.has_value()),
              computed(parse_term(negative), bound.has_value())},
        rows{{parameters, 0, pairs.batch().distance, parse_term(positive)},
             {parameters, 1, pairs.batch().distance, parse_term(negative)}} {}

  // Weights of the rows' sums: 1, or [2, n].
  void weigh(const T* weights) {
    for (int64_t k = 0; k < 2; ++k) {
      rows[k].weight.assign(rows[k].scale.size(), T(1));
      if (weights != nullptr)
        std::copy(weights + k * pairs.n, weights + (k + 1) * pairs.n, rows[k].weight.begin());
    }
  }

  void run(const RowSumSide<T>& of_rows, const RowSumSide<T>& of_columns, bool slopes) const {
    const RowSum<T> op{
        {rows[0].view(terms[0]), rows[1].view(terms[1])}, parameters.uniform(), slopes};
    pairs.sweep(terms[1] == Term::kNone, [&](const Block& block, T* tile) {
      cpu_kernels<T>().row_sum(op, pairs.batch(), block, of_rows, of_columns, tile);
    });
  }

  // For a hinge the sums of slopes follow from those of values: slope is the number of active
  // pairs, and scale times moment is what offset leaves of the value. Where the offset is much
  // larger than the scale that difference has lost its digits.
  bool derived_slopes() const {
    for (int k = 0; k < 2; ++k) {
      if (terms[k] == Term::kNone) continue;
      if (terms[k] != Term::kHinge) return false;
      for (int64_t i = 0; i < pairs.n; ++i)
        if (!(std::abs(rows[k].offset[static_cast<size_t>(i)]) <=
              T(8) * std::abs(rows[k].scale[static_cast<size_t>(i)])) ||
            rows[k].scale[static_cast<size_t>(i)] == T(0))
          return false;
    }
    return true;
  }
};

// Sums per row in the course of the sweep.
struct Totals {
  std::vector<double> sum, slope, moment;
  std::vector<int64_t> active, kept;

  Totals(int64_t n, bool bounded)
      : sum(static_cast<size_t>(2 * n), 0.0),
        slope(sum),
        moment(sum),
        active(static_cast<size_t>(2 * n), 0),
        kept(bounded ? active : std::vector<int64_t>()) {}
};

template <class T>
void write_rows(const RowSums<T>& sums, const Totals& totals, bool derived, T* sum, int64_t* counts,
                T* slopes) {
  const int64_t n = sums.pairs.n;
  const std::vector<int64_t> all = sums.pairs.counts();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (int64_t k = 0; k < 2; ++k)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = k * n + i;
      const size_t t = static_cast<size_t>(at), row = static_cast<size_t>(i);
      const TermRows<T>& rows = sums.rows[k];
      double slope = totals.slope[t], moment = totals.moment[t];
      if (derived && totals.active[t] > 0) {
        slope = static_cast<double>(totals.active[t]);
        moment = (totals.sum[t] - static_cast<double>(rows.offset[row]) * slope) /
                 static_cast<double>(rows.scale[row]);
      }
      const bool poisoned = !sums.pairs.finite() && all[t] > 0;
      sum[at] = poisoned ? nan : static_cast<T>(totals.sum[t]);
      slopes[at] = poisoned ? nan : static_cast<T>(slope);
      slopes[2 * n + at] = poisoned ? nan : static_cast<T>(moment);
      counts[at] = totals.kept.empty() ? all[t] : totals.kept[t];
      counts[2 * n + at] = totals.active[t];
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_sum_cpu(
    const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& positive, const std::string& negative, const Tensor& scale,
    const Tensor& offset, const OptionalTensor& bound, bool with_grad, bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    RowSums<T> sums(query, labels, ref, ref_labels, rule, distance, positive, negative, scale,
                    offset, bound);
    const int64_t n = sums.pairs.n, m = sums.pairs.m, d = sums.pairs.d;
    const bool self = sums.pairs.self;
    const int64_t grad_n = with_grad ? n : 0, grad_m = with_grad && ref_grad && !self ? m : 0;
    Tensor sum = torch::stable::new_empty(query, {2, n}, scalar_type<T>());
    Tensor counts = torch::stable::new_empty(query, {4, n}, ScalarType::Long);
    Tensor slopes = torch::stable::new_empty(query, {4, n}, scalar_type<T>());
    Tensor grad_query = torch::stable::new_zeros(query, {2, grad_n, d}, scalar_type<T>());
    Tensor grad_ref = torch::stable::new_zeros(query, {2, grad_m, d}, scalar_type<T>());
    if (with_grad) sums.weigh(nullptr);
    const bool derived = sums.derived_slopes();
    Totals totals(n, sums.parameters.bounded());
    RowSumSide<T> of_rows{totals.sum.data(),
                          totals.slope.data(),
                          totals.moment.data(),
                          totals.active.data(),
                          totals.kept.empty() ? nullptr : totals.kept.data(),
                          n,
                          {nullptr, nullptr}};
    RowSumSide<T> of_columns{};
    for (int64_t k = 0; k < 2; ++k) {
      if (grad_n > 0) of_rows.grad[k] = mutable_data<T>(grad_query) + k * n * d;
      if (grad_m > 0) of_columns.grad[k] = mutable_data<T>(grad_ref) + k * m * d;
    }
    sums.run(of_rows, self ? of_rows : of_columns, !derived);
    write_rows(sums, totals, derived, mutable_data<T>(sum), mutable_data<int64_t>(counts),
               mutable_data<T>(slopes));
    poison_unless_finite(sums.pairs, grad_query, grad_ref);
    return std::make_tuple(sum, counts, slopes, grad_query, grad_ref);
  });
}

std::tuple<Tensor, Tensor> row_sum_backward_cpu(
    const Tensor& grad, const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& positive, const std::string& negative, const Tensor& scale,
    const Tensor& offset, const OptionalTensor& bound, bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    RowSums<T> sums(query, labels, ref, ref_labels, rule, distance, positive, negative, scale,
                    offset, bound);
    const int64_t n = sums.pairs.n, d = sums.pairs.d;
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == 2 && grad.size(1) == n, "grad: shape [2, ",
                    n, "] expected");
    const Tensor weights = rows_as<T>(grad);
    sums.weigh(data<T>(weights));
    const bool self = sums.pairs.self;
    const int64_t grad_m = ref_grad && !self ? sums.pairs.m : 0;
    Tensor grad_query = torch::stable::new_zeros(query, {n, d}, scalar_type<T>());
    Tensor grad_ref = torch::stable::new_zeros(query, {grad_m, d}, scalar_type<T>());
    RowSumSide<T> of_rows{}, of_columns{};
    of_rows.n = n;
    for (int k = 0; k < 2; ++k) {
      of_rows.grad[k] = mutable_data<T>(grad_query);
      if (grad_m > 0) of_columns.grad[k] = mutable_data<T>(grad_ref);
    }
    sums.run(of_rows, self ? of_rows : of_columns, false);
    poison_unless_finite(sums.pairs, grad_query, grad_ref);
    return std::make_tuple(like_input(grad_query, query), like_input(grad_ref, query));
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("row_sum", TORCH_BOX(&flashmetric::row_sum_cpu));
  m.impl("row_sum_backward", TORCH_BOX(&flashmetric::row_sum_backward_cpu));
}
