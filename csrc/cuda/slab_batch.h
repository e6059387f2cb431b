// SPDX-License-Identifier: Apache-2.0
// What all ops of the slab engine share on the host: operands, slabs and their products.
#pragma once

#include <cuda_ops.h>
#include <flashmetric/cuda_select.h>
#include <flashmetric/cuda_slab.h>

#include <array>

namespace flashmetric::cuda {

// Outside autograd: torch refuses to write results into given memory inside it.
inline Tensor detached(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor first_rows(const Tensor& tensor, int64_t rows) {
  Tensor all = tensor;
  return rows == tensor.size(0) ? all : torch::stable::narrow(all, 0, 0, rows);
}

// out = a b. This form of the product is one that autocast leaves alone.
inline void library_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference to out
}

// Rows of one side in the accumulate type, their norms and labels.
struct Operand {
  Tensor raw, rows, norms, labels;

  Operand(const Tensor& x, const Tensor& x_labels, ScalarType type)
      : raw(detached(as_contiguous(x))),
        rows(raw.scalar_type() == type ? raw : torch::stable::new_empty(raw, {n(), d()}, type)),
        norms(torch::stable::new_empty(raw, {n()}, type)),
        labels(as_contiguous(x_labels)) {}

  int64_t n() const { return raw.size(0); }
  int64_t d() const { return raw.size(1); }
  int grid() const { return plan_rows(n()); }

  void prepare(uint32_t* bad, cudaStream_t stream) const {
    const bool widened = rows.scalar_type() != raw.scalar_type();
    const SlabRowsArgs args{
        raw.const_data_ptr(),     n(), d(), widened ? rows.mutable_data_ptr() : nullptr,
        norms.mutable_data_ptr(), bad};
    check_launch(slab_rows(args, scalar_of(raw), grid(), stream), "slab_rows");
  }
  SlabSide side() const {
    return {rows.const_data_ptr(), norms.const_data_ptr(), data<int64_t>(labels), n()};
  }
};

// Both sides of a problem, prepared; and their products.
class SlabBatch {
 public:
  SlabBatch(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
            const OptionalTensor& ref_labels, Distance distance, Multiply multiply)
      : type(accumulate_type(query)),
        stream(current_stream(query)),
        self(!ref.has_value()),
        query_(query, query_labels, type),
        distance_(distance),
        plain_(multiply == Multiply::kPlain || type == ScalarType::Double) {
    if (!self) ref_.emplace(*ref, *ref_labels, type);
    bad_count_ = query_.grid() + (self ? 0 : ref_->grid());
    bad_ = torch::stable::new_empty(query, {bad_count_}, ScalarType::Int);
    uint32_t* bad = mutable_data<uint32_t>(bad_);
    query_.prepare(bad, stream);
    if (!self) ref_->prepare(bad + query_.grid(), stream);
  }

  int64_t n() const { return query_.n(); }
  int64_t m() const { return ref().n(); }
  int64_t d() const { return query_.d(); }

  const uint32_t* bad() const { return data<uint32_t>(bad_); }
  int32_t bad_count() const { return bad_count_; }

  Tensor empty(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_empty(query_.rows, sizes, type);
  }

  // The problem of a slab of queries against all references; `swapped`: the other way round.
  SlabProblem problem(int64_t begin, bool swapped) const {
    return {(swapped ? ref() : query_).side(),
            (swapped ? query_ : ref()).side(),
            d(),
            distance_,
            self,
            begin,
            data<uint32_t>(bad_),
            bad_count_};
  }

  // products = x r^T for `rows` rows of x; u of the pairs, if the distance is direct.
  void multiply_rows(int64_t begin, int64_t rows, bool swapped, const Tensor& products) const {
    const Operand& x = swapped ? ref() : query_;
    const Operand& r = swapped ? query_ : ref();
    if (r.n() == 0) return;
    Tensor all = x.rows;
    const Tensor part = torch::stable::narrow(all, 0, begin, rows);
    if (is_direct(distance_)) {
      const DirectArgs args{product_args(part, r.rows, true, products), distance_};
      return check_launch(type == ScalarType::Double ? slab_direct<double>(args, stream)
                                                     : slab_direct<float>(args, stream),
                          "slab_direct");
    }
    if (plain_) return plain_product(part, r.rows, true, products);
    library_product(part, torch::stable::transpose(r.rows, 0, 1), first_rows(products, rows));
  }

  // pulled = h r, for `rows` rows of x; h times the gradients of u, if the distance is direct.
  void pull(const Tensor& h, int64_t begin, int64_t rows, bool swapped,
            const Tensor& pulled) const {
    const Operand& x = swapped ? ref() : query_;
    const Operand& r = swapped ? query_ : ref();
    const Tensor part = first_rows(h, rows);
    if (is_direct(distance_)) {
      Tensor all = x.rows;
      const Tensor own = torch::stable::narrow(all, 0, begin, rows);
      const DirectPullArgs args{product_args(part, r.rows, false, pulled), own.const_data_ptr(),
                                distance_};
      return check_launch(type == ScalarType::Double ? slab_direct_pull<double>(args, stream)
                                                     : slab_direct_pull<float>(args, stream),
                          "slab_direct_pull");
    }
    if (plain_) return plain_product(part, r.rows, false, pulled);
    library_product(part, r.rows, first_rows(pulled, rows));
  }

 private:
  const Operand& ref() const { return self ? query_ : *ref_; }

  static ProductArgs product_args(const Tensor& a, const Tensor& b, bool transposed,
                                  const Tensor& out) {
    return {a.const_data_ptr(),
            b.const_data_ptr(),
            out.mutable_data_ptr(),
            a.size(0),
            transposed ? b.size(0) : b.size(1),
            a.size(1)};
  }

  void plain_product(const Tensor& a, const Tensor& b, bool transposed, const Tensor& out) const {
    const ProductArgs args = product_args(a, b, transposed, out);
    check_launch(type == ScalarType::Double ? slab_product<double>(args, transposed, stream)
                                            : slab_product<float>(args, transposed, stream),
                 "slab_product");
  }

 public:
  const ScalarType type;
  const cudaStream_t stream;
  const bool self;

 private:
  const Operand query_;
  std::optional<Operand> ref_;
  const Distance distance_;
  const bool plain_;
  int32_t bad_count_ = 0;
  Tensor bad_;
};

// Calls f(begin, rows) for every slab of n rows.
template <class F>
void for_each_slab(int64_t n, int64_t step, F&& f) {
  for (int64_t begin = 0; begin < n; begin += step) f(begin, n - begin < step ? n - begin : step);
}

}  // namespace flashmetric::cuda
