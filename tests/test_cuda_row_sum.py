# SPDX-License-Identifier: Apache-2.0
"""row_sum of the tile engine and its gradients, in the PTX interpreter, against float64."""

from typing import Any

import numpy as np
import pytest

from cuda_batch import Batch
from cuda_plan import A100, TURING
from cuda_reference import IGNORED, encode, problem, swapped, unit
from cuda_row_reference import check_row_grad, check_row_sum
from cuda_rows import TERMS, Terms, row_grad, row_sum

DISTANCES = ["euclidean", "sqeuclidean", "cosine", "dot", "angular", "sqrt_cosine", "rbf"]
# With the number of label words.
RULES = [
    *(("equal", 2), ("equal", 3), ("any", 1), ("any", 2)),
    *((f"group:{p}{n}", 2) for p in "asd" for n in "asd"),
]
# Distances of random rows lie around these.
MIDDLE = {
    "euclidean": 1.4,
    "sqeuclidean": 2.0,
    "cosine": 1.0,
    "dot": 0.0,
    "angular": 1.6,
    "sqrt_cosine": 1.0,
    "rbf": 0.6,
}


def batch_of(distance: str, n: int, d: int, m: int | None = None, **where: Any) -> Batch:
    """Rows about as long as one another, of three classes."""
    return problem(np.random.default_rng(n + d), n, d, 3, m, distance=distance, **where)


def terms_of(batch: Batch, positive: str, negative: str, **more: Any) -> Terms:
    """Terms with z around 0 for the rows of ``batch``."""
    middle = MIDDLE[batch.distance]
    if batch.distance in ("euclidean", "sqeuclidean"):
        middle *= batch.d if batch.distance == "sqeuclidean" else np.sqrt(batch.d)
    scale = 4 / max(abs(middle), 1)
    options = {
        "scale": ((scale,), (-scale,)),
        "offset": ((-0.9 * scale * middle,), (1.05 * scale * middle,)),
    }
    return Terms(positive, negative, **(options | more))


def by_row(rng: np.random.Generator, terms: Terms, n: int) -> dict[str, Any]:
    """Scales and offsets that differ from row to row."""
    return {name: terms.array(name) * rng.uniform(0.7, 1.3, (2, n)) for name in ("scale", "offset")}


def check(batch: Batch, terms: Terms, **options: Any) -> None:
    """One launch."""
    check_row_sum(batch, terms, row_sum(batch, terms, **options))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_terms(distance: str, term: str) -> None:
    number = DISTANCES.index(distance) + TERMS.index(term)
    other = TERMS[(TERMS.index(term) + 3) % len(TERMS)]
    dtype = ["float32", "float16", "float32", "bfloat16"][number % 4]
    batch = batch_of(distance, 40, 24, 50 if number % 2 else None, dtype=dtype)
    check(batch, terms_of(batch, term, other))
    if number % 3 == 0:
        check(batch, terms_of(batch, other, term), grad=False)


@pytest.mark.parametrize(("rule", "words"), RULES)
def test_rules(rule: str, words: int) -> None:
    rng = np.random.default_rng(words)
    x = rng.standard_normal((70, 8)).astype(np.float32)
    top = 6 if rule == "any" else 3
    labels = rng.integers(0, top, (70, words))
    labels[[3, 40, 69], 0] = IGNORED
    for m in (None, 33):
        ref = (None, None) if m is None else (x[:m].copy(), labels[::-1][:m].copy())
        batch = Batch(x, labels, *ref, rule=rule)
        check(batch, terms_of(batch, "softplus", "hinge"), grad=m is None)
        terms = terms_of(batch, "linear", "square")
        role = {"weight": np.float32(rng.standard_normal((2, 70)))}
        check_row_grad(batch, terms, row_grad(batch, terms, own=role), own=role)


def test_labels_of_one_word_that_are_ignored() -> None:
    rng = np.random.default_rng(20)
    labels = rng.integers(0, 3, 70)
    labels[[0, 33, 69]] = IGNORED
    batch = Batch(rng.standard_normal((70, 8)).astype(np.float32), labels)
    out = row_sum(batch, terms_of(batch, "linear", "linear"))
    check_row_sum(batch, terms_of(batch, "linear", "linear"), out)
    assert (out["counts"][:, [0, 33, 69]] == 0).all() and (out["grad"][:, 33] == 0).all()


@pytest.mark.parametrize("distance", ["euclidean", "dot", "angular"])
@pytest.mark.parametrize("bounded", [False, True])
def test_numbers_by_row(distance: str, bounded: bool) -> None:
    # In a self-batch the two rows of a pair then see different terms.
    rng = np.random.default_rng(1)
    for m in (None, 66):
        batch = batch_of(distance, 70, 24, m)
        terms = terms_of(batch, "squared_hinge", "softplus")
        options = by_row(rng, terms, 70)
        if bounded:
            middle = -terms.array("offset") / terms.array("scale")
            options["bound"] = middle * rng.uniform(0.9, 1.1, (2, 70)) + 0.013
        terms = terms_of(batch, "squared_hinge", "softplus", **options)
        check(batch, terms)
        role = {"weight": np.float32(rng.standard_normal((2, 70)))}
        roles = {"own": role, "other": role if m is None else None}
        check_row_grad(batch, terms, row_grad(batch, terms, **roles), **roles)
        if m is not None:
            refs = swapped(batch)
            roles = {"own": None, "other": role}
            grad = row_grad(refs, terms, terms_of_refs=True, **roles)
            check_row_grad(refs, terms, grad, **roles)


