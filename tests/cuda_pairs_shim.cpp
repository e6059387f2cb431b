// SPDX-License-Identifier: Apache-2.0
// The launch numbers of the kernels for listed pairs and of the slab engine, for tests that have no
// GPU: the functions that the launchers call.
#include <flashmetric/cuda_pairs.h>
#include <flashmetric/cuda_select.h>

using namespace flashmetric::cuda;

extern "C" {

int pair_threads() { return kPairThreads; }
int64_t pair_distance_grid(int64_t pairs) { return plan_pair_distance(pairs); }

// sorted, rows_per_block, grid_x, grid_y
void pair_gradient_plan(int64_t rows, int64_t pairs, int64_t d, int64_t* out) {
  const PairGradientPlan plan = plan_pair_gradient(rows, pairs, d);
  out[0] = plan.sorted;
  out[1] = plan.rows_per_block;
  out[2] = plan.grid_x;
  out[3] = plan.grid_y;
}

int slab_threads() { return kSlabThreads; }
int row_threads() { return kRowWarps * kWarp; }
int row_grid(int64_t rows) { return plan_rows(rows); }
int triplet_threads() { return kTripletThreads; }
int product_threads() { return kProductThreads; }
int64_t slab_rows_of(int64_t n, int64_t m, int64_t d) { return plan_slab_rows(n, m, d); }
int64_t slab_near_words(int64_t m) { return near_words(m); }
int64_t gradient_parts(int64_t d) { return plan_gradient_parts(d); }
int64_t swept_thresholds() { return kSweptThresholds; }

void product_plan(int64_t m, int64_t n, int64_t* out) {
  const ProductPlan plan = plan_product(m, n);
  out[0] = plan.grid_x;
  out[1] = plan.grid_y;
}
}
