# SPDX-License-Identifier: Apache-2.0
"""Native row_sum and row_lse of the CPU against their PyTorch implementations."""

import hashlib
import subprocess
import sys
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flashmetric import _library
from flashmetric.ops.distance import DISTANCES, has_unit_rows
from flashmetric.ops.labels import IGNORED
from flashmetric.ops.row_lse import (
    row_lse,
    row_lse_backward,
    row_lse_backward_fallback,
    row_lse_fallback,
)
from flashmetric.ops.row_sum import (
    row_sum,
    row_sum_backward,
    row_sum_backward_fallback,
    row_sum_fallback,
)

pytestmark = pytest.mark.skipif(
    _library.backend != "native", reason="compares the native library with PyTorch code"
)

FORMULAS = ["linear", "square", "hinge", "squared_hinge", "softplus", "exp", "squared_sigmoid"]
# Sizes off those of panels and blocks; the second has several blocks of rows.
SHAPES = [(37, None, 5), (301, None, 19), (45, 231, 17), (213, 29, 7)]


class Case(NamedTuple):
    """The arguments that all ops share, and the parameters of every row."""

    pairs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, str]
    scale: Tensor
    offset: Tensor
    bound: Tensor | None


def make_case(
    n: int,
    m: int | None,
    d: int,
    distance: str = "euclidean",
    *,
    rule: str = "equal",
    dtype: torch.dtype = torch.float64,
    per_row: bool = False,
    bounded: bool = False,
    classes: int = 7,
) -> Case:
    """Random rows, with duplicates and a zero row, and hinges that are active for some pairs."""

    def rows(count: int) -> Tensor:
        x = torch.randn(count, d, dtype=torch.float64)
        if distance == "chi2":
            x = x.abs()
        if has_unit_rows(distance):
            x = torch.nn.functional.normalize(x)
        if distance == "rbf":
            x = x / 3
        if count > 20:
            x[11], x[17:19] = x[3], x[4] * (1 + 1e-9)
        if count > 30:
            x[7] = 0
        return x.to(dtype)

    def labels(count: int) -> Tensor:
        if rule == "any":
            bits = 1 << torch.randint(62, (count, 2))
            words = bits * (torch.rand(count, 2) < 0.7) | (torch.rand(count, 2) < 0.1).long()
        else:
            words = torch.randint(classes, (count, 1 if rule == "equal" else 2)) - 3
        if rule == "equal":
            words = words.squeeze(1)
        words[torch.rand(count) < 0.05] = IGNORED
        return words

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, r = rows(n), None if m is None else rows(m)
    if r is not None and min(len(x), len(r)) > 20:
        r[12:20] = x[12:20] * (1 + 1e-9)  # pairs of near rows in blocks off the diagonal
    typical = {"dot": 0.0, "sqeuclidean": 2.0 * d, "chi2": 0.5 * d, "cityblock": 1.1 * d}
    middle = typical.get(distance, {"euclidean": (2.0 * d) ** 0.5, "angular": 1.5}.get(distance, 1))
    width = n if per_row else 1
    spread = torch.rand(2, width, dtype=acc) + 0.5
    scale = torch.tensor([[1.0], [-1.0]], dtype=acc) * spread / max(middle, 1)
    offset = -scale * middle * (0.8 + 0.4 * torch.rand(2, width, dtype=acc))
    bound = (middle * (0.9 + 0.2 * torch.rand(2, n))).to(acc) if bounded else None
    pairs = x, labels(n), r, None if m is None else labels(m), rule, distance
    return Case(pairs, scale, offset, bound)


def check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for place, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.dtype == expected.dtype and mine.shape == expected.shape
        finite = expected[expected.isfinite()].abs()
        size = finite.max().item() if finite.numel() and expected.is_floating_point() else 0.0
        torch.testing.assert_close(
            mine,
            expected,
            rtol=tolerance if expected.is_floating_point() else 0,
            atol=tolerance * size,
            equal_nan=True,
            msg=lambda text, place=place: f"output {place}: {text}",
        )


def check_sums(case: Case, formulas: tuple[str, str], tolerance: float) -> None:
    pairs, parameters = case.pairs, (case.scale, case.offset, case.bound)
    for with_grad in (False, True):
        args = (*pairs, *formulas, *parameters, with_grad)
        check(row_sum(*args), row_sum_fallback(*args), tolerance)
    grad = torch.randn(2, len(pairs[0]), dtype=case.scale.dtype)
    for ref_grad in (False, True):
        args = (grad, *pairs, *formulas, *parameters, ref_grad)
        check(row_sum_backward(*args), row_sum_backward_fallback(*args), tolerance)


