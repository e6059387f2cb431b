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

PLAN = [
    mutant(
        "512 bytes of shared memory too few",
        "sums",
        "plan.h",
        "          static_cast<int>(smem),",
        "          static_cast<int>(smem) - 512,",
    ),
]

MUTANTS = [*SWEEP, *LAYOUT, *PREPARE, *HARDEST, *PLAN]
