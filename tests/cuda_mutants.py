# SPDX-License-Identifier: Apache-2.0
"""Bugs to plant in the tile engine, and the check of test_cuda_mutations.py that must see each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One planted bug: edits of (file of csrc/cuda, old text, new text)."""

    name: str
    check: str
    edits: tuple[tuple[str, str, str], ...]


def mutant(name: str, check: str, file: str, old: str, new: str = "") -> Mutant:
    """A bug that takes one edit."""
    return Mutant(name, check, ((file, old, new),))


SWEEP = [
    mutant(
        "no barrier before a stage is filled again",
        "owner",
        "tile.cuh",
        "done with the stage that is filled next.\n      __syncthreads();\n",
        "done with the stage that is filled next.\n",
    ),
    mutant(
        "one group too many under way",
        "owner",
        "tile.cuh",
        "cp_async_wait<Shape::kAhead - 1>();",
        "cp_async_wait<Shape::kAhead>();",
    ),
    mutant(
        "a stage's copies join the next group",
        "owner",
        "tile.cuh",
        "      cp_async_commit();\n      stage_ = now.stage;",
        "      stage_ = now.stage;",
    ),
    mutant(
        "the first copies join one group",
        "owner",
        "tile.cuh",
        "load_stage(row_tile, load);\n      cp_async_commit();\n    }",
        "load_stage(row_tile, load);\n    }",
    ),
    mutant(
        "the ring is one stage shorter",
        "owner",
        "tile.cuh",
        "stage = stage + 1 == Shape::kStages ? 0 : stage + 1;",
        "stage = stage + 1 == Shape::kStages - 1 ? 0 : stage + 1;",
    ),
    mutant(
        "metadata of columns come with the first chunk",
        "owner",
        "tile.cuh",
        "if (at.chunk + 1 == chunks_)\n      load_meta",
        "if (at.chunk == 0)\n      load_meta",
    ),
    Mutant(
        "nobody waits for the metadata of rows",
        "one_chunk",
        (
            ("tile.cuh", "    load_row_tile(row_tile);\n    Cursor load", "    Cursor load"),
            ("tile.cuh", "    Cursor now{", "    load_row_tile(row_tile);\n    Cursor now{"),
        ),
    ),
    mutant(
        "products are not cleared",
        "owner",
        "tile.cuh",
        "epilogue(products, now.col_tile);\n        clear(products);",
        "epilogue(products, now.col_tile);",
    ),
    mutant(
        "no barrier after the last tile",
        "owner",
        "tile.cuh",
        "    __syncthreads();  // the next run overwrites rows and stages\n",
    ),
    mutant(
        "halves of b exchanged",
        "owner",
        "tile.cuh",
        "          mma_f16(c, a[0][i], b[0][pair][reg], b[0][pair][reg + 1]);\n        }",
        "          mma_f16(c, a[0][i], b[0][pair][reg + 1], b[0][pair][reg]);\n        }",
    ),
    mutant(
        "the wrong register of b", "owner", "tile.cuh", "reg = j % 2 * 2;", "reg = (j + 1) % 2 * 2;"
    ),
    mutant(
        "the low plane of rows ignored",
        "close_calls",
        "tile.cuh",
        "            mma_f16(c, a[1][i], b[0][pair][reg], b[0][pair][reg + 1]);\n",
    ),
    mutant(
        "chunks rotated by one too many",
        "sums",
        "tile.cuh",
        "first_ + chunk < chunks_ ? first_ + chunk",
        "first_ + chunk <= chunks_ ? first_ + chunk",
    ),
    mutant(
        "the kept chunk of another stage",
        "many_tiles",
        "tile.cuh",
        "stage_ - back + Shape::kStages;",
        "stage_ - back + Shape::kStages - 1;",
    ),
]

LAYOUT = [
    mutant(
        "halves of an accumulator exchanged",
        "owner",
        "layout.h",
        "lane / 4 + (e >= 2 ? 8 : 0)",
        "lane / 4 + (e >= 2 ? 0 : 8)",
    ),
    mutant("the other piece of b", "owner", "layout.h", "lane / 8 % 2;", "lane / 16;"),
    mutant(
        "keys of negative numbers not turned over",
        "owner",
        "layout.h",
        "bits >> 31 ? ~bits : bits | 0x80000000u",
        "bits | 0x80000000u",
    ),
    mutant(
        "a tile in no share",
        "shared",
        "layout.h",
        "(count % parts < part ? count % parts : part)",
        "(count % parts <= part ? count % parts - 1 : part)",
    ),
    mutant("columns not from the diagonal on", "shared", "layout.h", "col += row * ratio;", ";"),
]

PREPARE = [
    mutant(
        "padding like any row",
        "owner",
        "prepare.cu",
        "  if (row.padding) bias = not_a_number<float>();\n",
    ),
    mutant(
        "the counter keeps its value",
        "owner",
        "prepare.cu",
        "if (blockIdx.x == 0 && args.counter != nullptr) *args.counter = 0;",
    ),
    mutant("keys of negatives not reset", "shared", "prepare.cu", "lane < 2)", "lane < 1)"),
    mutant(
        "only a warp's last row is checked",
        "poison",
        "prepare.cu",
        "prepare_row(args, out, row, type, lane) || bad;",
        "prepare_row(args, out, row, type, lane);",
    ),
]

