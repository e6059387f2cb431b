// SPDX-License-Identifier: Apache-2.0
// The tile engine: one block multiplies one tile of rows by a run of column tiles, chunk by chunk
// through a ring of asynchronously filled stages, and hands the finished inner products of each
// tile to an epilogue, in registers.
#pragma once

#include <exact.cuh>
#include <prims.cuh>

namespace flashmetric::cuda {

// One side of a product, as the engine reads it.
struct TileSide {
  const __half* planes;
  const RowMeta* meta;
  int64_t plane_stride;

  __device__ explicit TileSide(const TileRows& rows)
      : planes(rows.planes), meta(rows.meta), plane_stride(rows.plane_stride) {}
};

template <class Shape>
class TileSweep {
 public:
  static constexpr int kRowBlocks = Shape::kRowBlocks;
  static constexpr int kColBlocks = Shape::kColBlocks;

  // Inner products of one warp, as the fragments of mma_f16, still prescaled.
  struct Products {
    float v[kRowBlocks][kColBlocks][4];
  };

  // `first` rotates the order of the chunks: chunk first - 1 is multiplied last.
  __device__ TileSweep(char* smem, const TileRows& rows, const TileRows& cols, int chunks,
                       int first, bool resident)
      : rows_(rows),
        cols_(cols),
        chunks_(chunks),
        first_(first),
        resident_(resident),
        row_meta_(smem),
        resident_rows_(smem_address(smem) + Shape::kRowMetaBytes),
        stages_(smem + Shape::smem_bytes(resident, chunks) -
                int64_t{Shape::kStages} * Shape::stage_bytes(resident)),
        stages_address_(smem_address(stages_)),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        warp_row_(static_cast<int>(threadIdx.x) / kWarp % Shape::kRowWarps * Shape::kWarpRows),
        warp_col_(static_cast<int>(threadIdx.x) / kWarp / Shape::kRowWarps * Shape::kWarpCols) {}

  __device__ int lane() const { return lane_; }
  // First row and column of this warp within the tile.
  __device__ int warp_row() const { return warp_row_; }
  __device__ int warp_col() const { return warp_col_; }

  __device__ const RowMeta& row_meta(int row) const {
    return reinterpret_cast<const RowMeta*>(row_meta_)[row];
  }
  // Of the column tile that the epilogue is called for.
  __device__ const RowMeta& col_meta(int col) const {
    return reinterpret_cast<const RowMeta*>(stages_ + stage_ * Shape::stage_bytes(resident_) +
                                            (resident_ ? 0 : Shape::kRowChunkBytes) +
                                            Shape::kColChunkBytes)[col];
  }
  // Address of the columns' chunk that was multiplied `back` chunks before the last one.
  __device__ uint32_t col_chunk(int back, int plane) const {
    const int stage = stage_ >= back ? stage_ - back : stage_ - back + Shape::kStages;
    return col_address(stage) + static_cast<uint32_t>(plane * Shape::kCols * kChunkBytes);
  }

  // Calls epilogue(products, column tile) for each column tile of [col_begin, col_end).
  template <class Epilogue>
  __device__ void run(int row_tile, int col_begin, int col_end, Epilogue&& epilogue) {
    load_row_tile(row_tile);
    Cursor load{col_begin, 0, 0};
#pragma unroll
    for (int s = 0; s < Shape::kAhead; ++s) {
      if (load.col_tile < col_end) load_stage(row_tile, load);
      cp_async_commit();
    }
    Cursor now{col_begin, 0, 0};
    Products products;
    clear(products);
    while (now.col_tile < col_end) {
      cp_async_wait<Shape::kAhead - 1>();
      // Also: every warp is done with the stage that is filled next.
      __syncthreads();
      if (load.col_tile < col_end) load_stage(row_tile, load);
      cp_async_commit();
      stage_ = now.stage;
      multiply(now.stage, now.chunk, products);
      if (now.chunk + 1 == chunks_) {
        epilogue(products, now.col_tile);
        clear(products);
      }
      now.advance(chunks_);
    }
    cp_async_wait<0>();
    __syncthreads();  // the next run overwrites rows and stages
  }

  __device__ static void clear(Products& products) {
#pragma unroll
    for (int a = 0; a < kRowBlocks; ++a)
#pragma unroll
      for (int b = 0; b < kColBlocks; ++b)
#pragma unroll
        for (int e = 0; e < 4; ++e) products.v[a][b][e] = 0.0f;
  }

 private:
  struct Cursor {
    int col_tile, chunk, stage;

    __device__ void advance(int chunks) {
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
      if (++chunk == chunks) {
        chunk = 0;
        ++col_tile;
      }
    }
  };

  __device__ uint32_t row_address(int stage, int chunk) const {
    return resident_ ? resident_rows_ + static_cast<uint32_t>(chunk * Shape::kRowChunkBytes)
                     : stages_address_ + static_cast<uint32_t>(stage * Shape::stage_bytes(false));
  }
  __device__ uint32_t col_address(int stage) const {
    return stages_address_ + static_cast<uint32_t>(stage * Shape::stage_bytes(resident_) +
                                                   (resident_ ? 0 : Shape::kRowChunkBytes));
  }

