# SPDX-License-Identifier: Apache-2.0
"""row_lse of the tile engine and its gradient, in the PTX interpreter, against float64."""

from typing import Any

import numpy as np
import pytest

from cuda_batch import Batch
from cuda_plan import A100, TURING
from cuda_reference import IGNORED, encode, problem, swapped, unit
from cuda_row_reference import check_row_grad, check_row_lse
from cuda_rows import LOGITS, Terms, row_grad, row_lse

DISTANCES = ["euclidean", "sqeuclidean", "cosine", "dot", "angular", "sqrt_cosine", "rbf"]
AFFINE = Terms("affine", "affine", ((3.0,), (-5.0,)), ((0.5,), (-1.0,)))


def roles_of(batch: Batch, terms: Terms, rng: np.random.Generator) -> dict[str, Any]:
    """Log-sum-exps of the rows, of the columns where those are other rows, and weights."""

    def role(side: Batch) -> dict[str, Any]:
        weight = rng.standard_normal((2, side.n)).astype(np.float32)
        return {"weight": weight, "lse": row_lse(side, terms)["lse"]}

    own = role(batch)
    return {"own": own, "other": own if batch.alone else role(swapped(batch))}


def check(batch: Batch, terms: Terms, *, grad: bool = True) -> None:
    """Log-sum-exps, and the gradient of rows and columns."""
    check_row_lse(batch, terms, row_lse(batch, terms))
    if not grad:
        return
    roles = roles_of(batch, terms, np.random.default_rng(batch.n))
    ours = row_grad(batch, terms, logits=True, **roles)
    check_row_grad(batch, terms, ours, logits=True, **roles)


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_logits(distance: str, logit: str) -> None:
    number = DISTANCES.index(distance) + LOGITS.index(logit)
    other = LOGITS[(LOGITS.index(logit) + 1) % len(LOGITS)]
    dtype = ["float32", "float16", "bfloat16"][number % 3]
    m = 50 if number % 2 else None
    batch = problem(np.random.default_rng(1), 40, 24, 3, m, distance=distance, dtype=dtype)
    check(batch, Terms(logit, other, ((2.0,), (-4.0,)), ((0.1,), (-0.3,)), shape=0.25))


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0, 100.0])
def test_temperatures(temperature: float) -> None:
    # Logits that differ by more than float's exponent holds, in either order of the columns.
    batch = problem(np.random.default_rng(2), 70, 33, 3, 150, distance="cosine")
    for sign in (1, -1):
        scale = ((sign / temperature,), (-sign / temperature,))
        check(batch, Terms("affine", "affine", scale, ((0.0,), (1.0,))))


def test_maxima_that_grow_from_tile_to_tile() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((10, 20))
    r = rng.standard_normal((300, 20)) * (1 + np.arange(300) // 64)[:, None]
    for order in (r, r[::-1]):
        rows = np.ascontiguousarray(order, np.float32)
        batch = Batch(x.astype(np.float32), np.arange(10) % 2, rows, np.arange(300) % 2)
        check(batch, AFFINE)


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "angular", "rbf"])
def test_near_pairs_and_zero_rows(distance: str) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((60, 40))
    x[::4] = x[0] + 2.0**-9 * rng.integers(-1, 2, (15, 40))
    x = unit(x) if distance in ("cosine", "angular") else x / 6
    x[5] = x[45]
    x[9], x[34] = 0, 0
    for dtype, planes in (("float32", 2), ("float16", 1)):
        labels = rng.integers(0, 3, 60)
        check(Batch(encode(x, dtype), labels, planes=planes, distance=distance), AFFINE)


def test_numbers_by_row_and_bounds() -> None:
    rng = np.random.default_rng(5)
    for m in (None, 66):
        batch = problem(rng, 70, 24, 3, m)
        terms = Terms(
            "affine",
            "circle",
            rng.uniform(-2, 2, (2, 70)),
            rng.uniform(-2, 2, (2, 70)),
            rng.uniform(5, 8, (2, 70)) if m is None else None,
            shape=0.5,
        )
        check_row_lse(batch, terms, row_lse(batch, terms))
        role = {
            "weight": rng.standard_normal((2, 70)).astype(np.float32),
            "lse": row_lse(batch, terms)["lse"],
        }
        roles: dict[str, Any] = {"own": role, "other": role if m is None else None}
        ours = row_grad(batch, terms, logits=True, **roles)
        check_row_grad(batch, terms, ours, logits=True, **roles)
        if m is not None:
            refs, roles = swapped(batch), {"own": None, "other": role}
            ours = row_grad(refs, terms, logits=True, terms_of_refs=True, **roles)
            check_row_grad(refs, terms, ours, logits=True, **roles)


@pytest.mark.parametrize("rule", ["any", "group:sd", "group:ds"])
def test_rules(rule: str) -> None:
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, (70, 2))
    labels[[3, 40], 0] = IGNORED
    x = rng.standard_normal((70, 8)).astype(np.float32)
    check(Batch(x, labels, rule=rule), AFFINE)
    check(Batch(x, labels, x[:33].copy(), labels[:33].copy(), rule=rule), AFFINE)


SIZES = [(1, None, 1), (1, 1, 0), (2, None, 31), (65, 127, 130), (129, None, 40), (63, 2, 257)]


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_sizes(index: int) -> None:
    n, m, d = SIZES[index]
    arch, limits = [("sm_90", None), ("sm_80", A100), ("sm_75", TURING)][index % 3]
    where = {} if limits is None else {"arch": arch, "limits": limits}
    check(problem(np.random.default_rng(index), n, d, 2, m, **where), AFFINE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19])
def test_rows_that_are_not_finite(bad: float) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((40, 12)).astype(np.float32)
    x[7, 5] = bad
    labels = rng.integers(0, 3, 40)
    labels[-1], labels[3] = 9, IGNORED
    batch = Batch(x, labels)
    there = np.stack([np.arange(40) < 39, np.full(40, True)])
    there[:, 3] = False
    for bound in (None, np.stack([np.full(40, np.inf), np.full(40, -np.inf)])):
        out = row_lse(batch, Terms("affine", "affine", bound=bound))
        np.testing.assert_array_equal(np.isnan(out["lse"]), there)
        np.testing.assert_array_equal(np.isnan(out["mean"]), there)
        assert (out["lse"][~there] == -np.inf).all() and (out["mean"][~there] == 0).all()
    out = row_lse(batch, Terms("affine", "none"))
    np.testing.assert_array_equal(np.isnan(out["lse"]), there * [[True], [False]])
    role = {"weight": np.ones((2, 40), np.float32), "lse": out["lse"]}
    assert np.isnan(row_grad(batch, AFFINE, own=role, logits=True)).all()


def test_order_of_blocks_does_not_matter() -> None:
    batch = problem(np.random.default_rng(8), 130, 40, 3)
    results = [row_lse(batch, AFFINE, seed=seed) for seed in (0, 1)]
    for name, ours in results[0].items():
        np.testing.assert_array_equal(ours, results[1][name])
