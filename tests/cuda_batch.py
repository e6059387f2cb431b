# SPDX-License-Identifier: Apache-2.0
"""The tile engine's kernels run in the PTX interpreter: arguments as the C++ glue builds them."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_plan import H100, DeviceLimits, Launch, plan
from ptx_interpreter import Struct, Uninitialised, launch, parse
from ptx_interpreter.compile import CSRC, compile_ptx

Array = NDArray[Any]
DISTANCE = {
    name: number
    for number, name in enumerate(
        ["euclidean", "sqeuclidean", "cosine", "dot", "angular", "sqrt_cosine", "rbf"]
    )
}
RULE = {"equal": 0, "any": 1, "group": 2}
GROUP = {"a": 0, "s": 1, "d": 2}
REDUCTION = {"mean": 0, "mean_nonzero": 1, "sum": 2}
META = np.dtype([("bias", "f4"), ("scale", "f4"), ("label", "i8")])


def bfloat16(x: Array) -> Array:
    """Round to bfloat16, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widen(rows: Array) -> Array:
    """float64 values of float32, float16 or (uint16) bfloat16 rows."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return rows.astype(np.float64)


SCALAR = {np.dtype("f2"): 0, np.dtype("u2"): 1, np.dtype("f4"): 2, np.dtype("f8"): 3}


@functools.cache
def kernels(source: str, arch: str, defines: tuple[str, ...] = ()) -> Any:
    """The kernels of csrc/cuda/<source>.cu."""
    folder: Path = CSRC / "cuda"
    return parse(compile_ptx(folder / f"{source}.cu", arch=arch, defines=list(defines)))


@dataclass
class Side:
    """One side of a batch with what prepare makes of it."""

    rows: Array
    labels: Array
    planes: int
    chunks: int
    tiles: Uninitialised = field(init=False)
    meta: Uninitialised = field(init=False)

    def __post_init__(self) -> None:
        self.padded = -(-len(self.rows) // 128) * 128
        width = self.chunks * 32
        self.tiles = Uninitialised(np.empty((self.planes, self.padded, width), np.float16))
        self.meta = Uninitialised(np.empty(self.padded, META))

    def raw(self) -> Struct:
        return Struct([self.rows, self.labels, np.int64(len(self.rows))])

    def prepared(self) -> Struct:
        return Struct([self.tiles, self.meta, np.int64(self.padded * self.chunks * 32)])


class Batch:
    """A pairwise problem, prepared on construction."""

    def __init__(
        self,
        rows: Array,
        labels: Array,
        ref: Array | None = None,
        ref_labels: Array | None = None,
        *,
        distance: str = "euclidean",
        rule: str = "equal",
        planes: int = 2,
        arch: str = "sm_90",
        limits: DeviceLimits = H100,
        defines: tuple[str, ...] = (),
    ) -> None:
        self.n, self.d = rows.shape
        self.arch, self.limits, self.planes, self.defines = arch, limits, planes, defines
        self.chunks = plan().fm_chunks(self.d)
        self.query = Side(np.ascontiguousarray(rows), labels, planes, self.chunks)
        self.alone = ref is None
        self.ref = self.query
        if ref is not None and ref_labels is not None:
            self.ref = Side(np.ascontiguousarray(ref), ref_labels, planes, self.chunks)
        self.m = len(self.ref.rows)
        self.distance, self.rule = distance, rule
        self.keys = Uninitialised(np.empty((2, self.query.padded), np.uint64))
        self.counter = Uninitialised(np.empty(1, np.uint32))
        total = self.query.padded + (0 if self.alone else self.ref.padded)
        grid = min(plan().fm_plan_rows(total), 4)
        self.bad = Uninitialised(np.empty(grid, np.uint32))
        args = Struct(
            [self.problem(), np.int32(planes), self.keys, self.bad, self.counter],
        )
        kernel = kernels("prepare", arch, defines).find("prepare_kernel")
        launch(kernel, [args], grid=(grid,), block=128)

    def problem(self) -> Struct:
        groups = self.rule[6:] or "aa"
        words = self.query.labels.shape[1] if self.query.labels.ndim == 2 else 1
        return Struct(
            [
                self.query.raw(),
                self.ref.raw(),
                self.query.prepared(),
                self.ref.prepared(),
                np.int64(self.d),
                np.int32(self.chunks),
                np.int32(SCALAR[self.query.rows.dtype]),
                np.int32(DISTANCE[self.distance]),
                np.bool_(self.alone),
                Struct(
                    [
                        np.int32(RULE[self.rule.partition(":")[0]]),
                        np.int32(words),
                        [np.int32(GROUP[group]) for group in groups],
                    ]
                ),
            ]
        )

    def bad_members(self) -> list[Any]:
        return [self.bad, np.int32(len(self.bad.array))]

    def hardest(
        self,
        owner: bool,
        *,
        exact: bool = False,
        triplet: dict[str, Any] | None = None,
        blocks: int | None = None,
        seed: int = 0,
    ) -> dict[str, Array]:
        """Run hardest (and its finish): index, distance, and with ``triplet`` the loss."""
        shape = (self.planes, self.n, self.m, self.d, int(self.alone), self.limits)
        chosen: Launch = (plan().fm_plan_hardest if owner else plan().fm_plan_hardest_shared)(
            *shape
        )
        assert chosen.fits and bool(chosen.owner) == owner
        grid = chosen.grid_x if blocks is None else blocks
        finish_grid = min(plan().fm_plan_rows(self.n), 3)
        result = {
            "index": Uninitialised(np.empty((2, self.n), np.int64)),
            "distance": Uninitialised(np.empty((2, self.n), np.float32)),
        }
        sums, kept = None, None
        if triplet is not None:
            sums = Uninitialised(np.empty(grid if owner else finish_grid, np.float64))
            kept = Uninitialised(np.empty_like(sums.array, np.int64))
            result["loss"] = Uninitialised(np.empty(1, np.float32))
            result["slope"] = Uninitialised(np.empty((2, self.n), np.float32))
            result["scale"] = Uninitialised(np.empty(1, np.float32))
        rule = triplet or {}
        args = Struct(
            [
                self.problem(),
                Struct(
                    [
                        np.int64(chosen.row_tiles),
                        np.int64(chosen.col_tiles),
                        np.int64(chosen.ratio),
                        np.bool_(chosen.symmetric),
                    ]
                ),
                np.bool_(chosen.resident),
                np.bool_(exact),
                self.keys,
                *self.bad_members(),
                result["index"],
                result["distance"],
                Struct(
                    [
                        result.get("loss"),
                        result.get("slope"),
                        result.get("scale"),
                        sums,
                        kept,
                        self.counter,
                        Struct(
                            [
                                np.float32(rule.get("margin", 0.0)),
                                np.bool_(rule.get("smooth", False)),
                                np.bool_(rule.get("keep", False)),
                                np.int32(REDUCTION[rule.get("reduction", "mean")]),
                            ]
                        ),
                    ]
                ),
            ]
        )
        part = "PartE0" if owner else ("PartE2" if chosen.symmetric else "PartE1")
        module = kernels("hardest", self.arch, self.defines)
        shared = [x for x in (sums, kept, self.counter) if x is not None]
        launch(
            module.find(f"hardest_kernelILi{self.planes}", part),
            [args],
            grid=(grid,),
            block=chosen.threads,
            smem_bytes=chosen.smem,
            shared_buffers=shared,
            seed=seed,
        )
        if not owner:
            launch(
                module.find("hardest_finish_kernel"),
                [args],
                grid=(finish_grid,),
                block=128,
                shared_buffers=shared,
                seed=seed,
            )
        return {name: buffer.array for name, buffer in result.items()}