  // Copies chunk `chunk` of kCount rows from row `begin` on to shared memory.
  template <int kCount>
  __device__ void load_chunk(uint32_t to, const TileSide& side, int64_t begin, int chunk) const {
    const int64_t width = int64_t{chunks_} * kChunk;
    // A chunk that is multiplied in place `chunk` of the order.
    const int actual = first_ + chunk < chunks_ ? first_ + chunk : first_ + chunk - chunks_;
    const __half* from = side.planes + begin * width + actual * kChunk;
    // A thread takes the same piece of every kStep-th row. kStep is a multiple of the period of
    // piece_offset, so its offsets in shared memory differ by constants.
    constexpr int kStep = Shape::kThreads / kPieces;
    static_assert(kStep % 8 == 0 && kCount % kStep == 0, "threads share out rows evenly");
    const int row = static_cast<int>(threadIdx.x) / kPieces;
    const int piece = static_cast<int>(threadIdx.x) % kPieces;
    const __half* source = from + row * width + piece * (kChunk / kPieces);
    const uint32_t target = to + static_cast<uint32_t>(piece_offset(row, piece));
#pragma unroll
    for (int plane = 0; plane < Shape::kPlanes; ++plane)
#pragma unroll
      for (int step = 0; step < kCount / kStep; ++step)
        cp_async_16(target + static_cast<uint32_t>((plane * kCount + step * kStep) * kChunkBytes),
                    source + plane * side.plane_stride + step * kStep * width);
  }

  template <int kCount>
  __device__ void load_meta(uint32_t to, const TileSide& side, int64_t begin) const {
#pragma unroll
    for (int r = static_cast<int>(threadIdx.x); r < kCount; r += Shape::kThreads)
      cp_async_16(to + static_cast<uint32_t>(r * Shape::kMetaBytes), side.meta + begin + r);
  }

  // Belongs to the group of the first stage.
  __device__ void load_row_tile(int row_tile) const {
    load_meta<Shape::kRows>(smem_address(row_meta_), rows_, int64_t{row_tile} * Shape::kRows);
    if (!resident_) return;
    for (int c = 0; c < chunks_; ++c)
      load_chunk<Shape::kRows>(row_address(0, c), rows_, int64_t{row_tile} * Shape::kRows, c);
  }

  __device__ void load_stage(int row_tile, Cursor& at) const {
    if (!resident_)
      load_chunk<Shape::kRows>(row_address(at.stage, 0), rows_, int64_t{row_tile} * Shape::kRows,
                               at.chunk);
    const uint32_t to = col_address(at.stage);
    load_chunk<Shape::kCols>(to, cols_, int64_t{at.col_tile} * Shape::kCols, at.chunk);
    // With the last chunk: it is the one whose stage the epilogue reads.
    if (at.chunk + 1 == chunks_)
      load_meta<Shape::kCols>(to + Shape::kColChunkBytes, cols_,
                              int64_t{at.col_tile} * Shape::kCols);
    at.advance(chunks_);
  }

  __device__ void multiply(int stage, int chunk, Products& products) const {
    constexpr int kPlanes = Shape::kPlanes;
    const uint32_t rows = row_address(stage, chunk), cols = col_address(stage);
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) {
      uint32_t a[kPlanes][kRowBlocks][4], b[kPlanes][kColBlocks / 2][4];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i)
          ldmatrix_x4(a[p][i],
                      rows + static_cast<uint32_t>(p * Shape::kRows * kChunkBytes +
                                                   piece_offset(warp_row_ + i * 16 + a_row(lane_),
                                                                step * 2 + a_piece(lane_))));
#pragma unroll
        for (int j = 0; j < kColBlocks / 2; ++j)
          ldmatrix_x4(b[p][j],
                      cols + static_cast<uint32_t>(p * Shape::kCols * kChunkBytes +
                                                   piece_offset(warp_col_ + j * 16 + b_row(lane_),
                                                                step * 2 + b_piece(lane_))));
      }
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
        for (int j = 0; j < kColBlocks; ++j) {
          float (&c)[4] = products.v[i][j];
          const int pair = j / 2, reg = j % 2 * 2;
          if constexpr (kPlanes == 2) {
            // Small terms first: one accumulator then loses least.
            mma_f16(c, a[1][i], b[0][pair][reg], b[0][pair][reg + 1]);
            mma_f16(c, a[0][i], b[1][pair][reg], b[1][pair][reg + 1]);
          }
          mma_f16(c, a[0][i], b[0][pair][reg], b[0][pair][reg + 1]);
        }
    }
  }

  const TileSide rows_, cols_;
  const int chunks_, first_;
  const bool resident_;
  char* const row_meta_;
  const uint32_t resident_rows_;
  char* const stages_;
  const uint32_t stages_address_;
  const int lane_, warp_row_, warp_col_;
  int stage_ = 0;
};

}  // namespace flashmetric::cuda
