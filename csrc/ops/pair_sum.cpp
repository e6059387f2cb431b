// SPDX-License-Identifier: Apache-2.0
// pair_sum: per query row the sums, over its positives and over its negatives, of a pointwise
// function of the distance; and the gradient of any weighted total of those sums, in the same pass.
// Positives are listed by class and computed by exact differences, row by row (large classes: like
// negatives); negatives block by block in the order of schedule.h.
#include <batch.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric {
namespace {

Distance parse_product_distance(const std::string& name) {
  const Distance distance = parse_distance(name);
  STD_TORCH_CHECK(distance <= Distance::kDot, "distance: pair_sum has no '", name,
                  "', row_sum has it");
  return distance;
}

struct Margins {
  double positive, negative;
};

// One kind of pair (positives or negatives): its results and the weights of its objective.
template <class T>
struct Kind {
  std::vector<double> sum;      // empty when sums are not wanted
  std::vector<int64_t> active;  // likewise
  std::vector<T> weight;        // per query row, padded
  T* grad_query = nullptr;
  T* grad_ref = nullptr;

  PairSumRows<T> query_rows() {
    return {sum.empty() ? nullptr : sum.data(), active.empty() ? nullptr : active.data(),
            grad_query};
  }
};

template <class T>
class PairSums {
 public:
  PairSums(const Batch<T>& batch, Distance distance, Formula formula, Margins margins)
      : batch_(batch),
        distance_(distance),
        formula_(formula),
        margins_(margins),
        refs_by_class_(batch.ref_lists()) {}

  int64_t positives(int64_t i) const {
    const int32_t own = batch_.query.classes[i];
    return own < 0 ? 0 : refs_by_class_.count(own) - (batch_.self ? 1 : 0);
  }
  int64_t negatives(int64_t i) const { return batch_.m - positives(i) - (batch_.self ? 1 : 0); }

  void run(Kind<T>& positive, Kind<T>& negative) const {
    if (batch_.n == 0 || batch_.m == 0) return;
    if (batch_.large_classes(refs_by_class_)) {
      sweep_tiles(positive, true);
    } else {
      list_positives(positive);
    }
    sweep_tiles(negative, false);
  }

 private:
  void list_positives(Kind<T>& kind) const {
    constexpr int64_t kRowsPerTask = 16;
    const int64_t mean_class = batch_.m / std::max<int64_t>(batch_.classes, 1) + 1;
    const bool parallel = (batch_.n + batch_.m) * mean_class * batch_.d * 4 >= kParallelWork;
    for_each((batch_.n + kRowsPerTask - 1) / kRowsPerTask, parallel, [&](int64_t task) {
      std::vector<T> u;
      const int64_t end = std::min((task + 1) * kRowsPerTask, batch_.n);
      for (int64_t i = task * kRowsPerTask; i < end; ++i) positive_row(kind, i, u);
    });
    if (kind.grad_ref == nullptr) return;
    const RowLists queries_by_class = batch_.query_lists();
    for_each((batch_.m + kRowsPerTask - 1) / kRowsPerTask, parallel, [&](int64_t task) {
      std::vector<T> u;
      const int64_t end = std::min((task + 1) * kRowsPerTask, batch_.m);
      for (int64_t j = task * kRowsPerTask; j < end; ++j)
        positive_ref_row(kind, queries_by_class, j, u);
    });
  }

  void positive_row(Kind<T>& kind, int64_t i, std::vector<T>& u) const {
    const int32_t own = batch_.query.classes[i];
    if (own < 0) return;
    const int32_t* list = refs_by_class_.begin(own);
    const int64_t count = refs_by_class_.count(own);
    const T* x = batch_.query.rows + i * batch_.d;
    u.resize(static_cast<size_t>(count));
    cpu_kernels<T>().exact(distance_, x, batch_.query.norms[i], batch_.ref, list, count, u.data());
    double sum = 0;
    int64_t active = 0;
    evaluate(count, u, [&](int64_t t, T loss, T slope) -> T {
      if (batch_.self && list[t] == i) return T(0);
      sum += static_cast<double>(loss);
      active += loss > T(0);
      if (apart(batch_.query, i, batch_.ref, list[t])) return T(0);
      return slope * (batch_.self ? kind.weight[static_cast<size_t>(i)] +
                                        kind.weight[static_cast<size_t>(list[t])]
                                  : kind.weight[static_cast<size_t>(i)]);
    });
    if (!kind.sum.empty()) kind.sum[static_cast<size_t>(i)] = sum;
    if (!kind.active.empty()) kind.active[static_cast<size_t>(i)] = active;
    if (kind.grad_query != nullptr)
      cpu_kernels<T>().accumulate(distance_, x, batch_.ref, list, u.data(), count,
                                  kind.grad_query + i * batch_.d);
  }

