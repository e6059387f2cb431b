# SPDX-License-Identifier: Apache-2.0
"""The ops on all pairs: registration, shapes, empty sides, slabs, native code, rows not finite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmetric import _library
from flashmetric.ops import RowLse, RowSum, RowTotal, ThresholdSum
from flashmetric.ops.nearest_beyond import nearest_beyond_fallback
from flashmetric.ops.pair_distance import pair_distance_fallback
from flashmetric.ops.row_lse import row_lse_backward_fallback, row_lse_fallback
from flashmetric.ops.row_sum import row_sum_backward_fallback, row_sum_fallback
from flashmetric.ops.row_top_k import row_top_k_fallback
from flashmetric.ops.threshold_sum import threshold_sum_backward_fallback, threshold_sum_fallback
from helpers import DTYPES
from row_batches import (
    KINDS,
    ROW_DISTANCES,
    RULES,
    THRESHOLD_FORMULAS,
    Pairs,
    accumulated,
    make_batch,
    make_parameters,
    make_thresholds,
)
from row_oracle import IGNORED, LoopPairs

OPS = torch.ops.flashmetric
FALLBACKS = {
    "nearest_beyond": nearest_beyond_fallback,
    "row_lse": row_lse_fallback,
    "row_lse_backward": row_lse_backward_fallback,
    "row_sum": row_sum_fallback,
    "row_sum_backward": row_sum_backward_fallback,
    "row_top_k": row_top_k_fallback,
    "threshold_sum": threshold_sum_fallback,
    "threshold_sum_backward": threshold_sum_backward_fallback,
}
SELECTIONS = ("nearest_beyond", "row_top_k")
Call = tuple[str, tuple[Any, ...]]


def calls(n: int, m: int | None, d: int, distance: str = "euclidean", **options: Any) -> list[Call]:
    """A few calls of every op on the same rows, with consistent arguments."""
    batch = make_batch(n, m, d, distance, **options)
    return sum_calls(batch) + lse_calls(batch) + threshold_calls(batch)


def sum_calls(batch: Pairs) -> list[Call]:
    x, result = batch[0], []
    grad = x.new_ones((2, len(x)), dtype=accumulated(x.dtype))
    for forms, by_row, bounded in (
        (("hinge", "softplus"), False, False),
        (("none", "square"), True, False),
        (("linear", "squared_hinge"), True, True),
    ):
        terms = (*forms, *make_parameters(batch, by_row=by_row, bounded=bounded))
        result += [("row_sum", (*batch, *terms, *f)) for f in ((True,), (True, False), (False,))]
        for flags in ((), (False,)):
            result.append(("row_sum_backward", (grad, *batch, *terms, *flags)))
    return result


def lse_calls(batch: Pairs) -> list[Call]:
    x, result = batch[0], []
    grad = x.new_ones((2, len(x)), dtype=accumulated(x.dtype))
    for forms, by_row in ((("affine", "circle"), False), (("affine", "affine"), True)):
        terms = (*forms, *make_parameters(batch, by_row=by_row, bounded=by_row), 0.3)
        columns = batch[2] is not None and not by_row
        args = (*batch, *terms, columns)
        result.append(("row_lse", args))
        lse, _, _, ref_lse, *_ = row_lse_fallback(*args)
        saved = (lse, torch.ones_like(ref_lse), ref_lse) if columns else (lse, None, None)
        for flags in ((), (False,)):
            result.append(("row_lse_backward", (grad, *saved, *batch, *terms, *flags)))
    return result


def threshold_calls(batch: Pairs) -> list[Call]:
    x, result = batch[0], []
    for kind, formula, t in (
        ("positive", "hinge", make_thresholds(batch, 3, padding=1)),
        ("negative", "squared_sigmoid", make_thresholds(batch, 2, rows=1)),
    ):
        result.append(("threshold_sum", (*batch, kind, formula, t)))
        grad = x.new_ones((len(x), t.shape[1]), dtype=torch.float64)
        for flags in ((), (False,)):
            args = (grad, *batch, kind, formula, t, *flags)
            result.append(("threshold_sum_backward", args))
    limits = make_thresholds(batch, 3, padding=1)
    for kind, farthest in (("positive", True), ("negative", False)):
        result.append(("nearest_beyond", (*batch, kind, farthest, limits)))
        result.append(("row_top_k", (*batch, kind, 4, farthest)))
    return result


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return as_tuple(getattr(OPS, name)(*args))


def run_fallback(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return as_tuple(FALLBACKS[name](*args))


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("distance", ["euclidean", "cityblock"])
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


@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_unwanted_reference_gradients_are_left_out(distance: str, device: torch.device) -> None:
    for name, args in calls(13, 9, 4, distance, device=device):
        if getattr(OPS, name).default._schema.arguments[len(args) - 1].name != "ref_grad":
            continue
        grad_query, grad_ref = run(name, args)[-2:]
        assert grad_ref.numel() == 0 and grad_ref.shape[-1] == 4
        assert grad_query.equal(run(name, (*args[:-1], True))[-2]), name


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("distance", ["euclidean", "cosine", "dot", "chi2"])
@pytest.mark.parametrize("shape", [(0, None), (0, 3), (3, 0), (0, 0), (1, None)], ids=str)
def test_empty_sides(shape: tuple[int, int | None], distance: str, device: torch.device) -> None:
    for name, args in calls(*shape, 4, distance, device=device):
        for output in run(name, args):
            if name in SELECTIONS:
                assert (output == -1).all(), name
            elif name == "row_lse":
                assert ((output == 0) | output.isneginf()).all()
            else:
                assert not output.any(), name


@pytest.mark.usefixtures("poisoned_empty")
def test_no_features(device: torch.device) -> None:
    for distance in ROW_DISTANCES:
        for name, args in calls(6, None, 0, distance, device=device):
            for output in run(name, args):
                assert not output.isnan().any(), name


@pytest.mark.usefixtures("poisoned_empty")
def test_ignored_rows_are_in_no_pair(device: torch.device) -> None:
    for rule in RULES:
        x, _, r, *_ = make_batch(8, 6, 4, device=device)
        shape = () if rule == "equal" else (2,)
        labels = torch.full((8, *shape), IGNORED, device=device)
        others = torch.ones((6, *shape), dtype=torch.int64, device=device)
        for batch in (
            (x, labels, r, others, rule, "euclidean"),
            (r, others, x, labels, rule, "euclidean"),
            (x, labels, None, None, rule, "euclidean"),
        ):
            for name, args in sum_calls(batch) + lse_calls(batch) + threshold_calls(batch):
                for output in run(name, args):
                    empty = -1 if name in SELECTIONS else 0
                    assert ((output == empty) | output.isneginf()).all(), (name, rule)


def check_same(name: str, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Outputs are those of the PyTorch implementation, up to rounding."""
    names = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    at = names.index("query")
    x, _, r, _, _, distance = args[at : at + 6]
    for ours, theirs in zip(outputs, run_fallback(name, args), strict=True):
        assert ours.dtype == theirs.dtype, name
        tolerance = 1e-9 if x.dtype == torch.float64 else 5e-4
        if name in SELECTIONS:
            # Rounding may order equal candidates differently: what counts is their distance.
            assert ((ours < 0) == (theirs < 0)).all(), name
            rows = torch.arange(len(x), device=x.device).repeat_interleave(ours.shape[1])
            ours, theirs = (
                pair_distance_fallback(x, r, rows, index.flatten(), distance)
                for index in (ours, theirs)
            )
        elif not ours.is_floating_point():
            # At a limit to the last bits, a pair may be counted or not.
            off = (ours - theirs).abs()
            assert not off.any() or (off.max() == 1 and off.sum() <= 2), name
            continue
        if theirs.dtype in (torch.float16, torch.bfloat16):
            tolerance = 2 * torch.finfo(theirs.dtype).eps
        finite = theirs[theirs.isfinite()].abs()
        size = finite.max().item() if finite.numel() else 0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * size, msg=name)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("m", [None, 331])
