# SPDX-License-Identifier: Apache-2.0
"""hardest and the triplet loss of the tile engine, in the PTX interpreter, against float64."""

import itertools

import numpy as np
import pytest

from cuda_batch import Batch
from cuda_plan import A100, TURING, plan
from cuda_reference import (
    Array,
    check_hardest,
    check_triplets,
    encode,
    lowest_hardest,
    problem,
    unit,
)

DTYPES = ["float32", "float16", "bfloat16"]
DISTANCES = ["euclidean", "sqeuclidean", "cosine", "dot"]
# Rows, references (None: the rows themselves), features, classes (0: as many as rows).
SIZES = [
    (1, None, 1, 1),
    (1, 1, 0, 1),
    (2, None, 31, 1),
    (2, 33, 64, 2),
    (31, None, 32, 0),
    (32, 2, 70, 3),
    (33, None, 1, 2),
    (63, 300, 33, 5),
    (64, None, 33, 7),
    (65, 127, 31, 3),
    (127, None, 64, 4),
    (128, 129, 8, 2),
    (129, None, 70, 3),
    (300, None, 130, 20),
    (257, 64, 32, 0),
]


def some_problem(index: int, planes: int) -> Batch:
    """One of the sizes."""
    n, m, d, classes = SIZES[index]
    dtype = "float32" if planes == 2 else DTYPES[1 + index % 2]
    return problem(np.random.default_rng(index), n, d, classes, m, dtype=dtype)


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_sizes(index: int) -> None:
    # Owners with as many planes as shared tiles have not; the next size exchanges them.
    for owner in (True, False):
        batch = some_problem(index, 1 + (index + owner) % 2)
        check_hardest(batch, batch.hardest(owner))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances(dtype: str, distance: str) -> None:
    rng = np.random.default_rng(1)
    for owner, m in [(True, None), (True, 50), (False, None), (False, 50)]:
        batch = problem(rng, 66, 40, 5, m, dtype=dtype, distance=distance)
        check_hardest(batch, batch.hardest(owner))


def integers(rng: np.random.Generator, n: int, d: int) -> Array:
    """Rows whose products and norms are exact in any precision, many of them equal."""
    return rng.integers(-1, 2, (n, d)).astype(np.float32)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "dot"])
@pytest.mark.parametrize("planes", [1, 2])
def test_ties_go_to_the_lowest_index(planes: int, distance: str) -> None:
    rng = np.random.default_rng(2)
    for n, m, d in [(140, None, 9), (66, 131, 8)]:
        labels, ref_labels = rng.integers(0, 3, n), rng.integers(0, 3, m or n)
        ref = None if m is None else integers(rng, m, d)
        batch = Batch(
            integers(rng, n, d), labels, ref, ref_labels, planes=planes, distance=distance
        )
        for owner in (True, False):
            out = batch.hardest(owner)
            np.testing.assert_array_equal(out["index"], lowest_hardest(batch))
            check_hardest(batch, out)


def test_rare_negatives_and_an_odd_row() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((140, 20)).astype(np.float32)
    for odd in (0, 77, 139):
        labels = np.full(140, 5)
        labels[odd] = -5
        batch = Batch(x, labels)
        for owner in (True, False):
            out = batch.hardest(owner, blocks=None if owner else 2)
            check_hardest(batch, out)
            others = np.arange(140) != odd
            assert (out["index"][1, others] == odd).all() and out["index"][0, odd] == -1


