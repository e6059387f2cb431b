// SPDX-License-Identifier: Apache-2.0
// threshold_sum: per query row and threshold t the sum over pairs of f(t - distance), and how many
// distances are below t; and the gradient of any weighted total of those sums, by recompute. For a
// threshold that is NaN, sum and slope of a row with pairs are NaN, and if such a sum has a weight
// other than 0 all gradients are.
#include <row_sweep.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

Term parse_threshold_formula(const std::string& name) {
  const bool known =
      name == "hinge" || name == "squared_hinge" || name == "softplus" || name == "squared_sigmoid";
  STD_TORCH_CHECK(known,
                  "formula: 'hinge', 'squared_hinge', 'softplus' or 'squared_sigmoid' expected, "
                  "got '",
                  name, "'");
  return parse_term(name);
}

// Thresholds as float64, [n or 1, count]. In place of a NaN there is the threshold before it, which
// keeps the others in order: what is found for it is thrown away.
class Thresholds {
 public:
  Thresholds(const Tensor& thresholds, int64_t n)
      : tensor_(rows_as<double>(thresholds)), shared_(thresholds.size(0) == 1 && n != 1) {
    const double* given = data<double>(tensor_);
    const double* end = given + rows() * count();
    if (std::none_of(given, end, [](double t) { return std::isnan(t); })) return;
    ordered_.assign(given, end);
    for (int64_t i = 0; i < rows(); ++i) {
      double last = -infinity<double>();
      for (int64_t k = 0; k < count(); ++k) {
        double& t = ordered_[static_cast<size_t>(i * count() + k)];
        if (std::isnan(t)) t = last;
        last = t;
      }
    }
  }

  int64_t rows() const { return tensor_.size(0); }
  int64_t count() const { return tensor_.size(1); }
  bool shared() const { return shared_; }
  const double* row(int64_t i) const {
    return (ordered_.empty() ? data<double>(tensor_) : ordered_.data()) + offset(i);
  }

  bool any_nan() const { return !ordered_.empty(); }
  bool is_nan(int64_t i, int64_t k) const {
    return any_nan() && std::isnan(data<double>(tensor_)[offset(i) + k]);
  }

  // Padding comes first.
  int64_t first_finite(int64_t i) const {
    int64_t k = 0;
    while (k < count() && row(i)[k] == -infinity<double>()) ++k;
    return k;
  }

 private:
  int64_t offset(int64_t i) const { return shared_ ? 0 : i * count(); }

  Tensor tensor_;
  bool shared_;
  std::vector<double> ordered_;  // empty: the tensor's own
};

void check_thresholds(const Tensor& thresholds, int64_t n) {
  STD_TORCH_CHECK(thresholds.dim() == 2 && (thresholds.size(0) == n || thresholds.size(0) == 1),
                  "thresholds: shape [", n, ", K] or [1, K] expected");
}

// The smallest finite number of T from t on: the distances below it are those below t.
template <class T>
T round_up_to(double t) {
  if (t == -infinity<double>()) return -infinity<T>();
  T rounded = static_cast<T>(t);
  if (static_cast<double>(rounded) < t) rounded = std::nextafter(rounded, infinity<T>());
  return std::min(rounded, std::numeric_limits<T>::max());
}

template <class T>
class Sums {
 public:
  Sums(const PairOperands<T>& pairs, bool positives, Term term, const Thresholds& thresholds,
       Tensor& sums, Tensor& counts, Tensor& slopes)
      : pairs_(pairs),
        thresholds_(thresholds),
        length_(padded_length(thresholds.count())),
        table_(thresholds.rows() * length_, infinity<T>()),
        first_(static_cast<size_t>(thresholds.rows())),
        base_sum_(static_cast<size_t>(pairs.n), 0.0),
        base_below_(static_cast<size_t>(pairs.n), 0) {
    for (int64_t i = 0; i < thresholds.rows(); ++i) {
      first_[static_cast<size_t>(i)] = static_cast<int32_t>(thresholds.first_finite(i));
      for (int64_t k = 0; k < count(); ++k)
        table_[i * length_ + k] = round_up_to<T>(thresholds.row(i)[k]);
    }
    const bool binned = term == Term::kHinge && count() > cpu_kernels<T>().few_thresholds;
    op_ = {term,
           positives,
           binned,
           {table_.data(), thresholds.shared() ? 0 : length_, count(), length_},
           first_.data(),
           mutable_data<double>(sums),
           mutable_data<double>(slopes),
           mutable_data<int64_t>(counts),
           base_sum_.data(),
           base_below_.data()};
  }

