// SPDX-License-Identifier: Apache-2.0
// row_lse: per query row the log-sum-exps of the logits of its positives and of its negatives, the
// means of their distances under the softmax, and the same per reference. row_lse_backward: the
// gradient of weighted log-sum-exps.
#include <row_parameters.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

Logit parse_logit(const std::string& name) {
  if (name == "none") return Logit::kNone;
  if (name == "affine") return Logit::kAffine;
  if (name == "circle") return Logit::kCircle;
  STD_TORCH_CHECK(false, "logit: 'none', 'affine' or 'circle' expected, got '", name, "'");
}

struct Range {
  double low, high;
};

// Bounds of all distances of a batch, from the norms alone; infinite where there are none.
template <class T>
Range distance_range(const PairBatch<T>& batch) {
  const auto longest = [](const Side<T>& side) {
    T norm = T(0);
    for (int64_t i = 0; i < side.n; ++i) norm = max(norm, side.norms[i]);
    return std::sqrt(static_cast<double>(norm));
  };
  const double x = longest(batch.query), r = batch.self ? x : longest(batch.ref);
  // Norms are rounded, and so are distances.
  constexpr double kRounding = 1 + 1e-3;
  double u = (x + r) * (x + r) * kRounding;
  // A zero row is at u = 2 from rows of unit length, whatever the norms say.
  if (has_unit_rows(batch.distance)) u = std::max(u, 2.0);
  switch (batch.distance) {
    case Distance::kDot:
      return {-x * r * kRounding, x * r * kRounding};
    case Distance::kCityblock:
      return {0, std::sqrt(u * static_cast<double>(batch.query.d))};
    case Distance::kChi2:
      return {0, infinity<double>()};
    default:
      return {0, with_distance(batch.distance, [=](auto d) { return decltype(d)::value(u); })};
  }
}

// Bounds of the logits of distances in a range.
Range logit_range(Logit form, double scale, double offset, double shape, const Range& d) {
  const double a = scale * d.low + offset, b = scale * d.high + offset;
  const Range z{std::min(a, b), std::max(a, b)};
  if (form != Logit::kCircle) return z;
  // (z + shape)+ (z - shape) has its ends at the ends of the range or at z = 0, where both factors'
  // product is lowest (shape > 0); where the first factor ends it is 0.
  const auto logit = [=](double at) { return std::max(at + shape, 0.0) * (at - shape); };
  Range out{std::min(logit(z.low), logit(z.high)), std::max(logit(z.low), logit(z.high))};
  for (const double at : {0.0, -shape}) {
    if (at <= z.low || at >= z.high) continue;
    out = {std::min(out.low, logit(at)), std::max(out.high, logit(at))};
  }
  return out;
}

// The logits of every row for one kind.
template <class T>
struct LogitRows {
  std::vector<T> scale, offset, bound;

  LogitRows(const RowParameters<T>& parameters, int kind)
      : scale(parameters.scale(kind)),
        offset(parameters.offset(kind)),
        bound(parameters.bound(kind)) {}

  // Running maxima pass over NaN.
  bool nan(int64_t i) const {
    return std::isnan(scale[static_cast<size_t>(i)] + offset[static_cast<size_t>(i)]);
  }
};

template <class T>
struct RowLses {
  const PairOperands<T> pairs;
  const RowParameters<T> parameters;
  const Logit forms[2];
  const double shape;
  const LogitRows<T> rows[2];

  RowLses(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
          const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
          const std::string& positive, const std::string& negative, const Tensor& scale,
          const Tensor& offset, const OptionalTensor& bound, double shape_)
      : pairs(query, labels, ref, ref_labels, rule, parse_distance(distance)),
        parameters(scale, offset, bound, pairs.n),
        forms{parse_logit(positive), parse_logit(negative)},
        shape(shape_),
        rows{{parameters, 0}, {parameters, 1}} {}

  bool positives_only() const { return forms[1] == Logit::kNone; }
  RowLse<T> op() const { return {{view(0), view(1)}, static_cast<T>(shape), parameters.uniform()}; }