def test_labels_are_compared_in_full() -> None:
    rng = np.random.default_rng(4)
    wide = np.array([1, 1 + 2**32, -1, -1 - 2**33, 0, 2**62, 1 - 2**63, 2**63 - 1])
    for m in (None, 40):
        batch = problem(rng, 70, 8, 1, m)
        for side in (batch.query, batch.ref):
            side.labels[:] = rng.choice(wide, len(side.labels))
        batch = Batch(
            batch.query.rows,
            batch.query.labels,
            *((None, None) if m is None else (batch.ref.rows, batch.ref.labels)),
        )
        for owner in (True, False):
            check_hardest(batch, batch.hardest(owner))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_near_duplicates_are_told_apart(dtype: str, distance: str) -> None:
    # Their squared distances vanish beside the norms that keys are made of.
    rng = np.random.default_rng(5)
    step = 2.0**-12 if dtype == "float32" else 2.0**-7
    centres = unit(rng.standard_normal((6, 24)))[rng.integers(0, 6, 36)]
    x = centres + step * rng.integers(-1, 2, (36, 24)) * (rng.random((36, 24)) < 0.2)
    x[3], x[33], x[30:32] = x[35], x[35], 0
    x = unit(x) if distance == "cosine" and dtype == "float32" else x
    planes = 2 if dtype == "float32" else 1
    batch = Batch(encode(x, dtype), rng.integers(0, 3, 36), distance=distance, planes=planes)
    for owner in (True, False):
        if distance != "cosine" or dtype == "float32":
            check_hardest(batch, batch.hardest(owner))
        check_hardest(batch, batch.hardest(owner, exact=True), exact=True)


def test_rows_far_from_the_origin() -> None:
    rng = np.random.default_rng(6)
    for m in (None, 50):
        batch = problem(rng, 33 if m is None else 9, 33, 3, m)
        sides = [(1e-4 * side.rows + 1, side.labels) for side in (batch.query, batch.ref)]
        (x, labels), (r, ref_labels) = [(np.float32(rows), labels) for rows, labels in sides]
        batch = Batch(x, labels, *((None, None) if m is None else (r, ref_labels)))
        for owner, exact in [(True, m is None), (False, m is not None)]:
            check_hardest(batch, batch.hardest(owner, exact=exact), exact=True)


@pytest.mark.parametrize("scale", [1e15, 1e-15, 1e-20])
def test_magnitudes(scale: float) -> None:
    rng = np.random.default_rng(7)
    x = (scale * rng.standard_normal((70, 40))).astype(np.float32)
    labels = rng.integers(0, 4, 70)
    for distance in ("euclidean", "sqeuclidean", "dot"):
        if distance == "dot" and scale == 1e-20:
            continue  # products underflow in float32
        batch = Batch(x, labels, distance=distance)
        for owner in (True, False):
            check_hardest(batch, batch.hardest(owner))


def test_one_row_far_from_the_others() -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((70, 40)).astype(np.float32)
    x[11] *= 1e4
    for distance in ("euclidean", "dot"):
        batch = Batch(x, rng.integers(0, 4, 70), distance=distance)
        for owner in (True, False):
            check_hardest(batch, batch.hardest(owner))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19])
def test_rows_that_are_not_finite(bad: float) -> None:
    rng = np.random.default_rng(9)
    for m, owner in itertools.product((None, 33), (True, False)):
        x = rng.standard_normal((40, 12)).astype(np.float32)
        r = None if m is None else rng.standard_normal((m, 12)).astype(np.float32)
        (x if r is None else r)[7, 5] = bad
        labels = rng.integers(0, 3, 40)
        labels[-1] = 9
        ref_labels = rng.integers(0, 3, m or 40)
        batch = Batch(x, labels, r, ref_labels)
        out = batch.hardest(owner, triplet={"margin": 0.1})
        # NaN wherever there is a pair; the first candidate stands for all.
        first = first_candidates(batch)
        np.testing.assert_array_equal(out["index"], first)
        np.testing.assert_array_equal(np.isnan(out["distance"]), first >= 0)
        assert np.isnan(out["loss"]) and np.isnan(out["slope"]).all()


@pytest.mark.parametrize(("n", "m"), [(1, None), (3, 0)])
def test_rows_that_are_not_finite_without_a_pair(n: int, m: int | None) -> None:
    x, labels = np.full((n, 5), np.nan, np.float32), np.zeros(n, np.int64)
    side = (None, None) if m is None else (x[:0].copy(), labels[:0].copy())
    for keep, owner in itertools.product((True, False), (True, False) if m is None else (True,)):
        batch = Batch(x, labels, *side)
        rule = {"margin": 0.1, "keep": keep}
        out = batch.hardest(owner, triplet=rule)
        assert (out["index"] == -1).all() and (out["distance"] == 0).all()
        check_triplets(out, rule)