  void run() {
    for_row_ranges(pairs_, kRowsPerSweep, [&](int64_t begin, int64_t end) {
      sweep_references(pairs_, begin, end, [&](const Block& block, T* tile) {
        cpu_kernels<T>().threshold_sum(pairs_.batch(), block, op_, tile);
      });
      for (int64_t i = begin; i < end && op_.term == Term::kHinge; ++i) finish_hinge(i);
    });
    if (!pairs_.finite() || thresholds_.any_nan()) poison();
  }

 private:
  int64_t count() const { return thresholds_.count(); }

  // From bins, and from what is below all thresholds, to the sums of each.
  void finish_hinge(int64_t i) const {
    const double* t = thresholds_.row(i);
    const int64_t first = first_[thresholds_.shared() ? 0 : static_cast<size_t>(i)];
    if (first == count()) return;
    const double lowest =
        static_cast<double>(op_.thresholds.row(i)[first]);  // what the kernel subtracted from
    double* sum = op_.sum + i * count();
    int64_t* below = op_.below + i * count();
    double distances = 0;
    int64_t seen = 0;
    for (int64_t k = first; k < count(); ++k) {
      if (op_.binned) {
        distances += sum[k];
        seen += below[k];
        below[k] = seen;
        sum[k] = seen == 0 ? 0.0 : static_cast<double>(seen) * t[k] - distances;
      }
      const int64_t base = base_below_[static_cast<size_t>(i)];
      if (base != 0) {
        below[k] += base;
        sum[k] += base_sum_[static_cast<size_t>(i)] + static_cast<double>(base) * (t[k] - lowest);
      }
      op_.slope[i * count() + k] = static_cast<double>(below[k]);
    }
  }

  // Compare-and-skip rules would drop pairs with NaN: all sums of a row that has pairs are NaN, or
  // those for thresholds that are.
  void poison() const {
    const std::vector<int64_t> pairs = pairs_.counts();
    for (int64_t i = 0; i < pairs_.n; ++i) {
      if (pairs[static_cast<size_t>(op_.positives ? i : pairs_.n + i)] == 0) continue;
      const int64_t first = thresholds_.first_finite(i);
      for (int64_t k = 0; k < count(); ++k) {
        const bool nan = thresholds_.is_nan(i, k);
        if (nan) op_.below[i * count() + k] = 0;
        if (nan || (!pairs_.finite() && k >= first))
          op_.sum[i * count() + k] = op_.slope[i * count() + k] =
              std::numeric_limits<double>::quiet_NaN();
      }
    }
  }

  const PairOperands<T>& pairs_;
  const Thresholds& thresholds_;
  const int32_t length_;
  Buffer<T> table_;
  std::vector<int32_t> first_;
  std::vector<double> base_sum_;
  std::vector<int64_t> base_below_;
  ThresholdSum<T> op_;
};

std::tuple<Tensor, Tensor, Tensor> threshold_sum_cpu(
    const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& kind, const std::string& formula, const Tensor& thresholds) {
  check_pairs(query, labels, ref, ref_labels, rule);
  check_thresholds(thresholds, query.size(0));
  const bool positives = parse_kind(kind);
  const Term term = parse_threshold_formula(formula);
  const auto zeros = [&](ScalarType dtype) {
    return torch::stable::new_zeros(query, {query.size(0), thresholds.size(1)}, dtype);
  };
  Tensor sums = zeros(ScalarType::Double), counts = zeros(ScalarType::Long),
         slopes = zeros(ScalarType::Double);
  with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const PairOperands<T> pairs(query, labels, ref, ref_labels, rule, parse_distance(distance));
    if (pairs.n == 0 || pairs.m == 0 || thresholds.size(1) == 0) return;
    const Thresholds limits(thresholds, pairs.n);
    Sums<T>(pairs, positives, term, limits, sums, counts, slopes).run();
  });
  return {sums, counts, slopes};
}

// Per row, in the accumulate type and padded to whole panels of rows, what the kernel looks up.
template <class T>
class GradTables {
 public:
  GradTables(const Thresholds& thresholds, const Tensor& grad, Term term, int64_t n)
      : length_(padded_length(thresholds.count())),
        padded_(round_up(n, cpu_kernels<T>().panel_width)),
        table_(padded_ * length_, infinity<T>()),
        weight_(padded_ * length_, T(0)),
        lowest_(padded_, -infinity<T>()),
        highest_(padded_, -infinity<T>()),
        total_(padded_, T(0)) {
    const int64_t count = thresholds.count();
    const double* weights = data<double>(grad);
    for_each((n + kRowsPerTask - 1) / kRowsPerTask, n * count >= kParallelWork / 64,
             [&](int64_t task) {
               const int64_t end = std::min((task + 1) * kRowsPerTask, n);
               for (int64_t i = task * kRowsPerTask; i < end; ++i)
                 fill(thresholds, i, weights + i * count, term == Term::kHinge);
             });
  }

