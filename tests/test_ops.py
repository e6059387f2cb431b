# SPDX-License-Identifier: Apache-2.0
"""The raw ops: registration, shapes, strides, errors, and native code against PyTorch code."""

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmetric import _library
from flashmetric.ops.hardest import hardest_fallback
from flashmetric.ops.hardest_triplets import (
    hardest_triplets_backward_fallback,
    hardest_triplets_fallback,
)
from flashmetric.ops.pair_distance import pair_distance_backward_fallback, pair_distance_fallback
from flashmetric.ops.row_sum import row_sum_backward_fallback, row_sum_fallback
from flashmetric.reference import pairwise_distance
from helpers import DISTANCES, DTYPES, make_labels, make_rows

OPS = torch.ops.flashmetric
FORMULAS = ["hinge", "squared_hinge"]
FALLBACKS = {
    "hardest": hardest_fallback,
    "hardest_triplets": hardest_triplets_fallback,
    "hardest_triplets_backward": hardest_triplets_backward_fallback,
    "pair_distance": pair_distance_fallback,
    "pair_distance_backward": pair_distance_backward_fallback,
    "row_sum": row_sum_fallback,
    "row_sum_backward": row_sum_backward_fallback,
}


def sides(
    n: int,
    m: int | None,
    d: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    strides: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x = make_rows(n, d, dtype, device=device, strides=strides).detach()
    labels = make_labels(n, device=device)
    if m is None:
        return x, labels, None, None
    r = make_rows(m, d, dtype, device=device, strides=strides).detach()
    return x, labels, r, make_labels(m, device=device)


def margin_terms(
    x: Tensor, formula: str, low: float, high: float
) -> tuple[str, str, Tensor, Tensor, None]:
    """Arguments of a row sum of f(d - low) over positives and of f(high - d) over negatives."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, offset = torch.tensor([[[1], [-1]], [[-low], [high]]], dtype=dtype, device=x.device)
    return formula, formula, scale, offset, None


def calls(
    n: int, m: int | None, d: int, distance: str = "euclidean", **options: Any
) -> list[tuple[str, tuple[Any, ...]]]:
    """One or two calls of every op on the same rows, with consistent arguments."""
    x, labels, r, ref_labels = sides(n, m, d, **options)
    rows = n if m is None else m
    result_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    listed = torch.randint(-1, rows, (2, n), device=x.device)
    query_index = torch.randint(-1, n, (11 if n and rows else 0,), device=x.device)
    ref_index = torch.randint(-1, max(rows, 1), query_index.shape, device=x.device)
    batch = (x, labels, r, ref_labels, distance)
    result: list[tuple[str, tuple[Any, ...]]] = [("hardest", batch), ("hardest", (*batch, True))]
    for qi, ri in ((None, listed), (query_index, ref_index)):
        values = pair_distance_fallback(x, r, qi, ri, distance)
        grad = torch.randn(ri.shape, dtype=result_dtype, device=x.device)
        result.append(("pair_distance", (x, r, qi, ri, distance)))
        for flags in ((), (False,)):
            args = (grad, x, r, qi, ri, values, distance, *flags)
            result.append(("pair_distance_backward", args))
    grad = torch.randn((2, n), dtype=result_dtype, device=x.device)
    pairs = (x, labels, r, ref_labels, "equal", distance)
    for formula in FORMULAS:
        terms = margin_terms(x, formula, 0.5, 3.0)
        for flags in ((True,), (True, False), (False,)):
            result.append(("row_sum", (*pairs, *terms, *flags)))
        for flags in ((), (False,)):
            result.append(("row_sum_backward", (grad, *pairs, *terms, *flags)))
    for reduction, smooth in itertools.product(("mean", "mean_nonzero", "sum"), (False, True)):
        for flags in ((False,), (True,), (False, True)):
            args = (*batch, 0.2, smooth, reduction, *flags)
            result.append(("hardest_triplets", args))
            _, *found, slope, scale = hardest_triplets_fallback(*args)
            grad = torch.randn((), dtype=result_dtype, device=x.device)
            for wanted in ((), (False,)):
                args = (grad, slope, scale, x, r, *found, distance, *wanted)
                result.append(("hardest_triplets_backward", args))
    return result


def run(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    outputs = getattr(OPS, name)(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run_fallback(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    outputs: Any = FALLBACKS[name](*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("distance", ["euclidean", "dot"])
def test_opcheck(m: int | None, distance: str, device: torch.device) -> None:
    for name, args in calls(7, m, 3, distance, device=device):
        torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, None), (7, 5), (0, None), (0, 3), (3, 0)], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(
    shape: tuple[int, int | None], dtype: torch.dtype
) -> None:
    for name, args in calls(*shape, 3, dtype=dtype):
        real = run(name, args)
        with FakeTensorMode() as mode:
            fake = run(
                name, tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
            )
        for expected, got in zip(real, fake, strict=True):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
            assert got.stride() == expected.stride(), name


@pytest.mark.parametrize("distance", DISTANCES)
def test_unwanted_reference_gradients_are_left_out(distance: str, device: torch.device) -> None:
    for name, args in calls(13, 9, 4, distance, dtype=torch.float64, device=device):
        if getattr(OPS, name).default._schema.arguments[len(args) - 1].name != "ref_grad":
            continue
        grad_query, grad_ref = run(name, args)[-2:]
        assert grad_ref.numel() == 0 and grad_ref.shape[-1] == 4
        assert grad_query.equal(run(name, (*args[:-1], True))[-2]), name


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(0, None), (0, 3), (3, 0), (0, 0), (1, None)], ids=str)
def test_empty_sides(shape: tuple[int, int | None], device: torch.device) -> None:
    for name, args in calls(*shape, 4, device=device):
        for output in run(name, args):
            assert output.isfinite().all(), name
            if name.startswith("hardest") and output.dtype == torch.int64:
                assert (output == -1).all()


@pytest.mark.usefixtures("poisoned_empty")
def test_no_features(device: torch.device) -> None:
    for name, args in calls(6, None, 0, device=device):
        for output in run(name, args):
            assert output.isfinite().all(), name


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("strides", ["contiguous", "columns", "slice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [None, 101])
@pytest.mark.parametrize("distance", DISTANCES)
def test_native_agrees_with_pytorch(
    distance: str, m: int | None, dtype: torch.dtype, strides: str, device: torch.device
) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    if dtype in (torch.float16, torch.bfloat16):
        tolerance = torch.finfo(dtype).eps
    for name, args in calls(97, m, 19, distance, dtype=dtype, device=device, strides=strides):
        got, expected = run(name, args), run_fallback(name, args)
        if name in ("hardest", "hardest_triplets"):
            # Rounding may order equal candidates differently: what counts is their distance.
            at = 0 if name == "hardest" else 1
            index, theirs = got[at], expected[at]
            assert index.shape == theirs.shape and ((index < 0) == (theirs < 0)).all()
            measured = pair_distance_fallback(args[0], args[2], None, index, distance)
            torch.testing.assert_close(got[at + 1], measured, rtol=1e-5, atol=1e-5)
            got, expected = got[:at] + got[at + 1 :], expected[:at] + expected[at + 1 :]
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype == theirs.dtype, name
            scale = theirs.abs().max().item() if theirs.numel() else 0
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("distance", DISTANCES)
def test_slabs_do_not_change_results(
    distance: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [run_fallback(name, args) for name, args in repeatable_calls(distance, device)]
    monkeypatch.setattr("flashmetric.ops.distance.SLAB_ELEMENTS", 100)
    for (name, args), expected in zip(repeatable_calls(distance, device), whole, strict=True):
        for ours, theirs in zip(run_fallback(name, args), expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)


def repeatable_calls(distance: str, device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    torch.manual_seed(1)
    return calls(43, 29, 5, distance, dtype=torch.float64, device=device)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bad", [-2, 5])
@pytest.mark.parametrize("side", ["query_index", "ref_index"])
def test_index_out_of_range(side: str, bad: int, backward: bool) -> None:
    x = torch.randn(5, 3)
    index = {name: torch.tensor([0, 1]) for name in ("query_index", "ref_index")}
    index[side] = torch.tensor([0, bad])
    pairs = (x, None, index["query_index"], index["ref_index"])
    with pytest.raises((IndexError, RuntimeError), match=side):
        if backward:
            OPS.pair_distance_backward(torch.ones(2), *pairs, torch.ones(2), "euclidean")
        else:
            OPS.pair_distance(*pairs, "euclidean")


def test_missing_pairs_do_not_touch_the_row_that_stands_in(device: torch.device) -> None:
    x = torch.randn(4, 3, device=device)
    x[0] = torch.nan
    i = torch.tensor([-1, 2, 1], device=device)
    j = torch.tensor([1, -1, 2], device=device)
    values = OPS.pair_distance(x, None, i, j, "euclidean")
    assert values[:2].tolist() == [0, 0] and values[2] > 0
    grad, _ = OPS.pair_distance_backward(torch.ones_like(values), x, None, i, j, values, "dot")
    assert grad.isfinite().all() and not grad[[0, 3]].any()


def test_counts(device: torch.device) -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]], device=device)
    labels = torch.tensor([0, 0, 1], device=device)
    pairs = (x, labels, None, None, "equal", "euclidean")
    sums, counts, *_ = OPS.row_sum(*pairs, *margin_terms(x, "hinge", 0.5, 2.5), False)
    assert sums.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    assert counts.tolist() == [[1, 1, 0], [1, 1, 2], [1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize("m", [None, 6])
def test_non_finite_rows_spoil_all_pairs(m: int | None, device: torch.device) -> None:
    x, labels, r, ref_labels = sides(8, m, 3, device=device)
    labels[:] = torch.arange(8) % 2
    (x if r is None else r)[2, 1] = torch.inf
    pairs = (x, labels, r, ref_labels, "equal", "sqeuclidean", *margin_terms(x, "hinge", 0.0, 1.0))
    sums, counts, _, grad_query, grad_ref = OPS.row_sum(*pairs, True)
    some = counts[:2] > 0
    assert sums[some].isnan().all() and not sums[~some].any()
    assert grad_query[some].isnan().all()
    grad_query, grad_ref = OPS.row_sum_backward(torch.ones_like(sums), *pairs)
    assert grad_query[some.any(0)].isnan().all()


@pytest.mark.parametrize("shape", [(1, None), (0, 3), (3, 0)], ids=str)
def test_non_finite_rows_without_a_pair_spoil_nothing(
    shape: tuple[int, int | None], device: torch.device
) -> None:
    x, labels, r, ref_labels = sides(*shape, 3, device=device)
    for rows in (x, r):
        if rows is not None:
            rows.fill_(torch.nan)
    batch = (x, labels, r, ref_labels, "euclidean")
    pairs = (*batch[:4], "equal", "euclidean", *margin_terms(x, "hinge", 0.0, 1.0))
    grad = x.new_ones((2, len(x)))
    for outputs in (
        OPS.hardest(*batch)[1:],
        OPS.hardest(*batch, True)[1:],
        OPS.hardest_triplets(*batch, 0.2, False, "mean", False)[0:1],
        OPS.row_sum(*pairs, True),
        OPS.row_sum_backward(grad, *pairs),
    ):
        assert not any(output.any() for output in outputs)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "sum"])
@pytest.mark.parametrize("ref_labels", [[0], [1], [0, 1]], ids=str)
def test_nan_distance_of_a_lone_pair_shows(
    ref_labels: list[int],
    reduction: str,
    smooth: bool,
    keep: bool,
    exact: bool,
    device: torch.device,
) -> None:
    x, r = torch.rand(1, 3, device=device), torch.rand(len(ref_labels), 3, device=device)
    r[0, 1] = torch.nan
    labels, classes = (torch.tensor(c, device=device) for c in ([0], ref_labels))
    options = ("euclidean", 0.5, smooth, reduction, keep, exact)
    loss, index, distance, slope, scale = OPS.hardest_triplets(x, labels, r, classes, *options)
    assert loss.isnan() and slope.isnan().all() and scale.isfinite()
    assert distance.isnan().equal(index >= 0)
    one = torch.ones_like(loss)
    saved = (slope, scale, x, r, index, distance)
    grads = OPS.hardest_triplets_backward(one, *saved, "euclidean")
    assert all(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.25, 1.5), (1.0, 0.5)])
@pytest.mark.parametrize("m", [None, 12])
def test_cosine_of_zero_rows(
    m: int | None, margins: tuple[float, float], device: torch.device
) -> None:
    x, labels, r, ref_labels = sides(14, m, 5, device=device)
    for rows in (x, r):
        if rows is not None:
            rows[::3] = 0
            torch.nn.functional.normalize(rows, out=rows)
    labels[:] = torch.arange(14) % 2
    batch = (x, labels, r, ref_labels, "equal", "cosine")
    refs, classes = (x, labels) if r is None else (r, ref_labels)
    d = pairwise_distance(x.double(), refs.double(), "cosine")
    same = labels[:, None] == classes
    pairs = same & ~torch.eye(14, dtype=torch.bool, device=device) if r is None else same, ~same
    violations = d - margins[0], margins[1] - d
    for power, formula in enumerate(FORMULAS, start=1):
        pairs_of = (*batch, *margin_terms(x, formula, *margins))
        sums, counts, _, *grads = OPS.row_sum(*pairs_of, True)
        both = OPS.row_sum_backward(torch.ones_like(sums), *pairs_of)
        for kind in range(2):
            expected = (violations[kind].relu() ** power * pairs[kind]).sum(1)
            torch.testing.assert_close(sums[kind].double(), expected, rtol=1e-5, atol=1e-5)
            # Of pairs of two unit rows the difference may be 0, which rounding makes positive.
            certain = ((violations[kind] > 1e-6) & pairs[kind]).sum(1)
            possible = ((violations[kind] > -1e-6) & pairs[kind]).sum(1)
            assert ((counts[2 + kind] >= certain) & (counts[2 + kind] <= possible)).all()
            assert not grads[0][kind, ::3].any() and grads[0][kind].isfinite().all()
            assert r is None or not grads[1][kind, ::3].any()
        assert not both[0][::3].any() and (r is None or not both[1][::3].any())


def test_instruction_set_is_the_one_asked_for() -> None:
    wanted = os.environ.get("FLASHMETRIC_CPU_ISA")
    if _library.backend != "native" or wanted not in ("generic", "avx2"):
        pytest.skip("FLASHMETRIC_CPU_ISA asks for no smaller instruction set")
    assert OPS._cpu_isa() == wanted
