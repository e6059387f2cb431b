# SPDX-License-Identifier: Apache-2.0
"""The kernels for listed pairs, run by the PTX interpreter, against float64."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pair_kernels import (
    ALL_DISTANCES,
    DISTANCES,
    DTYPES,
    accumulate,
    decode,
    distance_number,
    encode,
    number,
    plan,
    result,
    run,
    unwritten,
)
from ptx_interpreter import Struct

SOURCE = "pair_distance.cu"


UNIT = ("cosine", "angular", "sqrt_cosine")


def is_flat(x: np.ndarray, r: np.ndarray, distance: str) -> bool:
    """Whether a zero row is at a constant distance."""
    return distance in UNIT and not (x.any() and r.any())


def pair_value(x: np.ndarray, r: np.ndarray, distance: str) -> float:
    """The distance of two rows."""
    if distance == "dot":
        return float(-(x @ r))
    if distance == "cityblock":
        return float(np.abs(x - r).sum())
    if distance == "chi2":
        total = np.where(x + r == 0, 1, x + r)
        return float(((x - r) ** 2 / total).sum())
    u = 2.0 if is_flat(x, r, distance) else float(((x - r) ** 2).sum())
    return {
        "euclidean": u**0.5,
        "sqeuclidean": u,
        "cosine": 0.5 * u,
        "angular": 2 * float(np.arcsin(min(0.5 * u**0.5, 1))),
        "sqrt_cosine": (0.5 * u) ** 0.5,
        "rbf": -float(np.expm1(-u)),
    }[distance]


def pair_gradient(x: np.ndarray, r: np.ndarray, distance: str) -> np.ndarray:
    """Derivative of the distance in x."""
    if distance == "dot":
        return -r
    if distance == "cityblock":
        return np.sign(x - r)
    if distance == "chi2":
        total = np.where(x + r == 0, 1, x + r)
        return (x - r) * (x + 3 * r) / total**2 * (x + r != 0)
    value = pair_value(x, r, distance)
    if value == 0 or is_flat(x, r, distance):
        return 0 * x
    slope = {
        "euclidean": 0.5 / value,
        "sqeuclidean": 1.0,
        "cosine": 0.5,
        "angular": 0.5 / np.sin(value),
        "sqrt_cosine": 0.25 / value,
        "rbf": 1 - value,
    }[distance]
    return 2 * slope * (x - r)


@dataclass
class Case:
    """Listed pairs of a query with references, or (``r`` None) with itself."""

    dtype: str
    distance: str
    x: np.ndarray
    r: np.ndarray | None
    j: np.ndarray
    i: np.ndarray | None = None
    raw_x: np.ndarray = field(init=False)
    raw_r: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Round the rows to their dtype."""
        self.raw_x = encode(self.x, self.dtype)
        self.raw_r = self.raw_x if self.r is None else encode(self.r, self.dtype)
        self.x = decode(self.raw_x, self.dtype)
        self.r = self.x if self.r is None else decode(self.raw_r, self.dtype)
        self.j = np.ascontiguousarray(self.j, np.int64)
        if self.i is not None:
            self.i = np.ascontiguousarray(self.i, np.int64)

    @property
    def alone(self) -> bool:
        """Whether query and references are one tensor."""
        return self.raw_r is self.raw_x

    def pairs(self) -> list[tuple[int, int]]:
        """Row numbers as they came."""
        n = len(self.raw_x)
        rows = np.arange(self.j.size) % max(n, 1) if self.i is None else self.i.ravel()
        return list(zip(rows.tolist(), self.j.ravel().tolist(), strict=True))

    def listed(self) -> Struct:
        """The structure ListedPairs."""
        (n, d), m = self.raw_x.shape, len(self.raw_r)
        sizes = [np.int64(n), np.int64(m), np.int64(d)]
        kind = [np.int32(DTYPES[self.dtype][0]), distance_number(self.distance)]
        index = [self.i, self.j, np.int64(self.j.size)]
        return Struct([self.raw_x, self.raw_r, *sizes, *index, *kind])

    def kernel(self, name: str) -> str:
        """Part of the kernel's symbol."""
        return f"{name}_kernelI{DTYPES[self.dtype][1]}E"

    def known(self, i: int, j: int) -> bool:
        """Whether both numbers name a row."""
        return 0 <= i < len(self.x) and 0 <= j < len(self.r)

    def distances(self) -> np.ndarray:
        """Expected distances, float64."""
        out = np.zeros(self.j.size)
        for t, (i, j) in enumerate(self.pairs()):
            if self.known(i, j):
                out[t] = pair_value(self.x[i], self.r[j], self.distance)
            elif i != -1 and j != -1:
                out[t] = np.nan
        return out

    def measure(self, seed: int = 0) -> np.ndarray:
        """The distances that the kernel finds."""
        out = unwritten(self.j.size, accumulate(self.dtype))
        grid = number("pair_distance_grid", self.j.size)
        arguments = Struct([self.listed(), out])
        run(SOURCE, self.kernel("pair_distance"), grid, number("pair_threads"), arguments, seed)
        return result(out)

    def gradients(self, grad: np.ndarray, two_sided: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Expected gradients, float64."""
        of_x = np.zeros_like(self.x)
        of_r = of_x if self.alone else np.zeros_like(self.r)
        for (i, j), g in zip(self.pairs(), grad.ravel(), strict=True):
            if self.known(i, j):
                of_x[i] += g * pair_gradient(self.x[i], self.r[j], self.distance)
                of_r[j] += g * pair_gradient(self.r[j], self.x[i], self.distance)
            elif i != -1 and j != -1:
                if 0 <= i < len(of_x):
                    of_x[i] = np.nan
                if 0 <= j < len(of_r):
                    of_r[j] = np.nan
        return of_x, None if self.alone or not two_sided else of_r

    def differentiate(
        self,
        grad: np.ndarray,
        *,
        two_sided: bool = True,
        is_sorted: bool | None = None,
        value: np.ndarray | None = None,
        factors: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The gradients that the kernel finds, as they are stored."""
        (n, d), m = self.raw_x.shape, len(self.raw_r)
        ref_rows = m if two_sided and not self.alone else 0
        planned, rows_per_block, *grid = plan("pair_gradient_plan", n + ref_rows, self.j.size, d)
        if is_sorted is not None and is_sorted != planned:
            # The plan of the other kind: by its number of pairs.
            some = 10**6 if is_sorted else 1
            planned, rows_per_block, *_ = plan("pair_gradient_plan", n + ref_rows, some, d)
            grid[0] = -(-(n + ref_rows) // rows_per_block)
        lists: list[Any] = []
        for index in (self.i, self.j):
            if not planned or index is None:
                lists.append([None, None])
                continue
            keys = index.ravel().astype(np.int32)
            order = np.argsort(keys, kind="stable").astype(np.int64)
            lists.append([keys[order], order])
        t = accumulate(self.dtype)
        scalars = [None, None] if factors is None else [np.array([f], t) for f in factors]
        out = unwritten((n, d), self.raw_x.dtype)
        out_ref = unwritten((ref_rows, d), self.raw_x.dtype) if ref_rows else None
        value = self.measure() if value is None else value.astype(t)
        arguments = Struct(
            [
                self.listed(),
                np.bool_(self.alone),
                np.bool_(ref_rows > 0),
                np.int32(rows_per_block),
                *lists,
                value,
                np.ascontiguousarray(grad, t),
                scalars,
                out,
                out_ref,
            ]
        )
        run(SOURCE, self.kernel("pair_gradient"), grid, number("pair_threads"), arguments, seed)
        return result(out), None if out_ref is None else result(out_ref)


def some_rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Rows with a duplicate and a zero row among them."""
    x = rng.standard_normal((n, d)) / d**0.5
    if n > 3:
        x[n // 2] = x[0]
        x[n - 1] = 0
    return x


def assert_near(ours: np.ndarray, exact: np.ndarray, dtype: str, scale: float = 1.0) -> None:
    """Equal but for rounding; NaN where NaN is expected."""
    error = 4 * DTYPES[dtype][2] + (1e-5 if dtype != "float64" else 1e-13)
    np.testing.assert_allclose(decode(ours, dtype), exact, rtol=error, atol=error * scale)


def assert_gradients(case: Case, grad: np.ndarray, **options: Any) -> None:
    """The kernel's gradients are those of float64."""
    ours = case.differentiate(grad, **options)
    factor = np.prod(options.get("factors", (1.0, 1.0)))
    exact = case.gradients(grad.astype(accumulate(case.dtype)) * factor, ours[1] is not None)
    for a, b in zip(ours, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, case.dtype, scale=max(1.0, float(np.nanmax(np.abs(b), initial=0))))


def rows_for(distance: str, x: np.ndarray) -> np.ndarray:
    """Rows such as a distance is for."""
    if distance in ("angular", "sqrt_cosine"):
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        return x / np.where(norm == 0, 1, norm)
    return {"rbf": x / 8, "chi2": np.abs(x)}.get(distance, x)


@pytest.mark.parametrize("distance", ALL_DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_distance(dtype: str, distance: str) -> None:
    rng = np.random.default_rng(1)
    x, r = (rows_for(distance, some_rows(rng, n, 37)) for n in (9, 7))
    r[2] = x[4]
    i, j = rng.integers(-1, 9, 41), rng.integers(-1, 7, 41)
    i[:4], j[:4] = (4, 8, 3, -1), (2, 6, -1, -1)
    case = Case(dtype, distance, x, r, j, i)
    out = case.measure()
    np.testing.assert_allclose(out, case.distances(), rtol=2e-6, atol=1e-6)
    if distance != "dot":
        assert out[0] == 0  # an exact duplicate


@pytest.mark.parametrize("d", [0, 1, 31, 32, 33, 300])
def test_pair_distance_columns(d: int) -> None:
    rng = np.random.default_rng(2)
    case = Case(
        "float32", "euclidean", rng.standard_normal((5, d)), None, rng.integers(0, 5, (2, 5))
    )
    np.testing.assert_allclose(case.measure(), case.distances(), rtol=1e-6)


def test_numbers_that_name_no_row_are_nan() -> None:
    rng = np.random.default_rng(3)
    i = np.array([0, 0, 5, -2, 1, 2, 1 << 40])
    j = np.array([1, 4, 1, 1, -1, (1 << 32) + 1, 3])
    case = Case(
        "float32", "sqeuclidean", rng.standard_normal((5, 6)), rng.standard_normal((4, 6)), j, i
    )
    np.testing.assert_allclose(case.measure(), case.distances(), rtol=1e-6)
    for is_sorted in (False, True):
        assert_gradients(case, np.ones(7), is_sorted=is_sorted)


@pytest.mark.parametrize("is_sorted", [False, True], ids=["scanned", "sorted"])
@pytest.mark.parametrize("distance", ALL_DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_listed_pairs(dtype: str, distance: str, is_sorted: bool) -> None:
    rng = np.random.default_rng(4)
    x, r = (rows_for(distance, some_rows(rng, n, 37)) for n in (11, 7))
    i, j = rng.integers(-1, 11, 50), rng.integers(-1, 7, 50)
    i[0], j[0] = 10, 6  # two zero rows
    case = Case(dtype, distance, x, r, j, i)
    assert_gradients(case, rng.standard_normal(50), is_sorted=is_sorted)


@pytest.mark.parametrize("is_sorted", [False, True], ids=["scanned", "sorted"])
@pytest.mark.parametrize("alone", [False, True], ids=["ref", "self"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_triplets(dtype: str, alone: bool, is_sorted: bool) -> None:
    rng = np.random.default_rng(5)
    x, r = some_rows(rng, 19, 33), None if alone else some_rows(rng, 13, 33)
    j = rng.integers(-1, 19 if alone else 13, (2, 19))
    case = Case(dtype, "euclidean", x, r, j)
    slope = rng.standard_normal((2, 19))
    assert_gradients(case, slope, is_sorted=is_sorted, factors=(0.5, 1 / 16))
    if not alone:
        assert_gradients(case, slope, is_sorted=is_sorted, two_sided=False)


@pytest.mark.parametrize("is_sorted", [False, True], ids=["scanned", "sorted"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_of_a_row_in_most_pairs(dtype: str, is_sorted: bool) -> None:
    # Whole numbers, so that any order gives the same sum and equality is exact.
    rng = np.random.default_rng(6)
    n, count = 21, 700
    x = rng.integers(-3, 4, (n, 9)).astype(float)
    j = np.where(rng.random(count) < 0.7, 3, rng.integers(-1, n, count))
    i = np.where(rng.random(count) < 0.3, 5, rng.integers(-1, n, count))
    case = Case(dtype, "sqeuclidean", x, None, j, i)
    grad = rng.integers(-2, 3, count).astype(float)
    ours, _ = case.differentiate(grad, is_sorted=is_sorted)
    np.testing.assert_array_equal(ours, case.gradients(grad, False)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 256, 257])
def test_gradient_in_parts_of_columns(dtype: str, d: int) -> None:
    rng = np.random.default_rng(7)
    case = Case(dtype, "cosine", some_rows(rng, 5, d), None, rng.integers(-1, 5, (2, 5)))
    assert_gradients(case, rng.standard_normal((2, 5)))


@pytest.mark.parametrize("is_sorted", [False, True], ids=["scanned", "sorted"])
def test_nan_distance_gives_nan_gradient(is_sorted: bool) -> None:
    rng = np.random.default_rng(8)
    for distance in DISTANCES:
        case = Case(
            "float32", distance, rng.standard_normal((4, 3)), None, np.array([[1, -1, -1, 0]])
        )
        value = np.array([1.0, 0.0, 0.0, np.nan])
        ours, _ = case.differentiate(np.ones((1, 4)), value=value, is_sorted=is_sorted)
        assert np.isnan(ours[[0, 3]]).all()
        np.testing.assert_array_equal(ours[2], 0)


def test_no_pairs_give_zeros() -> None:
    rng = np.random.default_rng(9)
    case = Case("float16", "dot", rng.standard_normal((3, 5)), None, np.full((2, 3), -1))
    ours, _ = case.differentiate(np.ones((2, 3)))
    np.testing.assert_array_equal(ours, 0)


@pytest.mark.parametrize("is_sorted", [False, True], ids=["scanned", "sorted"])
def test_order_of_threads_does_not_matter(is_sorted: bool) -> None:
    rng = np.random.default_rng(10)
    j = np.where(rng.random((2, 150)) < 0.5, 0, rng.integers(-1, 150, (2, 150)))
    case = Case("float32", "euclidean", rng.standard_normal((150, 5)), None, j)
    grad = rng.standard_normal((2, 150))
    value = case.measure()
    first, _ = case.differentiate(grad, value=value, is_sorted=is_sorted)
    second, _ = case.differentiate(grad, value=value, is_sorted=is_sorted, seed=1)
    np.testing.assert_array_equal(first, second)


def test_plan() -> None:
    assert plan("pair_gradient_plan", 256, 512, 128) == [0, 1, 256, 1]
    assert plan("pair_gradient_plan", 2048, 4096, 512) == [0, 1, 2048, 2]
    assert plan("pair_gradient_plan", 4096, 8192, 512) == [1, 8, 512, 2]
    assert plan("pair_gradient_plan", 1 << 20, 100, 64) == [1, 8, 1 << 17, 1]