  void positive_ref_row(Kind<T>& kind, const RowLists& queries_by_class, int64_t j,
                        std::vector<T>& u) const {
    const int32_t own = batch_.ref.classes[j];
    const int32_t* list = queries_by_class.begin(own);
    const int64_t count = queries_by_class.count(own);
    const T* x = batch_.ref.rows + j * batch_.d;
    u.resize(static_cast<size_t>(count));
    cpu_kernels<T>().exact(distance_, x, batch_.ref.norms[j], batch_.query, list, count, u.data());
    evaluate(count, u, [&](int64_t t, T, T slope) -> T {
      if (apart(batch_.ref, j, batch_.query, list[t])) return T(0);
      return slope * kind.weight[static_cast<size_t>(list[t])];
    });
    cpu_kernels<T>().accumulate(distance_, x, batch_.query, list, u.data(), count,
                                kind.grad_ref + j * batch_.d);
  }

  // A zero row is at a constant cosine distance from every row.
  bool apart(const Side<T>& a, int64_t i, const Side<T>& b, int64_t j) const {
    return distance_ == Distance::kCosine && (a.norms[i] == T(0) || b.norms[j] == T(0));
  }

  // Replaces each u by what `use` makes of that positive's loss and d(loss)/du.
  template <class F>
  void evaluate(int64_t count, std::vector<T>& u, const F& use) const {
    with_distance(distance_, [&](auto distance) {
      with_formula(formula_, [&](auto formula) {
        for (int64_t t = 0; t < count; ++t) {
          T& entry = u[static_cast<size_t>(t)];
          const T d = decltype(distance)::value(entry);
          const T z = d - static_cast<T>(margins_.positive);
          entry = use(t, decltype(formula)::value(z),
                      decltype(formula)::slope(z) * decltype(distance)::slope(d));
        }
      });
    });
  }

  void sweep_tiles(Kind<T>& kind, bool positives) const {
    const CpuKernels<T>& kernels = cpu_kernels<T>();
    const bool parallel = batch_.n * batch_.m * batch_.d >= kParallelWork;
    const PairSum<T> op{
        distance_,   formula_,
        positives,   static_cast<T>(positives ? margins_.positive : margins_.negative),
        batch_.self, kind.weight.data()};
    const PairSumRows<T> rows = kind.query_rows();
    const PairSumRows<T> columns =
        batch_.self ? rows : PairSumRows<T>{nullptr, nullptr, kind.grad_ref};
    const Blocks row_blocks(batch_.n, kernels.panel_width, batch_.block_rows());
    const Blocks col_blocks(batch_.m, kernels.panel_width, batch_.block_rows());
    const auto compute = [&](int64_t i, int64_t j) {
      // Kept for the life of the thread: a fresh one per block would be all page faults.
      thread_local Buffer<T> scratch(kMaxBlockRows * kMaxBlockRows);
      const Block block{row_blocks.begin(i), row_blocks.end(i), col_blocks.begin(j),
                        col_blocks.end(j), batch_.self && i == j};
      kernels.pair_sum(op, batch_.query, batch_.ref, block, rows, columns, scratch.data());
    };
    const Schedule schedule = batch_.self
                                  ? Schedule::symmetric(row_blocks.count())
                                  : Schedule::rectangular(row_blocks.count(), col_blocks.count());
    schedule.run(parallel, compute);
  }