@pytest.mark.parametrize("term", ["none", "hinge", "linear"])
def test_bounds(term: str) -> None:
    # Tiles of negatives beyond the bounds of all rows, and rows whose bounds keep nothing.
    rng = np.random.default_rng(2)
    x = 0.2 * rng.standard_normal((150, 20)) + 4 * np.eye(20)[np.arange(150) // 40]
    bound = np.stack([rng.uniform(0, 3, 150), rng.uniform(0, 3, 150)])
    bound[:, 5], bound[:, 6] = (np.inf, -np.inf), (-np.inf, np.inf)
    terms = Terms(term, term, scale=((2.0,), (-1.0,)), offset=((-1.0,), (2.5,)), bound=bound)
    # Without positives, too, which no tile is skipped for.
    for labels in (np.arange(150) % 7, np.arange(150)):
        batch = Batch(x.astype(np.float32), labels)
        check(batch, terms)
        check(batch, terms, grad=False)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "rbf"])
@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (-1, -1)])
def test_hinges_either_way(distance: str, signs: tuple[int, int]) -> None:
    # Skipping tiles is right for hinges that fall with the distance only.
    rng = np.random.default_rng(3)
    x = 0.1 * rng.standard_normal((200, 12)) + np.eye(12)[np.arange(200) // 50]
    labels = np.arange(200) // 50
    labels[[130, 131]] = 7, 0
    batch = Batch(x.astype(np.float32), labels, distance=distance)
    middle = {"euclidean": 0.9, "sqeuclidean": 0.9, "rbf": 0.5}[distance]
    terms = Terms(
        scale=((signs[0],), (signs[1],)),
        offset=((-signs[0] * middle,), (-signs[1] * middle,)),
    )
    check(batch, terms)
    check(batch, terms, grad=False)
    negatives_only = Terms("none", "squared_hinge", terms.scale, terms.offset)
    check(batch, negatives_only)


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "angular", "sqrt_cosine", "rbf"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_near_pairs_and_zero_rows(distance: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((60, 40))
    x[::4] = x[0] + 2.0**-9 * rng.integers(-1, 2, (15, 40))
    x = unit(x) if distance in ("cosine", "angular", "sqrt_cosine") else x / 6
    x[5] = x[45]
    x[9], x[34] = 0, 0
    rows, labels = encode(x, dtype), rng.integers(0, 3, 60)
    planes = 2 if dtype == "float32" else 1
    for m in (None, 40):
        side = (None, None) if m is None else (rows[-m:].copy(), labels[-m:].copy())
        batch = Batch(rows, labels, *side, planes=planes, distance=distance)
        terms = Terms("squared_hinge", "softplus", ((1.0,), (-2.0,)), ((0.1,), (0.3,)))
        check(batch, terms)
        check(batch, terms, grad=False)
        role = {"weight": np.float32(rng.standard_normal((2, 60)))}
        roles = {"own": role, "other": role if m is None else None}
        by_row_terms = Terms("linear", "exp", **by_row(rng, terms, 60))
        for some in (terms, by_row_terms):
            check_row_grad(batch, some, row_grad(batch, some, **roles), **roles)


SIZES = [
    (1, None, 1),
    (1, 1, 0),
    (2, None, 31),
    (3, 65, 64),
    (64, None, 130),
    (65, 127, 33),
    (129, None, 40),
    (63, 2, 257),
]


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_sizes(index: int) -> None:
    n, m, d = SIZES[index]
    arch, limits = [("sm_90", None), ("sm_80", A100), ("sm_75", TURING)][index % 3]
    where = {} if limits is None else {"arch": arch, "limits": limits}
    batch = problem(np.random.default_rng(index), n, d, 2, m, **where)
    terms = Terms("softplus", "squared_hinge", ((0.5,), (-0.5,)), ((-1.0,), (0.6 * np.sqrt(d),)))
    check(batch, terms)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19])
def test_rows_that_are_not_finite(bad: float) -> None:
    rng = np.random.default_rng(12)
    for m in (None, 33):
        x = rng.standard_normal((40, 12)).astype(np.float32)
        r = None if m is None else rng.standard_normal((m, 12)).astype(np.float32)
        (x if r is None else r)[7, 5] = bad
        labels, ref_labels = rng.integers(0, 3, (40, 2)), rng.integers(0, 3, (m or 40, 2))
        labels[-1] = 9  # without a positive
        labels[3, 0] = IGNORED
        for rule in ("equal", "group:sd"):
            batch = Batch(x, labels, r, None if m is None else ref_labels, rule=rule)
            # Bounds that keep no pair: it is there all the same.
            bound = np.stack([np.full(40, np.inf), np.full(40, -np.inf)])
            terms = Terms("softplus", "none", bound=bound)
            out = row_sum(batch, terms)
            there = row_sum(batch, Terms())["counts"][:2] > 0
            np.testing.assert_array_equal(np.isnan(out["sums"]), there)
            np.testing.assert_array_equal(np.isnan(out["slopes"]), np.tile(there, (2, 1)))
            assert np.isnan(out["grad"]).all()
            assert np.isnan(row_grad(batch, terms, own={})).all()


def test_without_any_pair() -> None:
    x, labels = np.full((3, 5), np.nan, np.float32), np.zeros(3, np.int64)
    for batch in (Batch(x[:1].copy(), labels[:1].copy()), Batch(x, labels, x[:0], labels[:0])):
        for name, ours in row_sum(batch, Terms("exp", "linear")).items():
            assert (ours == 0).all(), name


def test_order_of_blocks_does_not_matter() -> None:
    batch = batch_of("euclidean", 130, 140)
    terms = terms_of(batch, "softplus", "exp")
    results = [row_sum(batch, terms, seed=seed) for seed in (0, 1)]
    for name, ours in results[0].items():
        np.testing.assert_array_equal(ours, results[1][name])
