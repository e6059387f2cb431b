// SPDX-License-Identifier: Apache-2.0
// Launch decisions: which shape of tile, how many blocks, how much shared memory. Plain C++ that
// the launchers and the tests share; a test that interprets a kernel runs it with these very
// numbers.
#pragma once

#include <layout.h>

namespace flashmetric::cuda {

// What a decision depends on besides the problem.
struct DeviceLimits {
  int arch;            // what the kernels are compiled for, 90 for 9.0
  int sms;             // multiprocessors
  int smem_per_block;  // bytes that one block may ask for
  int smem_per_sm;     // bytes of all blocks of a multiprocessor
};

// A tile of kRows x kCols inner products by warps of kWarpRows x kWarpCols. kKeep chunks of the
// columns are still in shared memory when the last one has been multiplied. kAhead chunks are
// loaded ahead.
template <int kPlanes_, int kRows_, int kCols_, int kWarpRows_, int kWarpCols_, int kKeep_,
          int kAhead_>
struct TileShape {
  static constexpr int kPlanes = kPlanes_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kWarpCols = kWarpCols_;
  static constexpr int kKeep = kKeep_;
  static constexpr int kAhead = kAhead_;
  static constexpr int kStages = kKeep + kAhead;
  static constexpr int kRowWarps = kRows / kWarpRows;
  static constexpr int kColWarps = kCols / kWarpCols;
  static constexpr int kThreads = kRowWarps * kColWarps * kWarp;
  static constexpr int kRowBlocks = kWarpRows / 16;
  static constexpr int kColBlocks = kWarpCols / 8;

  static constexpr int kMetaBytes = static_cast<int>(sizeof(RowMeta));
  static constexpr int kRowMetaBytes = kRows * kMetaBytes;
  static constexpr int kRowChunkBytes = kPlanes * kRows * kChunkBytes;
  static constexpr int kColChunkBytes = kPlanes * kCols * kChunkBytes;

  static_assert(kRowPadding % kRows == 0 && kRowPadding % kCols == 0, "tiles divide the padding");

  // Layout: metadata of the rows, then (resident) all chunks of the rows, then the stages, each
  // with (not resident) a chunk of the rows, a chunk of the columns and metadata of the columns.
  static constexpr int stage_bytes(bool resident) {
    return (resident ? 0 : kRowChunkBytes) + kColChunkBytes + kCols * kMetaBytes;
  }
  static constexpr int64_t smem_bytes(bool resident, int64_t chunks) {
    return kRowMetaBytes + (resident ? chunks * kRowChunkBytes : 0) +
           int64_t{kStages} * stage_bytes(resident);
  }
};

// Architectures differ in shared memory: much (8.0, 9.0, 10.0), 100 KB (8.6, 8.9, 12.0), 64 KB
// (7.5, which has no asynchronous copies to hide either). Device code picks its shapes by the
// architecture it is compiled for, host code by the device's.
enum class ArchClass { kTuring, kSmall, kLarge };

FLASHMETRIC_HD constexpr ArchClass arch_class(int arch) {
  return arch < 80                                 ? ArchClass::kTuring
         : arch == 86 || arch == 89 || arch >= 120 ? ArchClass::kSmall
                                                   : ArchClass::kLarge;
}

template <int kPlanes, ArchClass kClass>
struct Shapes {
  static constexpr int kAhead = kClass == ArchClass::kTuring ? 1 : kPlanes == 1 ? 3 : 2;
  using Wide = TileShape<kPlanes, 128, 64, 64, 32, 1, kAhead>;
  using Narrow = TileShape<kPlanes, 32, 64, 16, 32, 1, kAhead>;
  static constexpr int kSumKeep = kClass == ArchClass::kTuring  ? 1
                                  : kClass == ArchClass::kSmall ? 2
                                                                : 4;
  static constexpr int kSumAhead = kClass == ArchClass::kLarge ? 2 : 1;
  using Sum = TileShape<kPlanes, 64, 64, 16, 32, kSumKeep, kSumAhead>;
};

// What row_sum shares between the warps of a block besides the stages, for the product of weights
// and columns: the scaled weights of one kind, the largest weight of each row per kind and column
// warp, and which pairs are near.
template <class Shape>
struct WeightLayout {
  static constexpr int kRowBytes = Shape::kCols * 2;
  static constexpr int kPlaneBytes = Shape::kRows * kRowBytes;
  static constexpr int kLargest = Shape::kPlanes * kPlaneBytes;
  static constexpr int kNear = kLargest + 2 * Shape::kColWarps * Shape::kRows * 4;
  static constexpr int kBytes = kNear + Shape::kThreads * 4;

