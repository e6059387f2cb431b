# SPDX-License-Identifier: Apache-2.0
"""row_sum and row_lse of the slab engine, run by the PTX interpreter, against loops over floats."""

from typing import Any

import numpy as np
import pytest
import torch

from cuda_rows import LOGITS, TERMS, Terms
from flashmetric.ops.distance import DISTANCES, is_difference
from flashmetric.ops.labels import RULES
from pair_kernels import DTYPES, decode
from row_oracle import LoopPairs, loop_row_lse, loop_row_sum
from select_kernels import as_torch
from slab_kernels import Operand
from slab_row_kernels import Role, RowSlabs, make_row_slabs

WIDE = ("float32", "float64")
# Rows of a batch of references, and dtypes.
CASES = [(None, "float32"), (7, "float64"), (None, "float64"), (7, "float32")]
SCALE, OFFSET = ((0.7,), (-0.6,)), ((-0.43,), (0.61,))
LOGIT = Terms("affine", "affine", ((0.9,), (-1.3,)), ((0.2,), (0.4,)))


def by_row(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Scales and offsets that differ from row to row, in sign, too."""
    return {
        "scale": np.float32(rng.uniform(-0.5, 1, (2, n))),
        "offset": np.float32(rng.standard_normal((2, n))),
    }


def bounds(rng: np.random.Generator, slabs: RowSlabs) -> np.ndarray:
    """About half of the pairs are kept; of one row all, of one none."""
    d = np.array(LoopPairs(*as_torch(slabs)).d)
    bound = np.float32(np.quantile(d, 0.5) * rng.uniform(0.8, 1.2, (2, len(d))) + 0.0137)
    bound[:, 0] = np.inf, -np.inf
    bound[:, 3] = -np.inf, np.inf
    return bound


def close(ours: np.ndarray, expected: torch.Tensor, dtype: str, rounded: bool = False) -> None:
    """Up to the rounding of distances, and (``rounded``) of the result to the rows' dtype."""
    exact = expected.numpy()
    tolerance = 1e-11 if dtype == "float64" else 3e-5
    if rounded:
        tolerance, ours = max(tolerance, 2 * DTYPES[dtype][2]), decode(ours, dtype)
    scale = np.abs(exact[np.isfinite(exact)]).max(initial=1e-3)
    np.testing.assert_allclose(ours, exact, rtol=tolerance, atol=tolerance * scale)


def torch_terms(terms: Terms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scale, offset and bound as the loops read them."""
    numbers = [torch.from_numpy(terms.array(name)).double() for name in ("scale", "offset")]
    bound = None if terms.bound is None else torch.from_numpy(terms.type(terms.bound)).double()
    return numbers[0], numbers[1], bound


def check_sum(slabs: RowSlabs, terms: Terms) -> None:
    """Statistics, gradients of the totals, and of a weighted sum."""
    dtype, terms = slabs.x.dtype, slabs.terms(terms)
    grad = np.random.default_rng(99).standard_normal((2, len(slabs.x.rows))).astype(np.float32)
    wanted = loop_row_sum(
        LoopPairs(*as_torch(slabs)), terms.names, *torch_terms(terms), torch.from_numpy(grad)
    )
    out = slabs.row_sum(terms)
    np.testing.assert_array_equal(out["counts"], wanted[1].numpy())
    close(out["sums"], wanted[0], dtype)
    close(out["slopes"], wanted[2], dtype)
    close(out["grad_query"], wanted[3], dtype)
    of_query, of_ref = slabs.row_sum_backward(terms, grad)
    close(of_query, wanted[5], dtype, rounded=True)
    if of_ref is not None:
        close(out["grad_ref"], wanted[4], dtype)
        close(of_ref, wanted[6], dtype, rounded=True)


def check_lse(slabs: RowSlabs, terms: Terms, *, columns: bool = False) -> None:
    """Statistics by row and (``columns``) by reference, and the gradient of both."""
    dtype, terms, rng = slabs.x.dtype, slabs.terms(terms), np.random.default_rng(98)
    n, m = slabs.parts
    grads = [rng.standard_normal((2, size)).astype(np.float32) for size in (n, m)]
    wanted = loop_row_lse(
        LoopPairs(*as_torch(slabs)),
        terms.names,
        *torch_terms(terms),
        float(terms.type(terms.shape)),
        torch.from_numpy(grads[0]),
        torch.from_numpy(grads[1]) if columns else None,
    )
    roles: list[Role] = []
    for of_refs in (False, True)[: 1 + columns]:
        out = slabs.row_lse(terms, of_refs=of_refs)
        for name, expected in zip(out, wanted[3 * of_refs :], strict=False):
            if name == "counts":
                np.testing.assert_array_equal(out[name], expected.numpy())
            else:
                close(out[name], expected, dtype)
        roles.append({"weight": grads[of_refs], "lse": out["lse"]})
    of_query, of_ref = slabs.row_lse_backward(terms, roles[0], roles[1] if columns else None)
    close(of_query, wanted[6], dtype, rounded=True)
    if of_ref is not None:
        close(of_ref, wanted[7], dtype, rounded=True)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_terms(distance: str, term: str) -> None:
    # Each dtype with each kind of batch occurs with every term and with every distance.
    at = DISTANCES.index(distance) + TERMS.index(term)
    other = TERMS[(TERMS.index(term) + 3) % len(TERMS)]
    rng = np.random.default_rng(at)
    m, dtype = CASES[at % 4]
    slabs = make_row_slabs(rng, distance, 9, m, 5, 5, dtype=dtype)
    check_sum(slabs, Terms(term, other, SCALE, OFFSET))


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_logits(distance: str, logit: str) -> None:
    at = DISTANCES.index(distance) + LOGITS.index(logit)
    other = LOGITS[(LOGITS.index(logit) + 1) % len(LOGITS)]
    rng = np.random.default_rng(at)
    terms = Terms(logit, other, LOGIT.scale, LOGIT.offset, shape=0.25)
    for m, dtype in ((None, WIDE[at % 2]), (7, WIDE[1 - at % 2])):
        slabs = make_row_slabs(rng, distance, 9, m, 5, 5, dtype=dtype)
        check_lse(slabs, terms, columns=m is not None)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine", "dot", "cityblock"])
def test_numbers_by_row(distance: str, bounded: bool) -> None:
    # In a self-batch the two rows of a pair then see different terms.
    rng = np.random.default_rng(1)
    for dtype in WIDE:
        for m in (None, 8):
            slabs = make_row_slabs(rng, distance, 9, m, 5, 4, dtype=dtype)
            more = by_row(rng, 9) | ({"bound": bounds(rng, slabs)} if bounded else {})
            check_sum(slabs, Terms("squared_hinge", "softplus", **more))
            check_lse(slabs, Terms("circle", "affine", **more, shape=0.5))


def test_bounds_count_pairs_of_kinds_that_are_not_wanted() -> None:
    rng = np.random.default_rng(2)
    slabs = make_row_slabs(rng, "euclidean", 9, None, 4, 9)
    check_sum(slabs, Terms("none", "none", bound=bounds(rng, slabs)))


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    rng = np.random.default_rng(3)
    for m in (None, 8):
        slabs = make_row_slabs(rng, "sqeuclidean", 9, m, 3, 9, rule=rule)
        check_sum(slabs, Terms("linear", "square", SCALE, OFFSET))
        check_lse(slabs, LOGIT, columns=m is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str) -> None:
    rng = np.random.default_rng(4)
    for distance in ("euclidean", "chi2"):
        for m in (None, 6):
            slabs = make_row_slabs(rng, distance, 8, m, 6, 8, dtype=dtype)
            check_sum(slabs, Terms("softplus", "squared_hinge", SCALE, OFFSET))
            check_lse(slabs, LOGIT, columns=m is not None)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("distance", [name for name in DISTANCES if is_difference(name)])
def test_near_pairs_of_both_kinds(distance: str, dtype: str) -> None:
    # Each gradient of the totals takes its own ones from one slab.
    rng = np.random.default_rng(5)
    rows = 1 + rng.integers(-8, 9, (7, 40)) / 1024
    if distance in ("cosine", "angular", "sqrt_cosine"):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[5] = 0
    operand = Operand(rows, np.arange(7) % 2, dtype)
    slabs = RowSlabs(operand, operand, "equal", distance, "both", 7)
    check_sum(slabs, Terms("linear", "exp", ((3.0,), (-2.0,)), OFFSET))
    check_lse(slabs, Terms("affine", "affine", ((9.0,), (-7.0,)), OFFSET))


@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, None, 3), (2, None, 1), (3, 1, 0), (3, 33, 270), (2, 300, 2)]
)
def test_sizes(n: int, m: int | None, d: int) -> None:
    rng = np.random.default_rng(n)
    slabs = make_row_slabs(rng, "sqeuclidean", n, m, d, max(n, m or 0))
    check_sum(slabs, Terms("softplus", "hinge", SCALE, OFFSET))
    check_lse(slabs, LOGIT, columns=m is not None)


@pytest.mark.parametrize("dtype", WIDE)
def test_more_pairs_than_threads_add_up_before_doubles(dtype: str) -> None:
    slabs = make_row_slabs(np.random.default_rng(9), "sqeuclidean", 1, 2300, 1, 1, dtype=dtype)
    terms, kinds = slabs.terms(Terms("softplus", "square", SCALE, OFFSET)), (0, 1)
    d, same = slabs.all_distances().astype(float), slabs.x.labels[:, None] == slabs.r.labels
    scale, offset = (terms.array(name).astype(float) for name in ("scale", "offset"))
    masks = [~np.isnan(d) & (same if kind == 0 else ~same) for kind in kinds]
    z = [np.where(masks[kind], scale[kind] * d + offset[kind], -np.inf) for kind in kinds]
    out = slabs.row_sum(terms, grad=False)
    sums = [np.logaddexp(0, z[0]).sum(1), np.where(masks[1], z[1] ** 2, 0).sum(1)]
    error = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(out["sums"], sums, rtol=error)
    np.testing.assert_array_equal(out["counts"][:2], [mask.sum(1) for mask in masks])
    lse = slabs.row_lse(Terms("affine", "affine", SCALE, OFFSET))["lse"]
    np.testing.assert_allclose(lse, [np.logaddexp.reduce(part, 1) for part in z], rtol=error)


def test_without_references() -> None:
    x = Operand(np.full((3, 4), np.nan), np.arange(3), "float32")
    r = Operand(np.zeros((0, 4)), np.arange(0), "float32")
    for slabs in (
        RowSlabs(x, r, "equal", "euclidean", "both", 3),
        RowSlabs(r, x, "equal", "euclidean", "both", 3),
    ):
        for ours in slabs.row_sum(Terms("exp", "linear")).values():
            assert (ours == 0).all()
        for of_refs in (False, True):
            out = slabs.row_lse(LOGIT, of_refs=of_refs)
            assert (out["lse"] == -np.inf).all() and (out["mean"] == 0).all()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 100.0])
def test_temperatures(temperature: float, dtype: str) -> None:
    # Logits that differ by more than the exponent of a number holds.
    rng = np.random.default_rng(6)
    slabs = make_row_slabs(rng, "cosine", 5, 300, 12, 5, dtype=dtype)
    for sign in (1, -1):
        scale = ((sign / temperature,), (-sign / temperature,))
        terms = slabs.terms(Terms("affine", "affine", scale, ((0.0,), (1.0,))))
        out = slabs.row_lse(terms)
        d = np.array(LoopPairs(*as_torch(slabs)).d)
        kinds = LoopPairs(*as_torch(slabs)).kind
        for kind in (0, 1):
            mask = np.array([[k == kind for k in row] for row in kinds])
            z = terms.array("scale")[kind].astype(float) * d + terms.array("offset")[kind]
            wanted = np.logaddexp.reduce(np.where(mask, z, -np.inf), 1)
            error = 1e-13 if dtype == "float64" else 3e-6
            np.testing.assert_allclose(
                out["lse"][kind], wanted, rtol=error, atol=error / temperature
            )


def test_logits_beyond_all_numbers() -> None:
    # The sum over them is that of no pairs; a row of them and others has the others'.
    x = Operand(np.array([[0.0]]), np.array([0]), "float32")
    r = Operand(np.array([[1e15], [1e16], [1.0]]), np.array([1, 1, 0]), "float32")
    slabs = RowSlabs(x, r, "equal", "euclidean", "both", 1)
    terms = Terms("affine", "affine", ((-1e30,), (-1e30,)), ((0.0,), (0.0,)))
    out = slabs.row_lse(terms)
    np.testing.assert_array_equal(out["lse"], np.float32([[-1e30], [-np.inf]]))
    np.testing.assert_array_equal(out["mean"], [[1], [0]])
    role = {"weight": np.ones((2, 1), np.float32), "lse": out["lse"]}
    of_query, of_ref = slabs.row_lse_backward(terms, role, None)
    np.testing.assert_array_equal(of_query, np.float32([[1e30]]))
    np.testing.assert_array_equal(of_ref, np.float32([[0], [0], [-1e30]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19])
def test_rows_that_are_not_finite(bad: float) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((12, 5))
    x[7, 3] = bad
    labels = np.arange(12) % 3
    labels[-1], labels[3] = 9, -(2**63)
    there = np.stack([np.arange(12) < 11, np.full(12, True)])
    there[:, 3] = False
    for distance in ("euclidean", "cityblock"):
        operand = Operand(x, labels, "float32")
        slabs = RowSlabs(operand, operand, "equal", distance, "both", 5)
        # Bounds that keep no pair: it is there all the same.
        bound = np.stack([np.full(12, np.inf), np.full(12, -np.inf)])
        for some in (None, bound):
            out = slabs.row_sum(Terms("softplus", "none", bound=some))
            np.testing.assert_array_equal(np.isnan(out["sums"]), there)
            np.testing.assert_array_equal(np.isnan(out["slopes"]), np.tile(there, (2, 1)))
            assert np.isnan(out["grad_query"]).all()
            lse = slabs.row_lse(Terms("affine", "none", bound=some))
            wanted = there * [[True], [False]]
            np.testing.assert_array_equal(np.isnan(lse["lse"]), wanted)
            np.testing.assert_array_equal(np.isnan(lse["mean"]), wanted)
            assert (lse["lse"][~wanted] == -np.inf).all() and (lse["mean"][~wanted] == 0).all()
        grad = np.ones((2, 12), np.float32)
        assert np.isnan(slabs.row_sum_backward(Terms(), grad)[0]).all()
        role = {"weight": grad, "lse": lse["lse"]}
        assert np.isnan(slabs.row_lse_backward(LOGIT, role, None)[0]).all()


def test_order_of_blocks_does_not_matter() -> None:
    rng = np.random.default_rng(8)
    slabs = make_row_slabs(rng, "euclidean", 4, 200, 3, 4)
    results = []
    for seed in (0, 5):
        slabs.seed = seed
        results.append([*slabs.row_sum(Terms()).values(), *slabs.row_lse(LOGIT).values()])
    for a, b in zip(*results, strict=True):
        assert a.tobytes() == b.tobytes()
