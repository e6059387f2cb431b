// SPDX-License-Identifier: Apache-2.0
// hardest and hardest_triplets on CUDA: two launches for small batches, three for others. Direct
// distances, which no inner product yields, have the slab engine's search by exact differences.
#include <flashmetric/cuda_slab.h>
#include <prepared.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace flashmetric::cuda {
namespace {

struct Found {
  Tensor index, distance;
};

struct Triplets {
  Tensor loss, slope, scale;
};

HardestPlan make_plan(const Tensor& query, const OptionalTensor& ref, int planes) {
  const int64_t n = query.size(0), m = ref.has_value() ? ref->size(0) : n;
  return plan_hardest(planes, n, m, query.size(1), !ref.has_value(), device_limits(query));
}

// Fills `triplets` unless null.
Found tile_hardest(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
                   const OptionalTensor& ref_labels, Distance distance, bool exact, int planes,
                   const HardestPlan& plan, const TripletRule<float>& rule, Triplets* triplets) {
  const int64_t n = query.size(0);
  Found found{torch::stable::new_empty(query, {2, n}, ScalarType::Long),
              torch::stable::new_empty(query, {2, n}, ScalarType::Float)};
  const int finish_grid = plan_rows(n);
  const int64_t parts = plan.owner ? plan.tile.grid_x : finish_grid;
  const int64_t part_bytes = static_cast<int64_t>(sizeof(double) + sizeof(int64_t));
  const PreparedBatch batch(query, query_labels, ref, ref_labels, kOneWord, distance, planes,
                            !plan.owner, triplets == nullptr ? 0 : parts * part_bytes);
  HardestArgs args{};
  args.problem = batch.problem;
  args.order = plan.order;
  args.resident = plan.tile.resident;
  args.exact = exact;
  args.keys = batch.keys;
  args.bad = batch.bad;
  args.bad_count = batch.bad_count;
  args.index = mutable_data<int64_t>(found.index);
  args.distance = mutable_data<float>(found.distance);
  if (triplets != nullptr) {
    triplets->loss = torch::stable::new_empty(query, {}, ScalarType::Float);
    triplets->slope = torch::stable::new_empty(query, {2, n}, ScalarType::Float);
    triplets->scale = torch::stable::new_empty(query, {}, ScalarType::Float);
    double* sums = reinterpret_cast<double*>(batch.extra);
    args.triplet = {mutable_data<float>(triplets->loss),
                    mutable_data<float>(triplets->slope),
                    mutable_data<float>(triplets->scale),
                    sums,
                    reinterpret_cast<int64_t*>(sums + parts),
                    batch.counter,
                    rule};
  }
  check_launch(hardest(args, plan, planes, batch.stream), "hardest");
  if (!plan.owner) check_launch(hardest_finish(args, finish_grid, batch.stream), "hardest");
  return found;
}

std::tuple<Tensor, Tensor> hardest_cuda(const Tensor& query, const Tensor& query_labels,
                                        const OptionalTensor& ref, const OptionalTensor& ref_labels,
                                        const std::string& distance, bool exact) {
  check_batch(query, query_labels, ref, ref_labels);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Distance which = parse_distance(distance);
  const int planes = plane_count(query);
  const HardestPlan plan = make_plan(query, ref, planes);
  const bool direct = is_direct(which);
  if (query.size(0) == 0 || direct || !use_tiles(query, plan.tile.fits))
    return slab_hardest(query, query_labels, ref, ref_labels, which, exact || direct);
  const Found found =
      tile_hardest(query, query_labels, ref, ref_labels, which, exact, planes, plan, {}, nullptr);
  return {found.index, found.distance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hardest_triplets_cuda(
    const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const std::string& distance, double margin, bool smooth,
    const std::string& reduction, bool keep, bool exact) {
  check_batch(query, query_labels, ref, ref_labels);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Distance which = parse_distance(distance);
  const Reduction how = parse_reduction(reduction);
  const int planes = plane_count(query);
  const HardestPlan plan = make_plan(query, ref, planes);
  const bool direct = is_direct(which);
  if (query.size(0) == 0 || direct || !use_tiles(query, plan.tile.fits)) {
    const auto [index, found] =
        slab_hardest(query, query_labels, ref, ref_labels, which, exact || direct);
    const auto [loss, slope, scale] =
        triplet_finish(index, found, TripletRule<double>{margin, smooth, keep, how});
    return {loss, index, found, slope, scale};
  }
  Triplets triplets;
  const Found found = tile_hardest(query, query_labels, ref, ref_labels, which, exact, planes, plan,
                                   {static_cast<float>(margin), smooth, keep, how}, &triplets);
  return {triplets.loss, found.index, found.distance, triplets.slope, triplets.scale};
}

}  // namespace
}  // namespace flashmetric::cuda

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("hardest", TORCH_BOX(&flashmetric::cuda::hardest_cuda));
  m.impl("hardest_triplets", TORCH_BOX(&flashmetric::cuda::hardest_triplets_cuda));
}
