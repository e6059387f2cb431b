# SPDX-License-Identifier: Apache-2.0
"""The tile engine in the PTX interpreter: what prepare writes, and every shape of tile."""

import numpy as np
import pytest

from cuda_batch import Batch, widen
from cuda_plan import A100, ADA, H100, TURING, DeviceLimits, Launch, plan
from cuda_reference import (
    Array,
    check_hardest,
    check_triplets,
    encode,
    problem,
    unit,
    usual_margins,
)
from cuda_row_reference import check_row_sum
from cuda_rows import Terms, row_sum

DTYPES = ["float32", "float16", "bfloat16"]
DEVICES = {"sm_75": TURING, "sm_80": A100, "sm_89": ADA, "sm_90": H100}
NO_KEY = np.uint64(2**64 - 1)


def split(rows: Array, planes: int, chunks: int) -> tuple[Array, Array, Array]:
    """Planes, scales and norms of rows, by the definition; the norms may underflow."""
    largest = np.abs(rows).max(1, initial=0)
    exponent = np.where(largest > 0, np.floor(np.log2(np.where(largest > 0, largest, 1))), -127)
    exponent = np.minimum(126, 14 - exponent)[:, None]
    value = np.zeros((len(rows), chunks * 32))
    value[:, : rows.shape[1]] = np.ldexp(rows, exponent.astype(int))
    high = value.astype(np.float16)
    low = (value - high).astype(np.float16)
    seen = high.astype(np.float64) + (low if planes == 2 else 0)
    seen = np.ldexp(seen, -exponent.astype(int))
    norm = (seen**2).sum(1).astype(np.float32)
    scale = np.ldexp(np.where(largest > 0, 1.0, 0.0), -exponent[:, 0].astype(int))
    return np.stack([high, low][:planes]), scale, norm


def check_prepared(batch: Batch, distance: str) -> None:
    """Both sides are split exactly as defined, padded with zeros and NaN."""
    for side in {id(side): side for side in (batch.query, batch.ref)}.values():
        n = len(side.rows)
        planes, scale, norm = split(widen(side.rows), side.planes, side.chunks)
        np.testing.assert_array_equal(side.tiles.array[:, :n], planes)
        assert (side.tiles.array[:, n:] == 0).all()
        meta = side.meta.array
        flat = norm == 0 if distance == "cosine" else False  # of length zero
        np.testing.assert_array_equal(meta["scale"][:n], np.where(flat, 0, scale))
        np.testing.assert_array_equal(meta["label"][:n], side.labels)
        bias = np.zeros(n) if distance == "dot" else norm
        if distance == "cosine":
            bias = np.where(norm == 0, 1, norm)
        np.testing.assert_allclose(meta["bias"][:n], bias, rtol=1e-6, atol=1e-44)
        assert np.isnan(meta["bias"][n:]).all() and (meta["scale"][n:] == 0).all()
    assert (batch.keys.array == NO_KEY).all()
    assert batch.counter.array == 0


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepare(dtype: str, distance: str) -> None:
    rng = np.random.default_rng(0)
    for n, d, m in [(1, 1, None), (5, 0, 3), (128, 31, 2), (129, 33, None), (3, 70, 257)]:
        batch = problem(rng, n, d, 3, m, dtype=dtype, distance=distance, arch="sm_75")
        check_prepared(batch, distance)
        assert (batch.bad.array == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepare_of_extreme_rows(dtype: str) -> None:
    rng = np.random.default_rng(1)
    scales = [1e15, 1e-15, 1e-20, 1e-30, 0, 1] if dtype != "float16" else [100, 1e-3, 1e-7, 0]
    x = rng.standard_normal((len(scales), 40)) * np.array(scales)[:, None]
    x[-1, 1:] *= 10.0 ** -rng.integers(0, 8, 39)
    x = encode(x, dtype)
    for planes in (1, 2):
        batch = Batch(x, np.arange(len(x)), planes=planes, arch="sm_75")
        check_prepared(batch, "euclidean")
        if planes == 1 and dtype != "float32":
            seen = batch.query.tiles.array[0, : len(x), :40].astype(np.float64)
            seen *= batch.query.meta.array["scale"][: len(x), None].astype(np.float64)
            np.testing.assert_array_equal(seen[-1], widen(x)[-1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e18, 1e19])
def test_prepare_finds_rows_that_are_not_finite(bad: float) -> None:
    x = np.zeros((9, 34), np.float32)
    x[3, 33] = bad
    # Blocks of four rows: row 3 is of block 0.
    batch = Batch(x, np.zeros(9, np.int64), arch="sm_75")
    # A squared distance is at most 4 |x|^2: finite for 2e18, not for 1e19.
    assert batch.bad.array.tolist() == [int(bad != 2e18), 0, 0, 0]


# Those of sm_80 are those of sm_90 with less shared memory: one kind of planes is enough.
KERNELS = [
    (arch, planes) for arch in DEVICES for planes in (1, 2) if (arch, planes) != ("sm_80", 1)
]
PARTS = ["owner", "rectangular", "symmetric"]


def planned(part: str, planes: int, n: int, d: int, limits: DeviceLimits) -> Launch:
    """The launch of a kernel for n rows against as many."""
    if part.startswith("row_sum"):
        return plan().fm_plan_row_sum(planes, n, d, int(part == "row_sum_grad"), limits)
    choose = plan().fm_plan_hardest if part == "owner" else plan().fm_plan_hardest_shared
    return choose(planes, n, n, d, int(part == "symmetric"), limits)


def depths(part: str, planes: int, limits: DeviceLimits) -> list[int]:
    """The most features whose rows stay in shared memory, and the fewest whose rows do not."""
    chunks = 1
    while planned(part, planes, 64, 32 * chunks, limits).resident:
        chunks += 1
    return [d for d in (32 * (chunks - 1), 32 * (chunks - 1) + 1) if d > 0]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("arch", "planes"), KERNELS)