@pytest.mark.parametrize(
    "distance, dtype",
    [(distance, torch.float32) for distance in ROW_DISTANCES]
    + [(distance, dtype) for distance in ("euclidean", "chi2") for dtype in DTYPES[1:]],
    ids=str,
)
def test_native_agrees_with_pytorch(
    distance: str, dtype: torch.dtype, m: int | None, device: torch.device
) -> None:
    if _library.backend != "native":
        pytest.skip("there is no native library to compare")
    n = 301 if m is None else 97
    for name, args in calls(n, m, 9, distance, dtype=dtype, device=device, classes=29):
        check_same(name, args, run(name, args))


@pytest.mark.parametrize("rule", RULES)
def test_slabs_do_not_change_results(
    rule: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_all() -> list[tuple[str, tuple[Tensor, ...]]]:
        torch.manual_seed(1)
        results = []
        for distance in ("sqeuclidean", "angular", "dot", "cityblock"):
            for m in (None, 29):
                named = calls(43, m, 5, distance, rule=rule, device=device)
                results += [(name, run_fallback(name, args)) for name, args in named]
        return results

    whole = run_all()
    monkeypatch.setattr("flashmetric.ops.distance.SLAB_ELEMENTS", 100)
    for (name, expected), (_, outputs) in zip(whole, run_all(), strict=True):
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)


@pytest.fixture(params=["nan", "inf", "overflow"])
def spoil(request: pytest.FixtureRequest) -> float:
    return {"nan": math.nan, "inf": math.inf, "overflow": 1e19}[request.param]