 private:
  RowLogit<T> view(int k) const {
    return {forms[k], rows[k].scale.data(), rows[k].offset.data(), pointer(rows[k].bound), top(k)};
  }

  // The top of all logits, if e^(l - top) of none of them vanishes.
  T top(int k) const {
    constexpr double kSpread = sizeof(T) == 4 ? 60 : 600;
    if (!parameters.uniform() || pairs.n == 0) return infinity<T>();
    const Range range =
        logit_range(forms[k], static_cast<double>(rows[k].scale[0]),
                    static_cast<double>(rows[k].offset[0]), shape, distance_range(pairs.batch()));
    return range.high - range.low < kSpread ? static_cast<T>(range.high) : infinity<T>();
  }
};

// Log-sum-exps of one side in the course of the sweep.
struct LseRows {
  int64_t n;
  std::vector<double> top, sum, moment;
  std::vector<int64_t> kept;

  LseRows(int64_t rows, bool bounded)
      : n(rows),
        top(static_cast<size_t>(2 * rows), -infinity<double>()),
        sum(static_cast<size_t>(2 * rows), 0.0),
        moment(sum),
        kept(bounded ? static_cast<size_t>(2 * rows) : 0, 0) {}

  LseSide side() {
    return {top.data(), sum.data(), moment.data(), kept.empty() ? nullptr : kept.data(), n};
  }
};

struct LseResult {
  Tensor lse, mean, counts;
};

template <class T>
LseResult write_side(const RowLses<T>& lses, const LseRows& rows, bool of_refs,
                     const Tensor& like) {
  const int64_t n = rows.n;
  LseResult out{torch::stable::new_empty(like, {2, n}, scalar_type<T>()),
                torch::stable::new_empty(like, {2, n}, scalar_type<T>()),
                torch::stable::new_empty(like, {2, n}, ScalarType::Long)};
  if (n == 0) return out;
  const std::vector<int64_t> all = lses.pairs.counts(of_refs);
  T* lse = mutable_data<T>(out.lse);
  T* mean = mutable_data<T>(out.mean);
  int64_t* counts = mutable_data<int64_t>(out.counts);
  for (int64_t at = 0; at < 2 * n; ++at) {
    const size_t t = static_cast<size_t>(at);
    const int k = at < n ? 0 : 1;
    const bool wanted = lses.forms[k] != Logit::kNone;
    counts[at] = !wanted ? 0 : rows.kept.empty() ? all[t] : rows.kept[t];
    lse[at] = -infinity<T>();
    mean[at] = T(0);
    // Statistics of references are there only where all rows have the same logits.
    if (wanted && all[t] > 0 &&
        (!lses.pairs.finite() || lses.rows[k].nan(of_refs ? 0 : at - k * n))) {
      lse[at] = mean[at] = std::numeric_limits<T>::quiet_NaN();
    } else if (wanted && counts[at] > 0) {
      lse[at] = static_cast<T>(rows.top[t] + std::log(rows.sum[t]));
      mean[at] = rows.sum[t] == 0 ? T(0) : static_cast<T>(rows.moment[t] / rows.sum[t]);
    }
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_lse_cpu(
    const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& positive, const std::string& negative, const Tensor& scale,
    const Tensor& offset, const OptionalTensor& bound, double shape, bool columns) {
  check_pairs(query, labels, ref, ref_labels, rule);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const RowLses<T> lses(query, labels, ref, ref_labels, rule, distance, positive, negative, scale,
                          offset, bound, shape);
    const bool self = lses.pairs.self;
    STD_TORCH_CHECK(!columns || (!self && lses.parameters.uniform()),
                    "columns: ref, and scale and offset of all rows without bound, expected");
    LseRows by_row(lses.pairs.n, lses.parameters.bounded());
    LseRows by_ref(columns ? lses.pairs.m : 0, false);
    const LseSide of_rows = by_row.side(), of_refs = by_ref.side();
    const LseSide* of_columns = self ? &of_rows : columns ? &of_refs : nullptr;
    const RowLse<T> op = lses.op();
    lses.pairs.sweep(lses.positives_only(), [&](const Block& block, T* tile) {
      cpu_kernels<T>().row_lse(op, lses.pairs.batch(), block, of_rows, of_columns, tile);
    });
    const LseResult rows = write_side(lses, by_row, false, query);
    const LseResult refs = write_side(lses, by_ref, true, query);
    return std::make_tuple(rows.lse, rows.mean, rows.counts, refs.lse, refs.mean, refs.counts);
  });
}