def check_lses(case: Case, forms: tuple[str, str], tolerance: float, gain: float = 1.0) -> None:
    pairs, parameters = case.pairs, (case.scale * gain, case.offset * gain, case.bound)
    uniform = case.scale.shape[1] == 1 and case.bound is None
    for columns in {False, uniform and pairs[2] is not None}:
        args = (*pairs, *forms, *parameters, 0.25, columns)
        expected = row_lse_fallback(*args)
        check(row_lse(*args), expected, tolerance)
        lse, _, _, ref_lse, _, _ = expected
        grad = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
        ref_grad_lse = torch.randn_like(ref_lse).masked_fill(ref_lse == -torch.inf, 0)
        of_refs = (ref_grad_lse, ref_lse) if columns else (None, None)
        for ref_grad in (False, True):
            args = (grad, lse, *of_refs, *pairs, *forms, *parameters, 0.25, ref_grad)
            check(row_lse_backward(*args), row_lse_backward_fallback(*args), tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_sums(distance: str, shape: tuple[int, int | None, int]) -> None:
    case = make_case(*shape, distance)
    for positive, negative in zip(FORMULAS, FORMULAS[2:] + FORMULAS[:2], strict=True):
        check_sums(case, (positive, negative), 1e-10)
    check_sums(case, ("none", "hinge"), 1e-10)
    check_sums(case, ("squared_hinge", "none"), 1e-10)


@pytest.mark.parametrize("per_row, bounded", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("m", [None, 131])
@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_with_parameters_of_their_own(
    distance: str, m: int | None, per_row: bool, bounded: bool
) -> None:
    case = make_case(211, m, 9, distance, per_row=per_row, bounded=bounded)
    check_sums(case, ("hinge", "hinge"), 1e-10)
    check_sums(case, ("softplus", "squared_hinge"), 1e-10)
    check_lses(case, ("affine", "affine"), 1e-10)


@pytest.mark.parametrize("m", [None, 131])
@pytest.mark.parametrize(
    "rule", ["equal", "any", *(f"group:{p}{n}" for p, n in product("asd", "asd"))]
)
def test_rules(rule: str, m: int | None) -> None:
    for classes in (3, 60):
        case = make_case(157, m, 6, rule=rule, classes=classes)
        check_sums(case, ("hinge", "hinge"), 1e-10)
        check_lses(case, ("none", "affine"), 1e-10)


def test_labels_of_several_words() -> None:
    case = make_case(203, 150, 6, rule="group:aa", classes=4)
    *sides, _, distance = case.pairs
    check_sums(case._replace(pairs=(*sides, "equal", distance)), ("hinge", "hinge"), 1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_log_sum_exps(distance: str, shape: tuple[int, int | None, int]) -> None:
    case = make_case(*shape, distance)
    # With a large gain the exponentials span more than the type holds.
    for gain in (1.0, 50.0, 3000.0):
        check_lses(case, ("affine", "affine"), 1e-9, gain)
        check_lses(case, ("circle", "circle"), 1e-9, gain**0.5)
    check_lses(case, ("circle", "none"), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 150])
@pytest.mark.parametrize("distance", DISTANCES)
def test_narrow_types(distance: str, m: int | None, dtype: torch.dtype) -> None:
    case = make_case(203, m, 40, distance, dtype=dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    check_sums(case, ("linear", "softplus"), tolerance)
    check_sums(case, ("exp", "squared_sigmoid"), tolerance)
    check_lses(case, ("affine", "affine"), tolerance)
    # Rounding of large logits is amplified as much as they are large.
    check_lses(case, ("affine", "circle"), tolerance, 0.1 if distance == "dot" else 2.0)


@pytest.mark.parametrize(
    "shape",
    [(0, None, 3), (1, None, 3), (2, None, 1), (5, None, 0), (0, 4, 3), (4, 0, 3), (1, 1, 1)],
)
@pytest.mark.parametrize("distance", DISTANCES)
def test_tiny_batches(distance: str, shape: tuple[int, int | None, int]) -> None:
    for per_row, bounded in product((False, True), repeat=2):
        case = make_case(*shape, distance, per_row=per_row, bounded=bounded, classes=2)
        check_sums(case, ("hinge", "softplus"), 1e-10)
        check_lses(case, ("affine", "circle"), 1e-10)


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
@pytest.mark.parametrize("m", [None, 60])
@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_not_finite(distance: str, m: int | None, spoil: float) -> None:
    case = make_case(50, m, 6, distance)
    x, labels, r, ref_labels, *rest = case.pairs
    # A class that no other row has: no positives.
    labels[:3] = torch.tensor([IGNORED, 99, 1])
    (x if r is None else r)[9, 2] = spoil
    case = case._replace(pairs=(x, labels, r, ref_labels, *rest))
    parameters = (case.scale, case.offset, None)
    args = (*case.pairs, "hinge", "linear", *parameters, True)
    ours, theirs = row_sum(*args), row_sum_fallback(*args)
    check((ours[0], *ours[2:]), (theirs[0], *theirs[2:]), 1e-10)
    assert torch.equal(ours[1][:2], theirs[1][:2])
    args = (*case.pairs, "affine", "none", *parameters, 0.0, False)
    ours, theirs = row_lse(*args), row_lse_fallback(*args)
    check(ours[:2], theirs[:2], 1e-10)


@pytest.mark.parametrize("m", [None, 60])
@pytest.mark.parametrize("per_row", [False, True])
def test_logits_that_are_nan(per_row: bool, m: int | None) -> None:
    """Such as those of a learned temperature that training has spoilt."""
    case = make_case(50, m, 9, "cosine", per_row=per_row)
    case.scale[1, -1] = torch.nan
    args = (*case.pairs, "affine", "affine", case.scale, case.offset, None, 0.0, False)
    ours, theirs = row_lse(*args), row_lse_fallback(*args)
    check(ours[::2], theirs[::2], 1e-9)
    assert ours[0][1].isnan().sum() == (1 if per_row else (theirs[2][1] > 0).sum())


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("gain", [1.0, 1e3, 1e6])
def test_large_logits(gain: float, n: int) -> None:
    """The weight of an only pair is 1, however large its logit is: the errors of both cancel.

    Orthogonal rows are at one distance, so that one power serves many rows of such logits.
    """
    rows = torch.eye(n + 2) * 30.1
    x, r, labels, refs = rows[:n], rows[n:], torch.zeros(n).long(), torch.arange(2)
    scale, offset = torch.full((2, 1), -gain / 7), torch.full((2, 1), gain / 3)
    pairs = (x, labels, r, refs, "equal", "sqeuclidean")
    given = ("affine", "affine", scale, offset, None, 0.0)
    lse = row_lse(*pairs, *given, False)[0]
    grad = torch.ones_like(lse)
    of_x, _ = row_lse_backward(grad, lse, None, None, *pairs, *given, True)
    torch.testing.assert_close(of_x, scale[0] * 2 * (2 * x - r.sum(0)), rtol=1e-5, atol=0.0)


def test_collapsed_rows() -> None:
    """Every pair is near: all go by exact differences."""
    case = make_case(150, None, 30)
    x, *rest = case.pairs
    x = 100 + 1e-3 * x
    case = case._replace(pairs=(x, *rest), scale=case.scale * 1e3, offset=-case.scale * 8)
    check_sums(case, ("softplus", "hinge"), 1e-9)
    check_lses(case, ("affine", "affine"), 1e-9)
    narrow = x.float()
    args = (*rest, "linear", "linear", case.scale.float(), case.offset.float(), None, True)
    wide = row_sum_fallback(narrow.double(), *rest, "linear", "linear", *case[1:], True)
    check(row_sum(narrow, *args)[3:4], tuple(t.float() for t in wide[3:4]), 1e-5)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(int(sys.argv[1]))
from test_row_ops_native import digest
print(digest())
"""


def digest() -> str:
    """Bits of the results of several batches that are large enough for threads."""
    torch.manual_seed(0)
    bits = hashlib.sha256()
    for n, m, distance, per_row, dtype in (
        (1201, None, "euclidean", False, torch.float32),
        (1201, None, "cosine", True, torch.float32),
        (1100, 1400, "sqeuclidean", False, torch.float32),
        (901, None, "chi2", False, torch.float64),
    ):
        case = make_case(n, m, 33, distance, dtype=dtype, per_row=per_row, classes=40)
        pairs, parameters = case.pairs, (case.scale, case.offset, case.bound)
        grad = torch.randn(2, n, dtype=dtype)
        sums = row_sum(*pairs, "hinge", "softplus", *parameters, True)
        lses = row_lse(*pairs, "affine", "circle", *parameters, 0.5, False)
        back = (
            *row_sum_backward(grad, *pairs, "hinge", "softplus", *parameters),
            *row_lse_backward(
                grad, lses[0], None, None, *pairs, "affine", "circle", *parameters, 0.5
            ),
        )
        for tensor in (*sums, *lses, *back):
            bits.update(tensor.numpy().tobytes())
    return bits.hexdigest()


def test_thread_counts_agree() -> None:
    folder = __file__.rpartition("/")[0]
    results = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(threads), folder],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2, 3)
    }
    assert len(results) == 1
