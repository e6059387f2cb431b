// SPDX-License-Identifier: Apache-2.0
// The slab engine on the host: slabs, products, scratch memory.
#include <cuda_ops.h>
#include <flashmetric/cuda_slab.h>
#include <slab.cuh>

#include <array>

namespace flashmetric::cuda {
namespace {

// Outside autograd: torch refuses to write results into given memory inside it.
Tensor detached(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor first_rows(const Tensor& tensor, int64_t rows) {
  Tensor all = tensor;
  return rows == tensor.size(0) ? all : torch::stable::narrow(all, 0, 0, rows);
}

// out = a b. This form of the product is one that autocast leaves alone.
void library_product(const Tensor& a, const Tensor& b, const Tensor& out) {
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

  // products = x r^T for `rows` rows of x.
  void multiply_rows(int64_t begin, int64_t rows, bool swapped, const Tensor& products) const {
    const Operand& x = swapped ? ref() : query_;
    const Operand& r = swapped ? query_ : ref();
    if (r.n() == 0) return;
    Tensor all = x.rows;
    const Tensor part = torch::stable::narrow(all, 0, begin, rows);
    if (plain_) return plain_product(part, r.rows, true, products);
    library_product(part, torch::stable::transpose(r.rows, 0, 1), first_rows(products, rows));
  }

  // pulled = h r.
  void pull(const Tensor& h, int64_t rows, bool swapped, const Tensor& pulled) const {
    const Operand& r = swapped ? query_ : ref();
    const Tensor part = first_rows(h, rows);
    if (plain_) return plain_product(part, r.rows, false, pulled);
    library_product(part, r.rows, first_rows(pulled, rows));
  }

 private:
  const Operand& ref() const { return self ? query_ : *ref_; }

  void plain_product(const Tensor& a, const Tensor& b, bool transposed, const Tensor& out) const {
    const ProductArgs args{a.const_data_ptr(),
                           b.const_data_ptr(),
                           out.mutable_data_ptr(),
                           a.size(0),
                           transposed ? b.size(0) : b.size(1),
                           a.size(1)};
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

SlabSumArgs sum_args(const PairSumRule& rule) {
  SlabSumArgs args{};
  args.formula = rule.formula;
  args.margin[0] = rule.pos_margin;
  args.margin[1] = rule.neg_margin;
  return args;
}

// The sums of one side of a batch: of its rows against all rows of the other.
class SumPass {
 public:
  // `args`: what does not change from slab to slab.
  SumPass(const SlabBatch& batch, const SlabSumArgs& args, bool swapped, Scalar grad_scalar)
      : batch_(batch), args_(args), swapped_(swapped), grad_scalar_(grad_scalar) {}

  void run() {
    const int64_t n = swapped_ ? batch_.m() : batch_.n(), m = swapped_ ? batch_.n() : batch_.m();
    const int64_t d = batch_.d(), step = plan_slab_rows(n, m, d);
    const bool split = args_.with_grad && !args_.merged;
    const Tensor products = batch_.empty({step, m});
    const Tensor positive = batch_.empty({split ? step : 0, m});
    const int gradients = !args_.with_grad ? 0 : split ? 2 : 1;
    const Tensor pulled = batch_.empty({gradients, step, d});
    Workspace space;
    const int64_t near = space.take<uint32_t>(step * near_words(m));
    const int64_t parts = space.take<SlabPart>(2 * step);
    space.allocate(products);
    args_.products = products.mutable_data_ptr();
    args_.positive = split ? positive.mutable_data_ptr() : nullptr;
    args_.near = space.get<uint32_t>(near);
    args_.parts = space.get<SlabPart>(parts);
    for_each_slab(n, step, [&](int64_t begin, int64_t rows) {
      args_.problem = batch_.problem(begin, swapped_);
      batch_.multiply_rows(begin, rows, swapped_, products);
      check_launch(batch_.type == ScalarType::Double
                       ? slab_weigh<double>(args_, rows, batch_.stream)
                       : slab_weigh<float>(args_, rows, batch_.stream),
                   "slab_weigh");
      for (int k = 0; k < gradients; ++k) {
        const Tensor own = torch::stable::select(pulled, 0, k);
        batch_.pull(split && k == 0 ? positive : products, rows, swapped_, own);
        args_.pulled[k] = own.const_data_ptr();
      }
      check_launch(slab_sum_finish(args_, grad_scalar_, rows, batch_.stream), "slab_sum_finish");
    });
  }

 private:
  const SlabBatch& batch_;
  SlabSumArgs args_;
  const bool swapped_;
  const Scalar grad_scalar_;
};

}  // namespace

std::tuple<Tensor, Tensor> slab_hardest(const Tensor& query, const Tensor& query_labels,
                                        const OptionalTensor& ref, const OptionalTensor& ref_labels,
                                        Distance distance, bool exact, Multiply multiply) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  check_devices(query, query_labels, ref, ref_labels);
  const int64_t n = query.size(0);
  Tensor index = torch::stable::new_empty(query, {2, n}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(query, {2, n}, accumulate_type(query));
  if (n == 0) return std::make_tuple(index, distances);
  const SlabBatch batch(query, query_labels, ref, ref_labels, distance, multiply);
  const int64_t step = exact ? n : plan_slab_rows(n, batch.m(), batch.d());
  const Tensor products = batch.empty({exact ? 0 : step, batch.m()});
  for_each_slab(n, step, [&](int64_t begin, int64_t rows) {
    if (!exact) batch.multiply_rows(begin, rows, false, products);
    const SlabHardestArgs args{batch.problem(begin, false),
                               exact ? nullptr : products.const_data_ptr(),
                               mutable_data<int64_t>(index), distances.mutable_data_ptr()};
    check_launch(batch.type == ScalarType::Double ? slab_hardest<double>(args, rows, batch.stream)
                                                  : slab_hardest<float>(args, rows, batch.stream),
                 "hardest");
  });
  return std::make_tuple(index, distances);
}

std::tuple<Tensor, Tensor, Tensor> triplet_finish(const Tensor& index, const Tensor& distance,
                                                  const TripletRule<double>& rule) {
  const torch::stable::accelerator::DeviceGuard guard(distance.get_device_index());
  const int64_t n = distance.size(1);
  Tensor loss = torch::stable::new_empty(distance, {});
  Tensor slope = torch::stable::new_empty(distance, {2, n});
  Tensor scale = torch::stable::new_empty(distance, {});
  with_accumulate_type(distance, [&](auto zero) {
    using T = decltype(zero);
    const TripletFinishArgs<T> args{
        data<int64_t>(index),
        data<T>(distance),
        n,
        TripletRule<T>{static_cast<T>(rule.margin), rule.smooth, rule.keep, rule.reduction},
        mutable_data<T>(loss),
        mutable_data<T>(slope),
        mutable_data<T>(scale)};
    check_launch(triplet_finish(args, current_stream(distance)), "triplet_finish");
  });
  return std::make_tuple(loss, slope, scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slab_pair_sum(const Tensor& query,
                                                         const Tensor& query_labels,
                                                         const OptionalTensor& ref,
                                                         const OptionalTensor& ref_labels,
                                                         const PairSumRule& rule, bool with_grad,
                                                         bool with_ref_grad, Multiply multiply) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  check_devices(query, query_labels, ref, ref_labels);
  const ScalarType type = accumulate_type(query);
  const int64_t n = query.size(0), d = query.size(1);
  const int64_t m = ref.has_value() ? ref->size(0) : n;
  const int64_t grad_n = with_grad ? n : 0;
  const int64_t grad_m = with_grad && with_ref_grad && ref.has_value() ? m : 0;
  if (n == 0 || m == 0)
    return std::make_tuple(torch::stable::new_zeros(query, {2, n}, type),
                           torch::stable::new_zeros(query, {4, n}, ScalarType::Long),
                           torch::stable::new_zeros(query, {2, grad_n, d}, type),
                           torch::stable::new_zeros(query, {2, grad_m, d}, type));
  Tensor sums = torch::stable::new_empty(query, {2, n}, type);
  Tensor counts = torch::stable::new_empty(query, {4, n}, ScalarType::Long);
  Tensor grad_query = torch::stable::new_empty(query, {2, grad_n, d}, type);
  Tensor grad_ref = torch::stable::new_empty(query, {2, grad_m, d}, type);
  const SlabBatch batch(query, query_labels, ref, ref_labels, rule.distance, multiply);
  SlabSumArgs args = sum_args(rule);
  args.with_grad = grad_n > 0 && d > 0;
  args.sums = sums.mutable_data_ptr();
  args.counts = mutable_data<int64_t>(counts);
  args.grad = grad_query.mutable_data_ptr();
  SumPass(batch, args, false, scalar_of(sums)).run();
  if (grad_m > 0 && d > 0) {
    args.weight_by_ref = true;
    args.sums = nullptr;
    args.grad = grad_ref.mutable_data_ptr();
    SumPass(batch, args, true, scalar_of(sums)).run();
  }
  return std::make_tuple(sums, counts, grad_query, grad_ref);
}

std::tuple<Tensor, Tensor> slab_pair_sum_backward(const Tensor& grad_sums, const Tensor& query,
                                                  const Tensor& query_labels,
                                                  const OptionalTensor& ref,
                                                  const OptionalTensor& ref_labels,
                                                  const PairSumRule& rule, bool with_ref_grad,
                                                  Multiply multiply) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  check_devices(query, query_labels, ref, ref_labels);
  check_device(grad_sums, query, "grad_sums");
  const int64_t n = query.size(0), d = query.size(1);
  const int64_t m = ref.has_value() ? ref->size(0) : n;
  const int64_t grad_m = with_ref_grad && ref.has_value() ? m : 0;
  STD_TORCH_CHECK(grad_sums.dim() == 2 && grad_sums.size(0) == 2 && grad_sums.size(1) == n,
                  "grad_sums: shape [2, ", n, "] expected");
  if (n == 0 || m == 0 || d == 0)
    return std::make_tuple(torch::stable::new_zeros(query, {n, d}),
                           torch::stable::new_zeros(query, {grad_m, d}));
  Tensor grad_query = torch::stable::new_empty(query, {n, d});
  Tensor grad_ref = torch::stable::new_empty(query, {grad_m, d});
  const Tensor weights = in_type(grad_sums, accumulate_type(query));
  const SlabBatch batch(query, query_labels, ref, ref_labels, rule.distance, multiply);
  SlabSumArgs args = sum_args(rule);
  args.merged = true;
  args.with_grad = true;
  const char* weight = static_cast<const char*>(weights.const_data_ptr());
  args.weight[0] = weight;
  args.weight[1] = weight + n * (batch.type == ScalarType::Double ? sizeof(double) : sizeof(float));
  args.grad = grad_query.mutable_data_ptr();
  SumPass(batch, args, false, scalar_of(query)).run();
  if (grad_m > 0) {
    args.weight_by_ref = true;
    args.grad = grad_ref.mutable_data_ptr();
    SumPass(batch, args, true, scalar_of(query)).run();
  }
  return std::make_tuple(grad_query, grad_ref);
}

}  // namespace flashmetric::cuda
