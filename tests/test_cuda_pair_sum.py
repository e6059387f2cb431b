# SPDX-License-Identifier: Apache-2.0
"""pair_sum on the kernels of row sums, in the PTX interpreter, against float64."""

import numpy as np
import pytest

from cuda_batch import Batch
from cuda_reference import (
    check_pair_sum,
    encode,
    problem,
    swapped,
    unit,
    usual_margins,
)
from cuda_rows import pair_sum

DTYPES = ["float32", "float16", "bfloat16"]
DISTANCES = ["euclidean", "sqeuclidean", "cosine", "dot"]
FORMULAS = ["hinge", "squared_hinge"]
# Rows, references (None: the rows themselves), features, classes (0: as many as rows).
SIZES = [
    (1, None, 1, 1),
    (1, 1, 0, 1),
    (2, None, 31, 1),
    (2, 33, 64, 2),
    (31, None, 32, 0),
    (32, 2, 70, 3),
    (63, 300, 33, 5),
    (64, None, 130, 7),
    (65, 127, 129, 3),
    (127, None, 8, 4),
    (128, 64, 8, 1),
    (129, None, 70, 3),
    (257, 63, 31, 0),
]


def check(batch: Batch, formula: str = "hinge", grad: str | None = "separate") -> None:
    """One launch with usual margins."""
    margins = usual_margins(batch.distance, batch.d)
    out = pair_sum(batch, formula=formula, margins=margins, grad=grad)
    check_pair_sum(batch, out, formula, margins)


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_sizes(index: int) -> None:
    n, m, d, classes = SIZES[index]
    dtype = ["float32", "float16", "float32", "bfloat16"][index % 4]
    batch = problem(np.random.default_rng(index), n, d, classes, m, dtype=dtype)
    check(batch, FORMULAS[index % 2])
    check(batch, FORMULAS[index % 2], grad=None)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances(dtype: str, distance: str, formula: str) -> None:
    rng = np.random.default_rng(1)
    m = None if (formula == "hinge") == (dtype == "float32") else 50
    batch = problem(rng, 40, 40, 3, m, dtype=dtype, distance=distance)
    check(batch, formula)
    if dtype != "bfloat16":
        check(batch, formula, grad=None)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_near_duplicates_and_zero_rows(dtype: str, distance: str, formula: str) -> None:
    # Rows of many near pairs, spread over columns, column warps and both kinds.
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 40))
    x[::4] = x[0] + 2.0**-9 * rng.integers(-1, 2, (13, 40))
    x = unit(x) if distance == "cosine" else x
    x[5] = x[45]
    x[9], x[34] = 0, 0
    planes = 2 if dtype == "float32" else 1
    labels = rng.integers(0, 3, 50)
    margins = {"euclidean": (0.01, 7.0), "sqeuclidean": (1e-5, 60.0), "cosine": (1e-6, 0.9)}
    for m in (None, 40):
        rows = encode(x, dtype)
        side = (None, None) if m is None else (rows[-m:].copy(), labels[-m:].copy())
        batch = Batch(rows, labels, *side, planes=planes, distance=distance)
        for grad in ("separate", None) if m is None else ("sum",):
            out = pair_sum(batch, formula=formula, margins=margins[distance], grad=grad)
            check_pair_sum(batch, out, formula, margins[distance])


@pytest.mark.parametrize("grad", ["separate", None])
def test_margins_below_rounding(grad: str | None) -> None:
    # Negatives within the margin whose products say nothing of their distance.
    rng = np.random.default_rng(3)
    x = unit(rng.standard_normal((200, 40)))
    for i in range(5):  # one such pair in each of five warps' tiles
        x[160 + 8 * i] = x[32 * i] + 1e-5 * rng.standard_normal(40)
    batch = Batch(x.astype(np.float32), np.arange(200))
    margins = (0.0, 2e-4)
    check_pair_sum(batch, pair_sum(batch, margins=margins, grad=grad), "hinge", margins)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_both_kinds_together(dtype: str) -> None:
    rng = np.random.default_rng(4)
    for distance, m in [("euclidean", None), ("dot", 40)]:
        batch = problem(rng, 66, 45, 3, m, dtype=dtype, distance=distance)
        check(batch, "squared_hinge", grad="sum")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights(dtype: str) -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((2, 66)).astype(np.float32)
    weight[:, 7] = 0
    for distance, m in [("euclidean", None), ("sqeuclidean", 40), ("dot", 70)]:
        batch = problem(rng, 66, 36, 3, m, dtype=dtype, distance=distance)
        margins = usual_margins(distance, 36)
        for grad in ("separate", "sum"):
            out = pair_sum(batch, margins=margins, weight=weight, grad=grad)
            check_pair_sum(batch, out, "hinge", margins, weight=weight)
        if m is None:
            continue
        other = swapped(batch)
        options = {"weight": weight, "weight_by_ref": True}
        for grad in ("separate", "sum"):
            out = pair_sum(other, margins=margins, grad=grad, **options)
            check_pair_sum(other, out, "hinge", margins, **options)


def test_weights_of_near_pairs() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((70, 40)).astype(np.float32)
    x[35:] = x[:35] * np.float32(1 + 2.0**-12)
    weight = rng.standard_normal((2, 70)).astype(np.float32)
    labels = rng.integers(0, 3, 70)
    for ref in (None, x[30:66].copy()):
        batch = Batch(x, labels, ref, labels[30:66].copy())
        options = {"weight": weight}
        if ref is not None:
            batch, options = swapped(batch), options | {"weight_by_ref": True}
        out = pair_sum(batch, margins=(0.001, 4.0), **options)
        check_pair_sum(batch, out, "hinge", (0.001, 4.0), **options)


