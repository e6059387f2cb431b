// SPDX-License-Identifier: Apache-2.0
// The launch decisions and the layout arithmetic of the CUDA kernels for Python (cuda_plan.py).
#include <plan.h>

using namespace flashmetric::cuda;

extern "C" {

struct Launch {
  int32_t grid_x, grid_y, threads, smem, resident, fits, owner, symmetric;
  int64_t row_tiles, col_tiles, ratio;
};

static Launch launch_of(const TilePlan& plan) {
  return {plan.grid_x,   plan.grid_y, plan.threads, plan.smem, plan.resident,
          plan.fits, 0, 0, 0, 0, 0};
}

Launch fm_plan_hardest(int planes, int64_t n, int64_t m, int64_t d, int self, DeviceLimits device) {
  const HardestPlan plan = plan_hardest(planes, n, m, d, self != 0, device);
  Launch launch = launch_of(plan.tile);
  launch.owner = plan.owner;
  launch.symmetric = plan.symmetric;
  launch.row_tiles = plan.order.row_tiles;
  launch.col_tiles = plan.order.col_tiles;
  launch.ratio = plan.order.ratio;
  return launch;
}

// A plan for many rows, whatever the number: interpreted problems are small.
Launch fm_plan_hardest_shared(int planes, int64_t n, int64_t m, int64_t d, int self,
                              DeviceLimits device) {
  const HardestPlan plan = with_shapes(planes, device.arch, [&](auto set) {
    return plan_shared<decltype(set)>(n, m, d, self != 0, device);
  });
  Launch launch = launch_of(plan.tile);
  launch.symmetric = plan.symmetric;
  launch.row_tiles = plan.order.row_tiles;
  launch.col_tiles = plan.order.col_tiles;
  launch.ratio = plan.order.ratio;
  return launch;
}

Launch fm_plan_row_sum(int planes, int64_t n, int64_t d, int with_grad, DeviceLimits device) {
  return launch_of(plan_row_sum(planes, n, d, with_grad != 0, device));
}

int fm_plan_rows(int64_t rows) { return plan_rows(rows); }
int64_t fm_chunks(int64_t d) { return chunk_count(d); }
int64_t fm_owner_rows() { return kOwnerRows; }

int fm_piece_offset(int row, int piece) { return piece_offset(row, piece); }
void fm_fragment(int lane, int32_t* out) {
  const int32_t all[] = {a_row(lane), a_piece(lane), b_row(lane), b_piece(lane), bt_row(lane),
                         bt_piece(lane)};
  for (int t = 0; t < 6; ++t) out[t] = all[t];
  for (int e = 0; e < 4; ++e) {
    out[6 + e] = acc_row(lane, e);
    out[10 + e] = acc_col(lane, e);
  }
}
uint64_t fm_make_key(uint32_t bits, uint32_t index) { return make_key(bits, index); }
int64_t fm_key_index(uint64_t key) { return key_index(key); }
int fm_prescale_exponent(uint32_t bits) { return prescale_exponent(bits); }
uint32_t fm_power_of_two_bits(int exponent) { return power_of_two_bits(exponent); }
uint32_t fm_inverse_power_bits(uint32_t bits) { return inverse_power_bits(bits); }

// All segments of one block's share of the tiles; returns how many there are.
int64_t fm_segments(int64_t row_tiles, int64_t col_tiles, int64_t ratio, int symmetric,
                    int64_t part, int64_t parts, int64_t* out, int64_t room) {
  const TileOrder order{row_tiles, col_tiles, ratio, symmetric != 0};
  const int64_t end = share(order.count(), part + 1, parts);
  int64_t count = 0;
  for (int64_t t = share(order.count(), part, parts); t < end && count < room; ++count) {
    const Segment segment = order.segment(t, end);
    out[count * 3] = segment.row_tile;
    out[count * 3 + 1] = segment.col_begin;
    out[count * 3 + 2] = segment.col_end;
    t += segment.col_end - segment.col_begin;
  }
  return count;
}
int64_t fm_tile_count(int64_t row_tiles, int64_t col_tiles, int64_t ratio, int symmetric) {
  return TileOrder{row_tiles, col_tiles, ratio, symmetric != 0}.count();
}
int fm_weight_offset(int row, int piece) {
  return WeightLayout<Shapes<2, ArchClass::kLarge>::Sum>::offset(row, piece);
}
}