  // As piece_offset, for rows of 128 bytes.
  FLASHMETRIC_HD static constexpr int offset(int row, int piece) {
    return row * kRowBytes + ((piece ^ (row & 7)) * kPieceBytes);
  }
};

struct TilePlan {
  int grid_x, grid_y;
  int threads;
  int smem;
  bool resident;   // the row tile stays in shared memory; otherwise it is loaded again with each
                   // column tile
  bool fits;       // false: the device cannot run it
  int smem_limit;  // what a block of this device may ask for
};

// Resident rows pay unless they cost a second block its place on the multiprocessor. `extra`: bytes
// besides those of the tile.
template <class Shape>
constexpr TilePlan plan_tile(int64_t chunks, int64_t extra, int blocks_per_sm,
                             const DeviceLimits& device) {
  constexpr int kReserved = 1024;  // of each block, by the system
  const int64_t part = device.smem_per_sm / blocks_per_sm - kReserved;
  const int64_t limit = part < device.smem_per_block ? part : device.smem_per_block;
  const bool resident = Shape::smem_bytes(true, chunks) + extra <= limit;
  const int64_t smem = Shape::smem_bytes(resident, chunks) + extra;
  return {0,
          1,
          Shape::kThreads,
          static_cast<int>(smem),
          resident,
          smem <= device.smem_per_block,
          device.smem_per_block};
}

// Up to this many anchors each block owns its rows, from the first column to the finished loss:
// two launches. Beyond, tiles are shared out evenly, symmetric ones are computed once, and a launch
// of its own finishes the rows.
constexpr int64_t kOwnerRows = 2048;

struct HardestPlan {
  bool owner;
  bool symmetric;
  TileOrder order;
  TilePlan tile;
};

template <class Set>
constexpr HardestPlan plan_owner(int64_t n, int64_t m, int64_t d, const DeviceLimits& device) {
  using Shape = typename Set::Narrow;
  HardestPlan plan{};
  plan.owner = true;
  plan.tile = plan_tile<Shape>(chunk_count(d), 0, 2, device);
  plan.order = {divide_up(n, Shape::kRows), divide_up(m, Shape::kCols), 1, false};
  plan.tile.grid_x = static_cast<int>(plan.order.row_tiles);
  return plan;
}

template <class Set>
constexpr HardestPlan plan_shared(int64_t n, int64_t m, int64_t d, bool self,
                                  const DeviceLimits& device) {
  using Shape = typename Set::Wide;
  constexpr int64_t kRatio = Shape::kRows / Shape::kCols;
  const int64_t row_tiles = divide_up(n, Shape::kRows);
  HardestPlan plan{};
  plan.symmetric = self;
  plan.tile = plan_tile<Shape>(chunk_count(d), 0, 2, device);
  plan.order = {row_tiles, self ? row_tiles * kRatio : divide_up(m, Shape::kCols), kRatio, self};
  const int64_t fitting = device.smem_per_sm / (plan.tile.smem + 1024);
  const int64_t blocks = int64_t{device.sms} * (fitting < 2 ? 1 : 2);
  plan.tile.grid_x = static_cast<int>(plan.order.count() < blocks ? plan.order.count() : blocks);
  if (plan.order.count() > 0x7fffffff) plan.tile.fits = false;  // kernels number tiles by int
  return plan;
}

// What a block of row_sum or row_lse knows of one row in the end: see RowTotal, LseTotal.
constexpr int kRowTotalBytes = 56;

// A block owns 64 query rows and up to kKeep chunks of features of their gradient: it repeats the
// inner products for each such part of a gradient.
template <class Set>
constexpr TilePlan plan_row_sum_of(int64_t n, int64_t d, bool with_grad,
                                   const DeviceLimits& device) {
  using Shape = typename Set::Sum;
  const int extra = with_grad ? WeightLayout<Shape>::kBytes : 0;
  TilePlan plan = plan_tile<Shape>(chunk_count(d), extra, 1, device);
  // The end of the kernel puts totals and gradients of the rows in place of all that.
  const int end = Shape::kRows * (kRowTotalBytes + (with_grad ? Shape::kKeep * kChunk + 4 : 0) * 4);
  plan.smem = plan.smem < end ? end : plan.smem;
  plan.grid_x = static_cast<int>(divide_up(n, Shape::kRows));
  plan.grid_y = with_grad ? static_cast<int>(divide_up(chunk_count(d), Shape::kKeep)) : 1;
  return plan;
}

// Calls f with the set of shapes for a number of planes and an architecture.
template <class F>
constexpr auto with_shapes(int planes, int arch, F&& f) {
  constexpr auto kTuring = ArchClass::kTuring, kSmall = ArchClass::kSmall,
                 kLarge = ArchClass::kLarge;
  switch (arch_class(arch)) {
    case kTuring:
      return planes == 1 ? f(Shapes<1, kTuring>{}) : f(Shapes<2, kTuring>{});
    case kSmall:
      return planes == 1 ? f(Shapes<1, kSmall>{}) : f(Shapes<2, kSmall>{});
    default:
      return planes == 1 ? f(Shapes<1, kLarge>{}) : f(Shapes<2, kLarge>{});
  }
}

inline HardestPlan plan_hardest(int planes, int64_t n, int64_t m, int64_t d, bool self,
                                const DeviceLimits& device) {
  return with_shapes(planes, device.arch, [&](auto set) {
    return n <= kOwnerRows && m <= 4 * kOwnerRows
               ? plan_owner<decltype(set)>(n, m, d, device)
               : plan_shared<decltype(set)>(n, m, d, self, device);
  });
}

inline TilePlan plan_row_sum(int planes, int64_t n, int64_t d, bool with_grad,
                             const DeviceLimits& device) {
  return with_shapes(planes, device.arch, [&](auto set) {
    return plan_row_sum_of<decltype(set)>(n, d, with_grad, device);
  });
}

// Rows are prepared and finished by one warp each, in blocks of this many; a bounded number of
// blocks keeps the list of their findings short.
constexpr int kRowWarps = 4;
constexpr int kMaxRowBlocks = 1024;

constexpr int plan_rows(int64_t rows) {
  const int64_t blocks = divide_up(rows, kRowWarps);
  return static_cast<int>(blocks < 1 ? 1 : blocks > kMaxRowBlocks ? kMaxRowBlocks : blocks);
}

}  // namespace flashmetric::cuda