// Log-sum-exps and their weights, padded; where there is no pair, +inf and 0.
template <class T>
struct LseWeights {
  std::vector<T> lse, weight;
  int64_t padded;

  LseWeights(const Tensor& lses, const Tensor& grad, int64_t n)
      : padded(round_up(n, cpu_kernels<T>().panel_width)) {
    STD_TORCH_CHECK(lses.dim() == 2 && lses.size(0) == 2 && lses.size(1) == n, "lse: shape [2, ", n,
                    "] expected");
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == 2 && grad.size(1) == n,
                    "grad of lse: shape [2, ", n, "] expected");
    lse.assign(static_cast<size_t>(2 * padded), infinity<T>());
    weight.assign(static_cast<size_t>(2 * padded), T(0));
    const Tensor from = rows_as<T>(lses), by = rows_as<T>(grad);
    for (int64_t k = 0; k < 2; ++k)
      for (int64_t i = 0; i < n; ++i) {
        const T value = data<T>(from)[k * n + i];
        if (value == -infinity<T>()) continue;
        lse[static_cast<size_t>(k * padded + i)] = value;
        weight[static_cast<size_t>(k * padded + i)] = data<T>(by)[k * n + i];
      }
  }
  LseGradSide<T> side(T* grad) const { return {lse.data(), weight.data(), padded, grad}; }
};

std::tuple<Tensor, Tensor> row_lse_backward_cpu(
    const Tensor& grad, const Tensor& lse, const OptionalTensor& ref_grad_lse,
    const OptionalTensor& ref_lse, const Tensor& query, const Tensor& labels,
    const OptionalTensor& ref, const OptionalTensor& ref_labels, const std::string& rule,
    const std::string& distance, const std::string& positive, const std::string& negative,
    const Tensor& scale, const Tensor& offset, const OptionalTensor& bound, double shape,
    bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const RowLses<T> lses(query, labels, ref, ref_labels, rule, distance, positive, negative, scale,
                          offset, bound, shape);
    const PairOperands<T>& pairs = lses.pairs;
    const bool self = pairs.self, by_columns = ref_lse.has_value() && ref_grad_lse.has_value();
    STD_TORCH_CHECK(!by_columns || (!self && lses.parameters.uniform()),
                    "ref_lse: ref, and scale and offset of all rows without bound, expected");
    const int64_t grad_m = ref_grad && !self ? pairs.m : 0;
    Tensor grad_query = torch::stable::new_zeros(query, {pairs.n, pairs.d}, scalar_type<T>());
    Tensor grad_ref = torch::stable::new_zeros(query, {grad_m, pairs.d}, scalar_type<T>());
    const LseWeights<T> by_row(lse, grad, pairs.n);
    std::optional<LseWeights<T>> by_ref;
    if (by_columns) by_ref.emplace(*ref_lse, *ref_grad_lse, pairs.m);
    T* of_refs = grad_m > 0 ? mutable_data<T>(grad_ref) : nullptr;
    const LseGradSide<T> rows = by_row.side(mutable_data<T>(grad_query));
    const LseGradSide<T> columns = self         ? rows
                                   : by_columns ? by_ref->side(of_refs)
                                                : LseGradSide<T>{nullptr, nullptr, 0, of_refs};
    const RowLse<T> op = lses.op();
    pairs.sweep(lses.positives_only(), [&](const Block& block, T* tile) {
      cpu_kernels<T>().row_lse_backward(op, pairs.batch(), block, rows, columns, tile);
    });
    poison_unless_finite(pairs, grad_query, grad_ref);
    return std::make_tuple(like_input(grad_query, query), like_input(grad_ref, query));
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("row_lse", TORCH_BOX(&flashmetric::row_lse_cpu));
  m.impl("row_lse_backward", TORCH_BOX(&flashmetric::row_lse_backward_cpu));
}
