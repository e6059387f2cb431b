// SPDX-License-Identifier: Apache-2.0
#include <row_args.h>

namespace flashmetric::cuda {
namespace {

template <class T>
RowParameter<T> parameter_of(const Tensor& rows, int64_t n, const char* name) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == 2 && (rows.size(1) == 1 || rows.size(1) == n),
                  name, ": shape [2, 1] or [2, ", n, "] expected");
  return {data<T>(rows), rows.size(1), rows.size(1) == 1 ? 0 : 1, {T(0), T(0)}};
}

PairProblem swapped(PairProblem problem) {
  std::swap(problem.query, problem.ref);
  std::swap(problem.x, problem.r);
  return problem;
}

}  // namespace

Labelling labelling_of(const std::string& rule, const Tensor& labels) {
  const LabelRule parsed = parse_rule(rule);
  const int64_t words = labels.dim() == 1 ? 1 : labels.size(1);
  return {parsed.rule, static_cast<int32_t>(words), {parsed.positive, parsed.negative}};
}

template <class T>
RowTerms<T> RowTerms<T>::of(const PairForm<double>& form, const Tensor& scale, const Tensor& offset,
                            const OptionalTensor& bound, const Tensor& query) {
  const int64_t n = query.size(0);
  const PairForm<T> of_type{
      {form.term[0], form.term[1]}, {form.circle[0], form.circle[1]}, static_cast<T>(form.shape)};
  RowTerms terms{of_type, {}, {}, rows_as<T>(scale), rows_as<T>(offset), {}};
  check_device(scale, query, "scale");
  check_device(offset, query, "offset");
  terms.scale = parameter_of<T>(terms.scale_rows, n, "scale");
  terms.offset = parameter_of<T>(terms.offset_rows, n, "offset");
  if (!bound.has_value()) return terms;
  check_device(*bound, query, "bound");
  STD_TORCH_CHECK(bound->dim() == 2 && bound->size(0) == 2 && bound->size(1) == n,
                  "bound: shape [2, ", n, "] expected");
  terms.bound = rows_as<T>(*bound);
  return terms;
}

template <class T>
PairRole<T> RowTerms<T>::role(int64_t rows, const T* weight, const T* lse) const {
  return {true, rows, scale, offset, bound.has_value() ? data<T>(*bound) : nullptr, weight, lse};
}

template struct RowTerms<float>;
template struct RowTerms<double>;

RowPasses::RowPasses(const Tensor& query, const Tensor& labels, const OptionalTensor& ref,
                     const OptionalTensor& ref_labels, const Labelling& labelling,
                     Distance distance, const RowTerms<float>& terms, int planes)
    : planes_(planes),
      limits_(device_limits(query)),
      batch_(query, labels, ref, ref_labels, labelling, distance, planes, false),
      terms_(terms) {}

TilePlan RowPasses::plan(int64_t rows, bool with_grad) const {
  return plan_row_sum(planes_, rows, batch_.problem.d, with_grad, limits_);
}

// Both roles off, with parameters where they do not depend on the row.
RowSumArgs RowPasses::row_args(bool of_refs, bool logits) const {
  RowSumArgs args{};
  args.problem = of_refs ? swapped(batch_.problem) : batch_.problem;
  args.form = terms_.form;
  args.symmetric = terms_.symmetric();
  args.logits = logits;
  args.bad = batch_.bad;
  args.bad_count = batch_.bad_count;
  if (args.symmetric) {
    args.own = terms_.role(args.problem.query.n, nullptr, nullptr);
    args.other = terms_.role(args.problem.ref.n, nullptr, nullptr);
  }
  args.own.on = args.other.on = false;
  return args;
}

void RowPasses::launch_sum(RowSumArgs& args) const {
  const TilePlan tiles = plan(args.problem.query.n, args.grad != nullptr);
  args.resident = tiles.resident;
  check_launch(row_sum(args, tiles, planes_, batch_.stream), "row_sum");
}

void RowPasses::launch_grad(RowSumArgs& args) const {
  const TilePlan tiles = plan(args.problem.query.n, true);
  args.resident = tiles.resident;
  check_launch(row_grad(args, tiles, planes_, batch_.stream), "row_grad");
}

void RowPasses::sums(float* sums, int64_t* counts, float* slopes, float* grad) const {
  RowSumArgs args = row_args(false, false);
  if (args.problem.query.n == 0) return;
  args.own = terms_.role(args.problem.query.n, nullptr, nullptr);
  args.other = args.own;
  args.other.on = grad != nullptr && self();
  args.sums = sums;
  args.counts = counts;
  args.slopes = slopes;
  args.grad = grad;
  launch_sum(args);
}

void RowPasses::ref_totals(float* grad) const {
  RowSumArgs args = row_args(true, false);
  if (args.problem.query.n == 0) return;
  args.other = terms_.role(args.problem.ref.n, nullptr, nullptr);
  args.grad = grad;
  launch_grad(args);
}

void RowPasses::gradient(const Objective& of_query, const Objective& of_ref, bool logits,
                         void* grad) const {
  RowSumArgs args = row_args(false, logits);
  if (args.problem.query.n == 0) return;
  args.own = terms_.role(args.problem.query.n, of_query.weight, of_query.lse);
  if (self()) {
    args.other = args.own;
  } else if (of_ref.weight != nullptr) {
    args.other = terms_.role(args.problem.ref.n, of_ref.weight, of_ref.lse);
  }
  args.grad_sum = grad;
  launch_grad(args);
}

void RowPasses::ref_gradient(const Objective& of_query, const Objective& of_ref, bool logits,
                             void* grad) const {
  RowSumArgs args = row_args(true, logits);
  if (args.problem.query.n == 0) return;
  if (of_ref.weight != nullptr)
    args.own = terms_.role(args.problem.query.n, of_ref.weight, of_ref.lse);
  args.other = terms_.role(args.problem.ref.n, of_query.weight, of_query.lse);
  args.grad_sum = grad;
  launch_grad(args);
}

void RowPasses::launch_lse(bool of_refs, float* lse, float* mean, int64_t* counts) const {
  RowLseArgs args{};
  args.problem = of_refs ? swapped(batch_.problem) : batch_.problem;
  if (args.problem.query.n == 0) return;
  args.form = terms_.form;
  args.own = terms_.role(args.problem.query.n, nullptr, nullptr);
  args.bad = batch_.bad;
  args.bad_count = batch_.bad_count;
  args.lse = lse;
  args.mean = mean;
  args.counts = counts;
  const TilePlan tiles = plan(args.problem.query.n, false);
  args.resident = tiles.resident;
  check_launch(row_lse(args, tiles, planes_, batch_.stream), "row_lse");
}

void RowPasses::lse(float* lse, float* mean, int64_t* counts) const {
  launch_lse(false, lse, mean, counts);
}

void RowPasses::ref_lse(float* lse, float* mean, int64_t* counts) const {
  launch_lse(true, lse, mean, counts);
}

bool tiles_serve_rows(const Tensor& query, Distance distance, int planes) {
  return !is_direct(distance) &&
         use_tiles(
             query,
             plan_row_sum(planes, query.size(0), query.size(1), true, device_limits(query)).fits);
}

}  // namespace flashmetric::cuda
