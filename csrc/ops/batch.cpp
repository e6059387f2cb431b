// SPDX-License-Identifier: Apache-2.0
#include <batch.h>

namespace flashmetric {

Distance parse_distance(const std::string& name) {
  if (name == "euclidean") return Distance::kEuclidean;
  if (name == "sqeuclidean") return Distance::kSqeuclidean;
  if (name == "cosine") return Distance::kCosine;
  if (name == "dot") return Distance::kDot;
  if (name == "angular") return Distance::kAngular;
  if (name == "sqrt_cosine") return Distance::kSqrtCosine;
  if (name == "rbf") return Distance::kRbf;
  if (name == "cityblock") return Distance::kCityblock;
  if (name == "chi2") return Distance::kChi2;
  STD_TORCH_CHECK(false,
                  "distance: 'euclidean', 'sqeuclidean', 'cosine', 'dot', 'angular', "
                  "'sqrt_cosine', 'rbf', 'cityblock' or 'chi2' expected, got '",
                  name, "'");
}

Term parse_term(const std::string& name) {
  if (name == "none") return Term::kNone;
  if (name == "linear") return Term::kLinear;
  if (name == "square") return Term::kSquare;
  if (name == "hinge") return Term::kHinge;
  if (name == "squared_hinge") return Term::kSquaredHinge;
  if (name == "softplus") return Term::kSoftplus;
  if (name == "exp") return Term::kExp;
  if (name == "squared_sigmoid") return Term::kSquaredSigmoid;
  STD_TORCH_CHECK(false,
                  "formula: 'none', 'linear', 'square', 'hinge', 'squared_hinge', 'softplus', "
                  "'exp' or 'squared_sigmoid' expected, got '",
                  name, "'");
}

Reduction parse_reduction(const std::string& name) {
  if (name == "mean") return Reduction::kMean;
  if (name == "mean_nonzero") return Reduction::kMeanNonzero;
  if (name == "sum") return Reduction::kSum;
  STD_TORCH_CHECK(false, "reduction: 'mean', 'mean_nonzero' or 'sum' expected, got '", name, "'");
}

namespace {

void check_rows(const Tensor& x, const Tensor& labels, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, ": 2 dimensions expected, got ", x.dim());
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == x.size(0), name,
                  "_labels: one label per row expected");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, name, "_labels: int64 expected");
  STD_TORCH_CHECK(x.size(0) < std::numeric_limits<int32_t>::max() - kMaxBlockRows, name,
                  ": fewer than 2^31 rows expected, got ", x.size(0));
}

}  // namespace

void check_batch(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
                 const OptionalTensor& ref_labels) {
  check_rows(query, query_labels, "query");
  STD_TORCH_CHECK(ref.has_value() == ref_labels.has_value(),
                  "ref and ref_labels: both or neither expected");
  if (!ref.has_value()) return;
  check_rows(*ref, *ref_labels, "ref");
  STD_TORCH_CHECK(ref->size(1) == query.size(1), "ref: ", query.size(1), " columns expected, got ",
                  ref->size(1));
  STD_TORCH_CHECK(ref->scalar_type() == query.scalar_type(), "ref: the dtype of query expected");
}

}  // namespace flashmetric