def first_candidates(batch: Batch) -> Array:
    """The lowest index of each kind, -1 without one."""
    same = batch.query.labels[:, None] == batch.ref.labels[None]
    own = np.eye(*same.shape, dtype=bool) & batch.alone
    kinds = [same & ~own, ~same]
    return np.stack([np.where(mask.any(1), mask.argmax(1), -1) for mask in kinds])


RULES = [
    {"margin": margin, "reduction": reduction, "smooth": smooth, "keep": keep}
    for margin, (reduction, (smooth, keep)) in zip(
        itertools.cycle([0.2, 1.5, 0.0]),
        itertools.product(
            ("mean", "mean_nonzero", "sum"),
            ((False, False), (False, True), (True, False), (True, True)),
        ),
        strict=False,
    )
]


@pytest.mark.parametrize("owner", [True, False])
def test_triplet_losses(owner: bool) -> None:
    rng = np.random.default_rng(10)
    x = rng.standard_normal((70, 6)).astype(np.float32)
    r = rng.standard_normal((40, 6)).astype(np.float32)
    labels = rng.integers(0, 12, 70)
    labels[labels == 11] = np.arange((labels == 11).sum()) + 100  # anchors without positives
    for index, rule in enumerate(RULES):
        alone = index % 2 == 0
        batch = Batch(x, labels, None if alone else r, labels[:40].copy())
        out = batch.hardest(owner, triplet=rule, seed=index)
        check_hardest(batch, out)
        check_triplets(out, rule)


@pytest.mark.parametrize("owner", [True, False])
def test_triplet_losses_without_triplets(owner: bool) -> None:
    rng = np.random.default_rng(11)
    x = rng.standard_normal((35, 6)).astype(np.float32)
    for classes in (1, 35):
        for rule in ({"margin": 0.3, "keep": True}, {"margin": 0.3}):
            batch = Batch(x, np.arange(35) % classes)
            out = batch.hardest(owner, triplet=rule)
            check_hardest(batch, out)
            check_triplets(out, rule)


def test_no_references() -> None:
    batch = problem(np.random.default_rng(12), 40, 12, 3, 0)
    out = batch.hardest(True, triplet={"margin": 0.3})
    check_hardest(batch, out)
    check_triplets(out, {"margin": 0.3})


@pytest.mark.parametrize("m", [None, 150])
def test_blocks_and_their_order_do_not_matter(m: int | None) -> None:
    n = 290
    x, r = (integers(np.random.default_rng(s), n, 10) for s in (13, 14))
    labels = np.random.default_rng(15).integers(0, 4, n)
    results = []
    for blocks, seed, limits in [(1, 0, A100), (2, 1, A100), (7, 2, A100), (None, 3, TURING)]:
        arch = "sm_75" if limits is TURING else "sm_90"
        side = (None, None) if m is None else (r[:m].copy(), labels[:m].copy())
        batch = Batch(x, labels, *side, arch=arch, limits=limits)
        results.append(batch.hardest(False, triplet={"margin": 1.0}, blocks=blocks, seed=seed))
    np.testing.assert_array_equal(results[0]["index"], lowest_hardest(batch))
    for name in ("index", "distance", "slope", "loss", "scale"):
        for other in results[1:]:
            np.testing.assert_array_equal(results[0][name], other[name])


def test_more_blocks_than_tiles() -> None:
    # A share may be empty.
    batch = problem(np.random.default_rng(16), 130, 9, 3)
    order = plan().fm_plan_hardest_shared(2, 130, 130, 9, 1, batch.limits)
    tiles = plan().fm_tile_count(order.row_tiles, order.col_tiles, order.ratio, 1)
    check_hardest(batch, batch.hardest(False, blocks=tiles + 3))