  const Batch<T>& batch_;
  const Distance distance_;
  const Formula formula_;
  const Margins margins_;
  const RowLists refs_by_class_;
};

template <class T>
Kind<T> make_kind(const Batch<T>& batch, bool with_sums) {
  Kind<T> kind;
  if (with_sums) {
    kind.sum.assign(static_cast<size_t>(batch.n), 0.0);
    kind.active.assign(static_cast<size_t>(batch.n), 0);
  }
  kind.weight.assign(static_cast<size_t>(round_up(batch.n, cpu_kernels<T>().panel_width)), T(1));
  return kind;
}

// Compare-and-skip rules would drop pairs with NaN: no finite loss, and no finite gradient.
template <class T>
void poison_unless_finite(const Batch<T>& batch, Tensor& grad_query, Tensor& grad_ref) {
  if (batch.finite() || !batch.has_pairs()) return;
  torch::stable::fill_(grad_query, std::numeric_limits<double>::quiet_NaN());
  torch::stable::fill_(grad_ref, std::numeric_limits<double>::quiet_NaN());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_sum_cpu(
    const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& distance, const std::string& formula,
    double pos_margin, double neg_margin, bool with_grad, bool with_ref_grad) {
  check_batch(query, query_labels, ref, ref_labels);
  const Distance which = parse_product_distance(distance);
  const Formula loss = parse_formula(formula);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const Batch<T> batch(query, query_labels, ref, ref_labels, which);
    const int64_t n = batch.n, d = batch.d;
    const int64_t grad_n = with_grad ? n : 0,
                  grad_m = with_grad && with_ref_grad && !batch.self ? batch.m : 0;
    Tensor sums = torch::stable::new_zeros(query, {2, n}, scalar_type<T>());
    Tensor counts = torch::stable::new_zeros(query, {4, n}, ScalarType::Long);
    Tensor grad_query = torch::stable::new_zeros(query, {2, grad_n, d}, scalar_type<T>());
    Tensor grad_ref = torch::stable::new_zeros(query, {2, grad_m, d}, scalar_type<T>());
    const PairSums<T> pairs(batch, which, loss, {pos_margin, neg_margin});
    Kind<T> kinds[2] = {make_kind(batch, true), make_kind(batch, true)};
    for (int64_t k = 0; k < 2; ++k) {
      if (grad_n > 0) kinds[k].grad_query = mutable_data<T>(grad_query) + k * n * d;
      if (grad_m > 0) kinds[k].grad_ref = mutable_data<T>(grad_ref) + k * batch.m * d;
    }
    pairs.run(kinds[0], kinds[1]);
    int64_t* count = mutable_data<int64_t>(counts);
    for (int64_t i = 0; i < n; ++i) {
      count[i] = pairs.positives(i);
      count[n + i] = pairs.negatives(i);
      for (int64_t k = 0; k < 2; ++k) {
        const bool poisoned = !batch.finite() && count[k * n + i] > 0;
        mutable_data<T>(sums)[k * n + i] =
            poisoned ? std::numeric_limits<T>::quiet_NaN()
                     : static_cast<T>(kinds[k].sum[static_cast<size_t>(i)]);
        count[(2 + k) * n + i] = kinds[k].active[static_cast<size_t>(i)];
      }
    }
    poison_unless_finite(batch, grad_query, grad_ref);
    return std::make_tuple(sums, counts, grad_query, grad_ref);
  });
}

std::tuple<Tensor, Tensor> pair_sum_backward_cpu(
    const Tensor& grad_sums, const Tensor& query, const Tensor& query_labels,
    const OptionalTensor& ref, const OptionalTensor& ref_labels, const std::string& distance,
    const std::string& formula, double pos_margin, double neg_margin, bool with_ref_grad) {
  check_batch(query, query_labels, ref, ref_labels);
  const Distance which = parse_product_distance(distance);
  const Formula loss = parse_formula(formula);
  return with_accumulate_type(query, [&](auto type) {
    using T = decltype(type);
    const Batch<T> batch(query, query_labels, ref, ref_labels, which);
    STD_TORCH_CHECK(grad_sums.dim() == 2 && grad_sums.size(0) == 2 && grad_sums.size(1) == batch.n,
                    "grad_sums: shape [2, ", batch.n, "] expected");
    const Tensor weights = rows_as<T>(grad_sums);
    const auto zeros = [&](int64_t rows) {
      return torch::stable::new_zeros(query, {rows, batch.d}, scalar_type<T>());
    };
    Tensor grad_query = zeros(batch.n),
           grad_ref = zeros(with_ref_grad && !batch.self ? batch.m : 0);
    Kind<T> kinds[2] = {make_kind(batch, false), make_kind(batch, false)};
    for (int64_t k = 0; k < 2; ++k) {
      const T* row = data<T>(weights) + k * batch.n;
      std::copy(row, row + batch.n, kinds[k].weight.begin());
      kinds[k].grad_query = mutable_data<T>(grad_query);
      if (with_ref_grad && !batch.self) kinds[k].grad_ref = mutable_data<T>(grad_ref);
    }
    PairSums<T>(batch, which, loss, {pos_margin, neg_margin}).run(kinds[0], kinds[1]);
    poison_unless_finite(batch, grad_query, grad_ref);
    return std::make_tuple(like_input(grad_query, query), like_input(grad_ref, query));
  });
}

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CPU, m) {
  m.impl("pair_sum", TORCH_BOX(&flashmetric::pair_sum_cpu));
  m.impl("pair_sum_backward", TORCH_BOX(&flashmetric::pair_sum_backward_cpu));
}
