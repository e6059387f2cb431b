// SPDX-License-Identifier: Apache-2.0
// Scale, offset and bound of every query row for one kind of pair, from tensors [2, 1] or [2, N].
#pragma once

#include <pair_batch.h>

namespace flashmetric {

// Scale, offset and bounds as they came, checked.
template <class T>
struct RowParameters {
  RowParameters(const Tensor& scale, const Tensor& offset, const OptionalTensor& bound, int64_t n)
      : scale_(rows_as<T>(scale)), offset_(rows_as<T>(offset)), rows_(n) {
    const auto check = [&](const Tensor& t, bool one, const char* name) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == 2 && (t.size(1) == n || (one && t.size(1) == 1)),
                      name, ": shape [2, ", n, "] expected", one ? " or [2, 1]" : "");
    };
    check(scale, true, "scale");
    check(offset, true, "offset");
    if (!bound.has_value()) return;
    check(*bound, false, "bound");
    bound_ = rows_as<T>(*bound);
  }

  // Whether all pairs have the same function of the distance, and all are kept.
  bool uniform() const { return scale_.size(1) == 1 && offset_.size(1) == 1 && !bounded(); }
  bool bounded() const { return bound_.has_value(); }
  int64_t rows() const { return rows_; }

  // Of all rows, for one kind, padded to whole panels.
  std::vector<T> scale(int kind) const { return expand(scale_, kind); }
  std::vector<T> offset(int kind) const { return expand(offset_, kind); }
  std::vector<T> bound(int kind) const {
    return bounded() ? expand(*bound_, kind) : std::vector<T>();
  }

 private:
  std::vector<T> expand(const Tensor& t, int kind) const {
    std::vector<T> out(static_cast<size_t>(round_up(rows_, cpu_kernels<T>().panel_width)), T(0));
    const int64_t columns = t.size(1);
    const T* p = data<T>(t) + kind * columns;
    for (int64_t i = 0; i < rows_; ++i) out[static_cast<size_t>(i)] = p[columns == 1 ? 0 : i];
    return out;
  }

  Tensor scale_, offset_;
  OptionalTensor bound_;
  int64_t rows_;
};

// Null for an empty array.
template <class T>
const T* pointer(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

}  // namespace flashmetric