def test_hardest_with_and_without_resident_rows(arch: str, planes: int, part: str) -> None:
    rng = np.random.default_rng(2)
    dtype = "float32" if planes == 2 else "float16"
    limits, rule = DEVICES[arch], {"margin": 0.3}
    n, m = {"owner": (35, 70), "rectangular": (66, 65), "symmetric": (130, None)}[part]
    for d in depths(part, planes, limits):
        batch = problem(rng, n, d, 4, m, dtype=dtype, planes=planes, arch=arch, limits=limits)
        out = batch.hardest(part == "owner", triplet=rule)
        check_hardest(batch, out)
        check_triplets(out, rule)


@pytest.mark.parametrize("part", ["row_sum", "row_sum_grad"])
@pytest.mark.parametrize(("arch", "planes"), KERNELS)
def test_row_sum_with_and_without_resident_rows(arch: str, planes: int, part: str) -> None:
    rng = np.random.default_rng(3)
    dtype = "float32" if planes == 2 else "bfloat16"
    limits, grad = DEVICES[arch], part == "row_sum_grad"
    for d in depths(part, planes, limits):
        batch = problem(rng, 33, d, 3, 65, dtype=dtype, planes=planes, arch=arch, limits=limits)
        terms = Terms.of_margins("hinge", usual_margins("euclidean", d))
        check_row_sum(batch, terms, row_sum(batch, terms, grad=grad))


def test_rows_are_resident_where_they_fit() -> None:
    # What the tests above rely on: both ways occur in all kernels but two.
    never = {
        (arch, planes, part)
        for arch, limits in DEVICES.items()
        for planes in (1, 2)
        for part in [*PARTS, "row_sum", "row_sum_grad"]
        if len(depths(part, planes, limits)) == 1
    }
    assert never == {("sm_75", 2, "rectangular"), ("sm_75", 2, "symmetric")}


def test_half_precision_of_float32_rows() -> None:
    # As where float32 need not be exact: one plane of float32 rows.
    rng = np.random.default_rng(4)
    batch = problem(rng, 40, 50, 4, dtype="float32", planes=1)
    check_hardest(batch, batch.hardest(True), operand_eps=2.0**-10)
    terms = Terms.of_margins("hinge", usual_margins("euclidean", 50))
    check_row_sum(batch, terms, row_sum(batch, terms), operand_eps=2.0**-10)


def test_unit_rows_of_every_dtype() -> None:
    rng = np.random.default_rng(5)
    for dtype in DTYPES:
        x = unit(rng.standard_normal((34, 40)))
        x[5], x[6] = 0, x[7]
        labels = rng.integers(0, 3, 34)
        planes = 2 if dtype == "float32" else 1
        batch = Batch(encode(x, dtype), labels, planes=planes, distance="cosine")
        terms = Terms.of_margins("squared_hinge", usual_margins("cosine", 40))
        check_row_sum(batch, terms, row_sum(batch, terms))