HARDEST = [
    mutant(
        "the last of equals wins",
        "ties",
        "hardest.cuh",
        "candidate < value;",
        "candidate <= value;",
    ),
    mutant("an anchor is its own positive", "dot", "hardest.cuh", "same && !itself", "same"),
    mutant(
        "half of the diagonal not seen as such",
        "dot",
        "hardest.cuh",
        "col0 < row0 + Shape::kRows && row0",
        "col0 <= row0 && row0",
    ),
    mutant(
        "columns merged without the last exchange",
        "shared",
        "hardest.cuh",
        "mask >= 4; mask /= 2) key = lane_min",
        "mask > 4; mask /= 2) key = lane_min",
    ),
    mutant(
        "columns of another tile updated",
        "shared",
        "hardest.cuh",
        "kind * padded + col0 +",
        "kind * padded + first_row +",
    ),
    mutant(
        "one column warp's rows only",
        "owner",
        "hardest.cuh",
        "for (int w = 0; w < Shape::kColWarps; ++w)",
        "for (int w = 0; w < 1; ++w)",
    ),
    mutant(
        "rows past the last one",
        "owner",
        "hardest.cuh",
        "row0 + r < args.problem.query.n",
        "row0 + r < 96",
    ),
    mutant(
        "no barrier before keys are read",
        "owner",
        "exact.cuh",
        "  return __syncthreads_or(found);",
        "  return found;",
    ),
    mutant(
        "no second look at near winners",
        "near",
        "finish.cuh",
        "args_.exact || !trustworthy(i, found)",
        "args_.exact",
    ),
    Mutant(
        "no fence between the sums and who reads them",
        "owner",
        (
            ("finish.cuh", "__threadfence();  // the sums are there before the count says so", ""),
            (
                "finish.cuh",
                "__threadfence();  // what other blocks wrote",
                "// What other blocks wrote",
            ),
        ),
    ),
]

PAIR_SUM = [
    mutant(
        "sums unscaled by the change",
        "growth",
        "back_product.cuh",
        "out_[kind][b][e] *= change[e / 2];",
        ";",
    ),
    mutant(
        "exact gradients leave weights unfitted",
        "near_first",
        "back_product.cuh",
        "(old <= 0.0f ||",
        "(old == 0.0f ||",
    ),
    mutant(
        "no barrier after weights are stored",
        "sums",
        "back_product.cuh",
        "store_weights(kind, weights, positives);\n        __syncthreads();",
        "store_weights(kind, weights, positives);",
    ),
    mutant(
        "the low plane of weights ignored",
        "sums",
        "back_product.cuh",
        "            mma_f16(c, a[1], r[0][half * 2], r[0][half * 2 + 1]);\n",
    ),
    mutant(
        "the rotation of another part",
        "sums",
        "back_product.cuh",
        "return begin + count == chunks ? 0 : begin + count;",
        "return begin;",
    ),
    mutant(
        "near pairs counted by each column warp",
        "near_first",
        "pair_sum.cuh",
        "sweep_.lane() == lane && warp_col == sweep_.warp_col();",
        "sweep_.lane() == lane;",
    ),
    mutant(
        "negatives pull, too",
        "sums",
        "pair_sum.cuh",
        "if (h != 0.0f) h *= share_of(i, j, same) * (same ? 1.0f : -1.0f);",
        "if (h != 0.0f) h *= share_of(i, j, same);",
    ),
    mutant(
        "near negatives pull, too",
        "near_first",
        "pair_sum.cuh",
        "h *= share_of(i, j, same) * (same ? 1.0f : -1.0f);\n        if (sweep_",
        "h *= share_of(i, j, same);\n        if (sweep_",
    ),
    mutant(
        "weights of the rows",
        "growth",
        "pair_sum.cuh",
        "args_.problem.ref.n + j];",
        "args_.problem.ref.n + i];",
    ),
    mutant(
        "a row is its own positive",
        "sums",
        "pair_sum.cuh",
        "j < args_.problem.ref.n && !(args_.problem.self && i == j);",
        "j < args_.problem.ref.n;",
    ),
    mutant(
        "padding counts",
        "sums",
        "pair_sum.cuh",
        "j < args_.problem.ref.n && !(args_.problem.self && i == j);",
        "!(args_.problem.self && i == j);",
    ),
    mutant(
        "small margins skip near pairs",
        "small_margin",
        "pair_sum.cuh",
        "any = any || u < bound || close || same;",
        "any = any || u < bound || same;",
    ),
    mutant(
        "column warps add at the same time",
        "sums",
        "pair_sum.cu",
        "++warp) {\n    __syncthreads();",
        "++warp) {",
    ),
    mutant(
        "gradients overwritten while they are read",
        "sums",
        "pair_sum.cu",
        "    __syncthreads();\n    rows.back().store(",
        "    rows.back().store(",
    ),
]

PLAN = [
    mutant(
        "512 bytes of shared memory too few",
        "sums",
        "plan.h",
        "          static_cast<int>(smem),",
        "          static_cast<int>(smem) - 512,",
    ),
]

MUTANTS = [*SWEEP, *LAYOUT, *PREPARE, *HARDEST, *PAIR_SUM, *PLAN]