def test_weights_that_grow_from_tile_to_tile() -> None:
    # Each column tile's weights are far larger (or smaller) than those before.
    rng = np.random.default_rng(7)
    for powers in (np.arange(5) * 6, np.arange(5) * -6, np.array([0, 20, 0, -20, 3])):
        batch = problem(rng, 40, 20, 3, 300)
        weight = np.repeat(2.0**powers, 64)[None, :300] * rng.standard_normal((2, 300))
        weight = weight.astype(np.float32)
        weight[:, 64:70] = 0
        other = batch
        options = {"weight": weight, "weight_by_ref": True}
        out = pair_sum(other, margins=(0.5, 7.0), **options)
        check_pair_sum(other, out, "hinge", (0.5, 7.0), **options)


def test_exact_gradients_before_any_weight() -> None:
    # The first tile has near pairs only; the second brings weights that must be fitted.
    rng = np.random.default_rng(8)
    r = np.repeat(rng.standard_normal((1, 40)), 90, 0)
    x = r[:4] + 2.0**-10 * rng.integers(-1, 2, (4, 40))
    r[64:] += rng.standard_normal((26, 40))
    batch = Batch(np.float32(x), np.arange(4) % 2, np.float32(r), np.arange(90) % 2)
    for formula in FORMULAS:
        out = pair_sum(batch, formula=formula, margins=(0.001, 9.0))
        check_pair_sum(batch, out, formula, (0.001, 9.0))


def test_labels_are_compared_in_full() -> None:
    rng = np.random.default_rng(9)
    wide = np.array([0, 1, 1 + 2**32, -1, -1 - 2**33, -(2**63) + 1, 2**63 - 1])
    x = rng.standard_normal((70, 8)).astype(np.float32)
    check(Batch(x, rng.choice(wide, 70)))


@pytest.mark.parametrize("scale", [1e15, 1e-15, 1e-20])
def test_magnitudes(scale: float) -> None:
    rng = np.random.default_rng(10)
    x = (scale * rng.standard_normal((50, 40))).astype(np.float32)
    batch = Batch(x, rng.integers(0, 3, 50))
    margins = (0.5 * scale, 8.0 * scale)
    for formula in FORMULAS:
        out = pair_sum(batch, formula=formula, margins=margins)
        check_pair_sum(batch, out, formula, margins)


def test_one_row_far_from_the_others() -> None:
    rng = np.random.default_rng(11)
    x = rng.standard_normal((70, 40)).astype(np.float32)
    x[11] *= 1e4
    for distance in ("euclidean", "dot"):
        check(Batch(x, rng.integers(0, 4, 70), distance=distance), "squared_hinge")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19])
def test_rows_that_are_not_finite(bad: float) -> None:
    rng = np.random.default_rng(12)
    for m in (None, 33):
        x = rng.standard_normal((40, 12)).astype(np.float32)
        r = None if m is None else rng.standard_normal((m, 12)).astype(np.float32)
        (x if r is None else r)[7, 5] = bad
        labels, ref_labels = rng.integers(0, 3, 40), rng.integers(0, 3, m or 40)
        labels[-1] = 9  # without a positive
        batch = Batch(x, labels, r, ref_labels)
        for distance_grad in ("separate", "sum"):
            out = pair_sum(batch, grad=distance_grad)
            np.testing.assert_array_equal(np.isnan(out["sums"]), out["counts"][:2] > 0)
            assert np.isnan(out["grad"]).all()
        out = pair_sum(batch, grad=None)
        np.testing.assert_array_equal(np.isnan(out["sums"]), out["counts"][:2] > 0)


def test_rows_that_are_not_finite_without_a_pair() -> None:
    x, labels = np.full((3, 5), np.nan, np.float32), np.zeros(3, np.int64)
    lone = Batch(x[:1].copy(), labels[:1].copy())
    nothing = Batch(x, labels, x[:0].copy(), labels[:0].copy())
    for batch in (lone, nothing):
        out = pair_sum(batch)
        for name in ("sums", "counts", "grad"):
            assert (out[name] == 0).all()


def test_order_of_blocks_does_not_matter() -> None:
    first = problem(np.random.default_rng(14), 130, 140, 3)
    results = [pair_sum(first, margins=(0.5, 16.0), seed=seed) for seed in (0, 1)]
    for name, ours in results[0].items():
        np.testing.assert_array_equal(ours, results[1][name])


def test_nearly_nothing_in_a_tile() -> None:
    # Column tiles without a positive and beyond the negatives' margin are skipped by warps.
    rng = np.random.default_rng(15)
    x = 0.1 * rng.standard_normal((200, 20))
    group = np.arange(200) // 50
    x += 3 * np.eye(20)[group]
    x[130] = x[3] + 0.01
    labels = group.copy()
    labels[130], labels[131] = 7, 0
    batch = Batch(x.astype(np.float32), labels)
    for grad in ("separate", None):
        out = pair_sum(batch, margins=(0.3, 0.5), grad=grad)
        check_pair_sum(batch, out, "hinge", (0.3, 0.5))
