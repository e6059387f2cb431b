# SPDX-License-Identifier: Apache-2.0
"""Native threshold_sum, nearest_beyond and row_top_k of the CPU against their PyTorch versions."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flashmetric import _library
from flashmetric.ops.distance import exact_u, value
from flashmetric.ops.labels import IGNORED, pair_kinds
from flashmetric.ops.nearest_beyond import nearest_beyond, nearest_beyond_fallback
from flashmetric.ops.row_top_k import row_top_k, row_top_k_fallback
from flashmetric.ops.threshold_sum import (
    threshold_sum,
    threshold_sum_backward,
    threshold_sum_backward_fallback,
    threshold_sum_fallback,
)
from row_batches import (
    KINDS,
    ROW_DISTANCES,
    RULES,
    THRESHOLD_FORMULAS,
    Pairs,
    accumulated,
    make_batch,
)

pytestmark = pytest.mark.skipif(
    _library.backend != "native", reason="compares the native library with PyTorch code"
)

# Off the sizes of panels, blocks and row ranges; several blocks of columns, and of rows.
SHAPES = [(37, None, 5), (401, None, 7), (45, 631, 7), (613, 29, 6)]


def distances(batch: Pairs, rows: slice = slice(None)) -> Tensor:
    """Distances of some rows by exact differences, [rows, M] float64."""
    x, _, r, _, _, distance = batch
    r = x if r is None else r
    return torch.stack(
        [value(exact_u(row, r.double(), distance), distance) for row in x[rows].double()]
    )


def thresholds_of(batch: Pairs, k: int, *, rows: int | None = None, padding: int = 0) -> Tensor:
    """Ascending thresholds where the distances of the batch are, -inf in front."""
    d, n = distances(batch, slice(40)), len(batch[0]) if rows is None else rows
    low, high = d.quantile(0.02).item(), d.quantile(0.9).item()
    t = (low + (high - low) * torch.rand(n, k, dtype=torch.float64)).sort(1).values
    if k > 3:
        t[:, 2] = t[:, 1]
    for i in range(n):
        t[i, : i % (padding + 1)] = -torch.inf
    return t.to(accumulated(batch[0].dtype))


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    finite = theirs[theirs.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 0.0
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=tolerance,
        atol=tolerance * size,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def check_sums(
    batch: Pairs, kind: str, formula: str, thresholds: Tensor, tolerance: float = 1e-10
) -> None:
    """All outputs of both ops; but in float64 a few pairs may cross a threshold by rounding."""
    args = (*batch, kind, formula, thresholds)
    ours, theirs = threshold_sum(*args), threshold_sum_fallback(*args)
    close(ours[0], theirs[0], tolerance, "sums")
    if batch[0].dtype == torch.float64:
        assert torch.equal(ours[1], theirs[1])
        close(ours[2], theirs[2], tolerance, "slopes")
    else:
        assert ((ours[1] - theirs[1]).abs() <= 2).all()
        assert ((ours[2] - theirs[2]).abs() <= 2.1).all()
    grad = torch.randn(len(batch[0]), thresholds.shape[1], dtype=torch.float64)
    grad.masked_fill_(thresholds == -torch.inf, 0)
    gradients = threshold_sum_backward(grad, *args, True)
    expected_gradients = threshold_sum_backward_fallback(grad, *args, True)
    if batch[0].dtype != torch.float64:
        tolerance = max(tolerance, 5e-3)
    for mine, expected in zip(gradients, expected_gradients, strict=True):
        error = (mine.double() - expected.double()).norm()
        assert mine.dtype == expected.dtype and mine.shape == expected.shape
        assert error <= tolerance * expected.double().norm() + 1e-300
    only_query, of_ref = threshold_sum_backward(grad, *args, False)
    assert torch.equal(only_query, gradients[0]) and of_ref.numel() == 0


def check_picked(
    batch: Pairs,
    d: Tensor,
    kind: str,
    ours: Tensor,
    theirs: Tensor,
    limits: Tensor | None = None,
) -> None:
    """The same indices, but where distances, or a distance and a limit, are all but equal."""
    assert ours.dtype == torch.int64 and ours.shape == theirs.shape
    if not ours.numel() or not d.numel():
        assert torch.equal(ours, theirs)
        return
    labels = batch[1]
    mask = pair_kinds(labels, labels if batch[3] is None else batch[3], batch[4])[KINDS.index(kind)]
    assert mask.gather(1, ours.clamp(min=0))[ours >= 0].all()
    if batch[2] is None:
        assert (ours != torch.arange(len(ours))[:, None]).all()
    tolerance = (1e-12 if batch[0].dtype == torch.float64 else 1e-5) * d.abs().max()

    def of(index: Tensor) -> Tensor:
        return d.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1e30)

    excused = (of(ours) - of(theirs)).abs() <= tolerance
    if limits is not None:
        for index in (ours, theirs):
            excused |= (of(index) - limits).abs() <= tolerance
    assert excused.all()


def check_selections(batch: Pairs, counts: tuple[int, ...] = (1, 7, 40)) -> None:
    d = distances(batch)
    for kind in KINDS:
        for farthest in (False, True):
            for k in counts:
                limits = thresholds_of(batch, k, padding=1)[:, torch.randperm(k)]
                limits[::5, 0] = torch.inf
                args = (*batch, kind, farthest, limits)
                nearest = nearest_beyond(*args)
                check_picked(batch, d, kind, nearest, nearest_beyond_fallback(*args), limits)
                top = (*batch, kind, k, farthest)
                picked = row_top_k(*top)
                check_picked(batch, d, kind, picked, row_top_k_fallback(*top))
                for row in picked[:: max(len(picked) // 20, 1)].tolist():
                    some = [j for j in row if j >= 0]
                    assert len(set(some)) == len(some)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_distances(distance: str, shape: tuple[int, int | None, int]) -> None:
    batch = make_batch(*shape, distance)
    for kind in KINDS:
        check_sums(batch, kind, "hinge", thresholds_of(batch, 7, padding=2))
        check_sums(batch, kind, "hinge", thresholds_of(batch, 45, padding=2))
        check_sums(batch, kind, "squared_sigmoid", thresholds_of(batch, 2))
    check_selections(batch, (5, 23))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("formula", THRESHOLD_FORMULAS)
@pytest.mark.parametrize("k", [1, 7, 100, 300])
def test_numbers_of_thresholds(k: int, formula: str, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for m in (None, 110):
        batch = make_batch(101, m, 11, dtype=dtype, classes=9)
        check_sums(batch, "negative", formula, thresholds_of(batch, k, padding=k // 2), tolerance)
        check_sums(batch, "positive", formula, thresholds_of(batch, k, rows=1), tolerance)


@pytest.mark.parametrize("m", [None, 331])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, m: int | None) -> None:
    for classes in (3, 60):
        batch = make_batch(307, m, 6, rule=rule, classes=classes)
        for kind in KINDS:
            check_sums(batch, kind, "hinge", thresholds_of(batch, 33))
        check_selections(batch, (3,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 150])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_narrow_types(distance: str, m: int | None, dtype: torch.dtype) -> None:
    batch = make_batch(203, m, 40, distance, dtype=dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    check_sums(batch, "negative", "hinge", thresholds_of(batch, 60, padding=3), tolerance)
    check_sums(batch, "positive", "softplus", thresholds_of(batch, 3), tolerance)
    check_selections(batch, (9,))


@pytest.mark.parametrize("lists", [9, 100, 900])
def test_lists_that_are_cut_down_and_lists_that_are_never_full(lists: int) -> None:
    batch = make_batch(61, 1501, 9, dtype=torch.float32, classes=2)
    check_selections(batch, (lists,))


@pytest.mark.parametrize("m", [None, 640])
def test_ties_go_to_the_lowest_index(m: int | None) -> None:
    """Rows of small whole numbers with mean 0: all arithmetic is exact."""

    def rows(n: int) -> Tensor:
        half = torch.randint(-2, 3, (n // 2, 3)).float()
        return torch.cat((half, -half))

    x, r = rows(640), None if m is None else rows(m)
    labels = torch.randint(3, (640,))
    ref_labels = None if m is None else torch.randint(3, (m,))
    batch = x, labels, r, ref_labels, "equal", "euclidean"
    # Distances are roots of whole numbers: thresholds are exactly at distances.
    limits = torch.randint(0, 40, (640, 30)).float().sqrt().sort(1).values
    for kind in KINDS:
        for farthest in (False, True):
            for k in (1, 4, 9, 30):
                top = (*batch, kind, k, farthest)
                assert torch.equal(row_top_k(*top), row_top_k_fallback(*top))
                args = (*batch, kind, farthest, limits[:, :k].contiguous())
                assert torch.equal(nearest_beyond(*args), nearest_beyond_fallback(*args))
        check_sums(batch, kind, "hinge", limits, 1e-6)
        args = (*batch, kind, "hinge", limits)
        assert torch.equal(threshold_sum(*args)[1], threshold_sum_fallback(*args)[1])


def test_thresholds_between_the_numbers_of_the_rows() -> None:
    """Distances in float32 are compared with thresholds in float64 as they are."""
    x = torch.tensor([[0.0], [1.0], [2.0]])
    batch = x, torch.arange(3), None, None, "equal", "euclidean"
    below, above = 1 - 1e-12, 1 + 1e-12
    for k in (1, 64):
        for t, expected in ((below, [0, 0, 0]), (above, [1, 2, 1])):
            thresholds = torch.full((3, k), t, dtype=torch.float64)
            sums, counts, _ = threshold_sum(*batch, "negative", "hinge", thresholds)
            assert counts.T.tolist() == [expected] * k
            assert ((sums > -1e-15) & (sums < 1e-6)).all()


@pytest.mark.parametrize(
    "shape",
    [(0, None, 3), (1, None, 3), (2, None, 1), (5, None, 0), (0, 4, 3), (4, 0, 3), (1, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_tiny_batches(distance: str, shape: tuple[int, int | None, int]) -> None:
    batch = make_batch(*shape, distance, classes=2)
    n = shape[0]
    for k in (0, 1, 20):
        thresholds = torch.rand(n, k, dtype=torch.float64).sort(1).values
        for kind in KINDS:
            check_sums(batch, kind, "hinge", thresholds)
            check_sums(batch, kind, "softplus", thresholds)
            for farthest in (False, True):
                args = (*batch, kind, farthest)
                expected = nearest_beyond_fallback(*args, thresholds)
                assert torch.equal(nearest_beyond(*args, thresholds), expected)
                top = (*batch, kind, k, farthest)
                assert torch.equal(row_top_k(*top), row_top_k_fallback(*top))


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, 1e200])
@pytest.mark.parametrize("m", [None, 60])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_rows_not_finite(distance: str, m: int | None, spoil: float) -> None:
    batch = make_batch(50, m, 6, distance)
    x, labels, r, _, *_ = batch
    # A class that no other row has: no positives.
    labels[:3] = torch.tensor([IGNORED, 99, 1])
    (x if r is None else r)[9, 2] = spoil
    thresholds = torch.rand(50, 5, dtype=torch.float64).sort(1).values
    thresholds[:, 0] = -torch.inf
    grad = torch.ones_like(thresholds)
    for kind in KINDS:
        for formula in ("hinge", "softplus"):
            args = (*batch, kind, formula, thresholds)
            ours, theirs = threshold_sum(*args), threshold_sum_fallback(*args)
            assert torch.equal(ours[0].isnan(), theirs[0].isnan())
            assert torch.equal(ours[2].isnan(), theirs[2].isnan())
            for gradient in threshold_sum_backward(grad, *args, True):
                assert gradient.isnan().all()
        for farthest in (False, True):
            args = (*batch, kind, farthest, thresholds)
            assert torch.equal(nearest_beyond(*args), nearest_beyond_fallback(*args))
            top = (*batch, kind, 70, farthest)
            assert torch.equal(row_top_k(*top), row_top_k_fallback(*top))


def test_thresholds_that_are_not_numbers() -> None:
    """They are not allowed, but they must not do harm."""
    batch = make_batch(90, None, 6)
    thresholds = torch.randn(90, 40, dtype=torch.float64)
    thresholds[::2, ::3], thresholds[1::3, 5], thresholds[::7, -1] = torch.nan, torch.inf, torch.nan
    threshold_sum(*batch, "negative", "hinge", thresholds)
    threshold_sum_backward(torch.ones_like(thresholds), *batch, "negative", "hinge", thresholds)
    index = nearest_beyond(*batch, "negative", False, thresholds)
    assert (index[thresholds.isnan()] == -1).all()


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[2]))
import test_row_select_native
print(eval("test_row_select_native." + sys.argv[3]))
"""