def spoiled_batch(
    m: int | None, distance: str, device: torch.device, spoil: float
) -> tuple[Pairs, LoopPairs]:
    """One row is not finite; row 0 has no pair, and some rows have pairs of one kind only."""
    batch = make_batch(10, m, 4, distance, rule="group:dd", dtype=torch.float32, device=device)
    x, labels, r, ref_labels, *_ = batch
    labels[0] = IGNORED
    labels[1, 0] = 77
    if ref_labels is not None:
        ref_labels[:, 1] = 1
    loops = LoopPairs(*batch)
    (x if r is None else r)[6, 2] = spoil
    return batch, loops


@pytest.mark.parametrize("m", [None, 9])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_statistics_of_batches_that_are_not_finite(
    distance: str, m: int | None, spoil: float, device: torch.device
) -> None:
    batch, loops = spoiled_batch(m, distance, device, spoil)
    has = torch.stack([loops.has(kind) for kind in (0, 1)]).to(device)
    assert has.any(1).all() and not has.all(1).any()
    for by_row, bounded in ((False, False), (True, True)):
        parameters = make_parameters(batch, by_row=by_row, bounded=bounded)
        sums, _, slopes, *_ = OPS.row_sum(*batch, "linear", "hinge", *parameters, True)
        for output in (sums, slopes[:2], slopes[2:]):
            assert output.isnan().equal(has) and not output[~has].any()
        lse, mean, *_ = OPS.row_lse(*batch, "affine", "affine", *parameters, 0.0, False)
        assert lse.isnan().equal(has) and lse[~has].isneginf().all()
        assert mean.isnan().equal(has) and not mean[~has].any()
    if m is not None:
        columns = torch.tensor(
            [[kind in column for column in zip(*loops.kind, strict=True)] for kind in (0, 1)]
        ).to(device)
        parameters = make_parameters(batch, by_row=False)
        *_, lse, mean, _ = OPS.row_lse(*batch, "affine", "circle", *parameters, 0.2, True)
        assert lse.isnan().equal(columns) and lse[~columns].isneginf().all()
        assert mean.isnan().equal(columns) and not mean[~columns].any()
    for at, kind in enumerate(KINDS):
        t = make_thresholds(batch, 4, padding=2)
        shown = has[at, :, None] & (t > -math.inf)
        for formula in THRESHOLD_FORMULAS:
            sums, _, slopes = OPS.threshold_sum(*batch, kind, formula, t)
            for output in (sums, slopes):
                assert output.isnan().equal(shown) and not output[~shown].any()


@pytest.mark.parametrize("m", [None, 9])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_selections_in_batches_that_are_not_finite(
    distance: str, m: int | None, spoil: float, device: torch.device
) -> None:
    batch, loops = spoiled_batch(m, distance, device, spoil)
    t = make_thresholds(batch, 4, padding=2)
    for at, kind in enumerate(KINDS):
        found = [[j for _, j in loops.candidates(i, at)] for i in range(10)]
        first = [[row[0] if row else -1] * 4 for row in found]
        top = [(row + [-1] * 4)[:4] for row in found]
        for farthest in (False, True):
            assert OPS.nearest_beyond(*batch, kind, farthest, t).tolist() == first
            assert OPS.row_top_k(*batch, kind, 4, farthest).tolist() == top


@pytest.mark.parametrize("m", [None, 9])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_gradients_of_batches_that_are_not_finite(
    distance: str, m: int | None, spoil: float, device: torch.device
) -> None:
    (x, labels, r, ref_labels, *names), _ = spoiled_batch(m, distance, device, spoil)
    leaves = [x.requires_grad_()] + ([] if r is None else [r.requires_grad_()])
    pairs = (x, labels, r, ref_labels, *names)
    scale, offset, _ = make_parameters(pairs, by_row=False)
    thresholds = make_thresholds(pairs, 3)
    for values in (
        RowSum.apply(*pairs, "linear", "hinge", scale, offset, None)[0],
        RowTotal.apply(*pairs, "linear", "hinge", scale, offset, None, True, True)[0],
        RowLse.apply(*pairs, "affine", "affine", scale, offset, None, 0.0, m is not None)[0],
        ThresholdSum.apply(*pairs, "negative", "hinge", thresholds)[0],
    ):
        for grad in torch.autograd.grad(values.sum(), leaves):
            assert grad.isnan().all()


@pytest.mark.parametrize("shape", [(1, None), (0, 3), (3, 0)], ids=str)
def test_non_finite_rows_without_a_pair_spoil_nothing(
    shape: tuple[int, int | None], device: torch.device
) -> None:
    batch = make_batch(*shape, 3, dtype=torch.float32, device=device)
    for rows in (batch[0], batch[2]):
        if rows is not None:
            rows.fill_(torch.nan)
    for name, args in sum_calls(batch) + lse_calls(batch) + threshold_calls(batch):
        assert not any(output.isnan().any() for output in run(name, args)), name
