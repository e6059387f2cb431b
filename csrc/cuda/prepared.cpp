// SPDX-License-Identifier: Apache-2.0
#include <prepared.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

namespace flashmetric::cuda {

int plane_count(const Tensor& query) {
  if (query.scalar_type() != ScalarType::Float) return 1;
  // The switch is torch's own state, which the stable ABI does not show: Python code reads it.
  std::array<StableIValue, 1> stack{};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("flashmetric::_float32_is_exact", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]) ? 2 : 1;
}

bool use_tiles(const Tensor& query, bool fits) {
  if (scalar_of(query) == Scalar::kDouble) return false;
  const Engine chosen = engine();
  STD_TORCH_CHECK(
      fits || chosen != Engine::kTile,
      "FLASHMETRIC_CUDA_ENGINE=tile: this device has too little shared memory, or there "
      "are too many pairs");
  return fits && chosen != Engine::kSlab;
}

PreparedBatch::PreparedBatch(const Tensor& query, const Tensor& query_labels,
                             const OptionalTensor& ref, const OptionalTensor& ref_labels,
                             const Labelling& labelling, Distance distance, int planes,
                             bool with_keys, int64_t extra_bytes)
    : stream(current_stream(query)),
      query_(as_contiguous(query)),
      query_labels_(as_contiguous(query_labels)),
      ref_(ref.has_value() ? as_contiguous(*ref) : query_),
      ref_labels_(ref.has_value() ? as_contiguous(*ref_labels) : query_labels_) {
  check_devices(query, query_labels, ref, ref_labels);
  const bool self = !ref.has_value();
  const int64_t n = query_.size(0), m = ref_.size(0), d = query_.size(1);
  const int64_t width = chunk_count(d) * kChunk;
  const int64_t x_rows = round_up(n, kRowPadding), r_rows = self ? 0 : round_up(m, kRowPadding);
  const int grid = plan_rows(x_rows + r_rows);

  const auto x_planes = workspace_.take<__half>(planes * x_rows * width);
  const auto x_meta = workspace_.take<RowMeta>(x_rows);
  const auto r_planes = workspace_.take<__half>(planes * r_rows * width);
  const auto r_meta = workspace_.take<RowMeta>(r_rows);
  const auto bad_at = workspace_.take<uint32_t>(grid);
  const auto counter_at = workspace_.take<uint32_t>(1);
  const auto keys_at = workspace_.take<uint64_t>(with_keys ? 2 * x_rows : 0);
  const auto extra_at = workspace_.take<char>(extra_bytes);
  workspace_.allocate(query_);

  problem.query = {query_.const_data_ptr(), data<int64_t>(query_labels_), n};
  problem.ref = {ref_.const_data_ptr(), data<int64_t>(ref_labels_), m};
  problem.x = {workspace_.get<__half>(x_planes), workspace_.get<RowMeta>(x_meta), x_rows * width};
  problem.r = self ? problem.x
                   : TileRows{workspace_.get<__half>(r_planes), workspace_.get<RowMeta>(r_meta),
                              r_rows * width};
  problem.d = d;
  problem.chunks = static_cast<int32_t>(chunk_count(d));
  problem.scalar = scalar_of(query_);
  problem.distance = distance;
  problem.self = self;
  problem.labelling = labelling;
  bad = workspace_.get<uint32_t>(bad_at);
  bad_count = grid;
  counter = workspace_.get<uint32_t>(counter_at);
  keys = with_keys ? workspace_.get<uint64_t>(keys_at) : nullptr;
  extra = workspace_.get<char>(extra_at);

  PrepareArgs args{};
  args.problem = problem;
  args.planes = planes;
  args.keys = keys;
  args.bad = workspace_.get<uint32_t>(bad_at);
  args.counter = counter;
  check_launch(prepare(args, grid, stream), "prepare");
}

}  // namespace flashmetric::cuda