def run(call: str, *, threads: int = 2, isa: str | None = None) -> str:
    """What a call of a function of this file prints in a process of its own."""
    environment = dict(os.environ)
    if isa is not None:
        environment["FLASHMETRIC_CPU_ISA"] = isa
    folder = os.path.dirname(__file__)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, str(threads), call],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout.strip()


def digest() -> str:
    """Bits of the results of batches that are large enough for threads."""
    torch.manual_seed(0)
    bits = hashlib.sha256()
    for n, m, distance, k, dtype in (
        (1201, None, "euclidean", 5, torch.float32),
        (1101, None, "sqrt_cosine", 50, torch.float32),
        (300, 2400, "sqeuclidean", 33, torch.float64),
        (901, None, "chi2", 9, torch.float32),
    ):
        batch = make_batch(n, m, 33, distance, dtype=dtype, classes=40)
        thresholds = thresholds_of(batch, k)
        grad = torch.randn(n, k, dtype=torch.float64)
        for formula in ("hinge", "softplus"):
            args = (*batch, "negative", formula, thresholds)
            for tensor in (*threshold_sum(*args), *threshold_sum_backward(grad, *args)):
                bits.update(tensor.numpy().tobytes())
        for farthest in (False, True):
            bits.update(nearest_beyond(*batch, "negative", farthest, thresholds).numpy().tobytes())
            bits.update(row_top_k(*batch, "negative", 3 * k, farthest).numpy().tobytes())
    return bits.hexdigest()


def test_thread_counts_agree() -> None:
    assert len({run("digest()", threads=threads) for threads in (1, 2, 3)}) == 1


def check_all() -> str:
    """A little of everything, for instruction sets that are not those of this processor."""
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        for distance in ("euclidean", "angular", "dot", "cityblock"):
            for m in (None, 131):
                batch = make_batch(103, m, 11, distance, dtype=dtype, classes=9)
                for k in (1, 7, 45):
                    thresholds = thresholds_of(batch, k, padding=2)
                    check_sums(batch, "negative", "hinge", thresholds, tolerance)
                check_sums(batch, "positive", "softplus", thresholds[:, -3:].clone(), tolerance)
                check_selections(batch, (1, 12, 45))
    for rule in ("any", "group:sd"):
        batch = make_batch(103, None, 6, rule=rule)
        check_sums(batch, "positive", "hinge", thresholds_of(batch, 30))
        check_selections(batch, (3,))
    return str(torch.ops.flashmetric._cpu_isa())


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_smaller_instruction_sets(isa: str) -> None:
    used = run("check_all()", isa=isa)
    assert used in ("generic", isa)