  ThresholdGrad<T> op(Term term, bool positives, bool symmetric, int64_t count, T* grad_query,
                      T* grad_ref) const {
    return {
        term,           positives,      symmetric,       {table_.data(), length_, count, length_},
        weight_.data(), lowest_.data(), highest_.data(), total_.data(),
        grad_query,     grad_ref};
  }

 private:
  static constexpr int64_t kRowsPerTask = 64;

  void fill(const Thresholds& thresholds, int64_t i, const double* weights, bool from_the_end) {
    const int64_t count = thresholds.count(), first = thresholds.first_finite(i);
    T* table = table_.data() + i * length_;
    T* weight = weight_.data() + i * length_;
    double sum = 0;
    for (int64_t k = count - 1; k >= 0; --k) {
      table[k] = round_up_to<T>(thresholds.row(i)[k]);
      // Padding is below every distance.
      const double own = k < first || thresholds.is_nan(i, k) ? 0.0 : weights[k];
      sum += own;
      weight[k] = k < first ? T(0) : static_cast<T>(from_the_end ? sum : own);
    }
    if (first == count) return;
    lowest_[i] = table[first];
    highest_[i] = table[count - 1];
    total_[i] = static_cast<T>(sum);
  }

  const int32_t length_;
  const int64_t padded_;
  Buffer<T> table_, weight_, lowest_, highest_, total_;
};

// Whether a sum that is NaN for its threshold has a weight.
bool weighs_nan(const Thresholds& thresholds, const Tensor& grad, int64_t n) {
  if (!thresholds.any_nan()) return false;
  const double* weights = data<double>(grad);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < thresholds.count(); ++k)
      if (thresholds.is_nan(i, k) && weights[i * thresholds.count() + k] != 0.0) return true;
  return false;
}

std::tuple<Tensor, Tensor> threshold_sum_backward_cpu(
    const Tensor& grad, const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& rule, const std::string& distance,
    const std::string& kind, const std::string& formula, const Tensor& thresholds, bool ref_grad) {
  check_pairs(query, labels, ref, ref_labels, rule);
  check_thresholds(thresholds, query.size(0));
  const bool positives = parse_kind(kind);
  const Term term = parse_threshold_formula(formula);
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == query.size(0) && grad.size(1) == thresholds.size(1) &&
          grad.scalar_type() == ScalarType::Double,
      "grad: float64 of shape [", query.size(0), ", ", thresholds.size(1), "] expected");
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const PairOperands<T> pairs(query, labels, ref, ref_labels, rule, parse_distance(distance));
    const auto zeros = [&](int64_t rows) {
      return torch::stable::new_zeros(query, {rows, pairs.d}, scalar_type<T>());
    };
    Tensor grad_query = zeros(pairs.n), grad_ref = zeros(ref_grad && !pairs.self ? pairs.m : 0);
    bool spoiled = !pairs.finite();
    if (pairs.n > 0 && pairs.m > 0 && thresholds.size(1) > 0) {
      const Thresholds limits(thresholds, pairs.n);
      const Tensor weights = as_contiguous(grad);
      spoiled = spoiled || weighs_nan(limits, weights, pairs.n);
      const GradTables<T> tables(limits, weights, term, pairs.n);
      T* of_query = mutable_data<T>(grad_query);
      T* of_ref = pairs.self ? of_query : ref_grad ? mutable_data<T>(grad_ref) : nullptr;
      const ThresholdGrad<T> op =
          tables.op(term, positives, pairs.self, limits.count(), of_query, of_ref);
      pairs.sweep(positives, [&](const Block& block, T* tile) {
        cpu_kernels<T>().threshold_grad(pairs.batch(), block, op, tile);
      });
    }
    if (spoiled && pairs.has_pairs()) {
      torch::stable::fill_(grad_query, std::numeric_limits<double>::quiet_NaN());
      torch::stable::fill_(grad_ref, std::numeric_limits<double>::quiet_NaN());
    }
    return std::make_tuple(like_input(grad_query, query), like_input(grad_ref, query));
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("threshold_sum", TORCH_BOX(&flashmetric::threshold_sum_cpu));
  m.impl("threshold_sum_backward", TORCH_BOX(&flashmetric::threshold_sum_backward_cpu));
}
