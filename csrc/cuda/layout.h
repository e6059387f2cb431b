// SPDX-License-Identifier: Apache-2.0
// How the CUDA kernels lay out rows, tiles and keys: plain arithmetic, the same on host and device,
// so that tests reach it without a GPU. No CUDA header.
#pragma once

#include <flashmetric/formula.h>
#include <stdint.h>

namespace flashmetric::cuda {

constexpr int kWarp = 32;
constexpr int kRowPadding = 128;  // rows are padded to whole tiles, so that no load needs a bound
constexpr int kChunk = 32;        // features per pipeline stage; rows are padded to whole chunks
constexpr int kPieceBytes = 16;   // what one asynchronous copy moves
constexpr int kChunkBytes = kChunk * 2;
constexpr int kPieces = kChunkBytes / kPieceBytes;

FLASHMETRIC_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FLASHMETRIC_HD constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// At least one, so that rows without features have (zero) products, too.
FLASHMETRIC_HD constexpr int64_t chunk_count(int64_t d) { return d < 1 ? 1 : divide_up(d, kChunk); }

// What the epilogues need of a row besides its inner products.
struct alignas(16) RowMeta {
  float bias;     // additive part of u; NaN for padding, which then wins no comparison
  float scale;    // power of two that undoes the row's prescale; 0 for a zero row
  int64_t label;  // its first word; kIgnoredLabel for padding
};

// Shared memory, bank conflicts: a chunk of a row is 64 bytes, so rows r and r + 2 share banks.
// Exchanging the 16-byte pieces by (row / 2) % 4 puts the same piece of eight successive rows,
// which is what ldmatrix reads at a time, into eight different groups of banks.
FLASHMETRIC_HD constexpr int piece_offset(int row, int piece) {
  return row * kChunkBytes + ((piece ^ ((row >> 1) & 3)) * kPieceBytes);
}

// Fragment maps of mma.m16n8k16 (see prims.cuh): where lane `lane` finds what.
// Accumulator element e of a 16 x 8 block:
FLASHMETRIC_HD constexpr int acc_row(int lane, int e) { return lane / 4 + (e >= 2 ? 8 : 0); }
FLASHMETRIC_HD constexpr int acc_col(int lane, int e) { return lane % 4 * 2 + e % 2; }
// The row of a 16 x 16 block of a, and which of its two pieces, whose address the lane hands to
// ldmatrix_x4:
FLASHMETRIC_HD constexpr int a_row(int lane) { return lane % 16; }
FLASHMETRIC_HD constexpr int a_piece(int lane) { return lane / 16; }
// The same for two 8 x 16 blocks of b, given as rows of references: registers 0, 1 are b0, b1 of
// the first eight rows, registers 2, 3 of the second.
FLASHMETRIC_HD constexpr int b_row(int lane) { return lane % 8 + lane / 16 * 8; }
FLASHMETRIC_HD constexpr int b_piece(int lane) { return lane / 8 % 2; }
// Rows of a 16 x 16 block read by ldmatrix_x4_trans, so that rows are the depth of the product:
// registers 0, 1 are b0, b1 of the first eight columns, registers 2, 3 of the second.
FLASHMETRIC_HD constexpr int bt_row(int lane) { return lane % 16; }
FLASHMETRIC_HD constexpr int bt_piece(int lane) { return lane / 16; }

// Candidates as 64-bit keys whose minimum is the smallest value and, among equals, the lowest
// index: merging is the same in any order, so atomics stay deterministic.
constexpr uint64_t kNoKey = ~uint64_t{0};

// Bits of a float -> an unsigned number in the same order.
FLASHMETRIC_HD constexpr uint32_t ordered_bits(uint32_t bits) {
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
FLASHMETRIC_HD constexpr uint64_t make_key(uint32_t value_bits, uint32_t index) {
  return uint64_t{ordered_bits(value_bits)} << 32 | index;
}
FLASHMETRIC_HD constexpr int64_t key_index(uint64_t key) {
  return key == kNoKey ? -1 : static_cast<int64_t>(key & 0xffffffffu);
}

// Prescale of the half-precision planes. Multiplying a row by the power of two that brings its
// largest element to [2^14, 2^15) makes rounding errors relative to that element, whatever the
// row's magnitude, and exact to undo.
constexpr int kTopExponent = 14;
constexpr int kExponentBias = 127;

// Exponent of that power, from the bits of the largest magnitude of the row. Also its negative is
// the exponent of a normal float.
FLASHMETRIC_HD constexpr int prescale_exponent(uint32_t max_bits) {
  const int exponent = static_cast<int>(max_bits >> 23 & 255) - kExponentBias;
  const int wanted = kTopExponent - exponent;
  return wanted > 126 ? 126 : wanted;
}
FLASHMETRIC_HD constexpr uint32_t power_of_two_bits(int exponent) {
  return static_cast<uint32_t>(exponent + kExponentBias) << 23;
}

// Bits of a power of two -> bits of its reciprocal.
FLASHMETRIC_HD constexpr uint32_t inverse_power_bits(uint32_t bits) {
  return (uint32_t{2 * kExponentBias} << 23) - bits;
}

// The order of tiles. A row tile covers `ratio` column tiles; of a symmetric problem only tiles
// from the diagonal on are visited, and row f is joined with row (last - f), so that all such pairs
// are equally long and any contiguous part of the order is a fair share.
struct Segment {
  int64_t row_tile, col_begin, col_end;
};

struct TileOrder {
  int64_t row_tiles, col_tiles;
  int64_t ratio;
  bool symmetric;

  FLASHMETRIC_HD constexpr int64_t count() const {
    return symmetric ? row_tiles * (row_tiles + 1) / 2 * ratio : row_tiles * col_tiles;
  }

  // The longest run with one row tile that starts at tile t and ends before `end`.
  FLASHMETRIC_HD constexpr Segment segment(int64_t t, int64_t end) const {
    const int64_t width = symmetric ? col_tiles + ratio : col_tiles;
    int64_t row = t / width, col = t % width;
    if (symmetric) {
      const int64_t first = col_tiles - row * ratio;
      if (col >= first) {
        row = row_tiles - 1 - row;
        col -= first;
      }
      col += row * ratio;
    }
    const int64_t left = end - t, rest = col_tiles - col;
    return {row, col, col + (left < rest ? left : rest)};
  }
};

// Part `part` of `parts` of the tiles: [share(part), share(part + 1)).
FLASHMETRIC_HD constexpr int64_t share(int64_t count, int64_t part, int64_t parts) {
  return count / parts * part + (count % parts < part ? count % parts : part);
}

}  // namespace flashmetric::cuda
