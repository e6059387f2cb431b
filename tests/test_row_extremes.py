# SPDX-License-Identifier: Apache-2.0
"""Row statistics at their limits: overflow, cancellation, bounds from norms, NaN."""

import pytest
import torch

from flashmetric import functional as F
from flashmetric.ops.labels import IGNORED
from flashmetric.ops.row_lse import row_lse, row_lse_fallback
from flashmetric.ops.row_sum import row_sum, row_sum_fallback
from flashmetric.ops.threshold_sum import (
    threshold_sum,
    threshold_sum_backward,
    threshold_sum_backward_fallback,
    threshold_sum_fallback,
)
from row_batches import FORMULAS, THRESHOLD_FORMULAS

LABELS = torch.tensor([0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.009, 0.005])
def test_zero_rows_are_as_far_as_they_are(temperature):
    """All cosines are 0, whatever the temperature: three pairs of one class, three of the other."""
    x = torch.zeros(6, 4, requires_grad=True)
    loss = F.ntxent_loss(x, LABELS, temperature=temperature)
    loss.backward()
    torch.testing.assert_close(loss.item(), torch.tensor(4.0).log().item(), rtol=1e-5, atol=0)
    assert x.grad.isfinite().all()
    loss = F.sup_con_loss(x, LABELS, temperature=temperature)
    torch.testing.assert_close(loss.item(), torch.tensor(5.0).log().item(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [-110.0, 100.0])
def test_zero_queries(scale):
    r = torch.nn.functional.normalize(torch.randn(7, 4))
    one = torch.ones(2, 1)
    args = (torch.zeros(6, 4), LABELS, r, torch.arange(7) // 4, "equal", "cosine")
    args += ("affine", "affine", scale * one, 0 * one, None, 0.0, True)
    for ours, expected in zip(row_lse(*args), row_lse_fallback(*args), strict=True):
        torch.testing.assert_close(ours, expected)


def test_parameters_that_overflow_lose_no_pair():
    scale, offset = torch.full((2, 6), -1.0), torch.full((2, 6), 100.0)
    scale[1, 0], offset[1, 0] = -1e-30, -1e20
    args = (torch.randn(6, 3), LABELS, None, None, "equal", "sqeuclidean", "none", "hinge")
    args += (scale, offset, None, False, False)
    for ours, expected in zip(row_sum(*args)[:3], row_sum_fallback(*args)[:3], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01, 0.001])
def test_slopes_of_small_scales_keep_their_digits(scale):
    x, labels = torch.randn(400, 16) * 0.05, torch.arange(400) // 4
    one = torch.ones(2, 1)
    args = (x, labels, None, None, "equal", "sqeuclidean", "hinge", "hinge")
    args += (torch.tensor([[scale], [-scale]]), one, None, False, False)
    torch.testing.assert_close(row_sum(*args)[2], row_sum_fallback(*args)[2], rtol=5e-6, atol=1e-4)


def test_tiny_histograms_have_gradients():
    x = (torch.rand(6, 3) * 1e-24).requires_grad_()
    loss = F.contrastive_loss(x, LABELS, distance="chi2", reduction="sum")
    loss.backward()
    assert x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("formula", [name for name in FORMULAS if name != "none"])
@pytest.mark.parametrize("by_row", [False, True])
def test_what_is_not_a_number_has_no_slope_that_is(formula: str, by_row: bool) -> None:
    x = torch.randn(6, 3)
    scale, offset = torch.tensor([[1.0], [-1.0]]), torch.full((2, 6 if by_row else 1), torch.nan)
    if by_row:
        offset[:, :4] = 0.5
    args = (x, LABELS, None, None, "equal", "euclidean", formula, formula, scale, offset, None)
    for ours, expected in zip(row_sum(*args, True), row_sum_fallback(*args, True), strict=True):
        assert ours.isnan().equal(expected.isnan())
    sums, _, slopes, *_ = row_sum(*args, False)
    assert sums[:, 4:].isnan().all() and slopes[:, 4:].isnan().all()


@pytest.mark.parametrize("rows", [8, 1])
@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize("formula", THRESHOLD_FORMULAS)
def test_thresholds_that_are_nan(formula: str, k: int, rows: int) -> None:
    """Their sums are NaN and no others; their weights are 0, or spoil all gradients."""
    x, labels = torch.randn(8, 3), torch.tensor([0, 0, 0, 1, 1, 1, 1, IGNORED])
    t = torch.rand(rows, k + 3, dtype=torch.float64).mul_(3).sort(1).values
    nan = torch.zeros(k + 3, dtype=torch.bool)
    nan[[0, 2, -1]] = True
    batch = (x, labels, None, None, "equal", "euclidean", "negative", formula)
    for forward, backward in (
        (threshold_sum, threshold_sum_backward),
        (threshold_sum_fallback, threshold_sum_backward_fallback),
    ):
        holes = t.masked_fill(nan, torch.nan)
        sums, counts, slopes = forward(*batch, holes)
        without = forward(*batch, t[:, ~nan])
        for ours, theirs in zip((sums, counts, slopes), without, strict=True):
            torch.testing.assert_close(ours[:, ~nan], theirs, rtol=1e-5, atol=1e-5)
        assert sums[:7, nan].isnan().all() and slopes[:7, nan].isnan().all()
        assert not sums[7].any() and not slopes[7].any() and not counts[:, nan].any()
        grad = torch.randn(8, k + 3, dtype=torch.float64)
        (spoiled, _), grad = backward(grad, *batch, holes), grad.masked_fill(nan, 0)
        assert spoiled.isnan().all()
        (ours, _), (theirs, _) = (
            backward(grad, *batch, holes),
            backward(grad[:, ~nan].contiguous(), *batch, t[:, ~nan].contiguous()),
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("formula", THRESHOLD_FORMULAS)
@pytest.mark.parametrize("k", [1, 4, 16, 40])
def test_sums_below_thresholds_of_many_pairs_keep_their_digits(formula: str, k: int) -> None:
    # Distances and thresholds that float32 holds exactly: what is off is off by the summation.
    steps = torch.randint(1 << 15, 3 << 15, (8192, 1))
    r, x = steps / (1 << 16), torch.arange(4)[:, None] / 16
    batch = (torch.full((4,), -1), r, torch.arange(8192), "equal", "cityblock", "negative", formula)
    t = torch.linspace(0.6, 1.4, k, dtype=torch.float64).mul_(1 << 12).round_().div_(1 << 12)[None]
    sums, _, slopes = threshold_sum(x, *batch, t)
    labels, _, *rest = batch
    exact, _, exact_slopes = threshold_sum_fallback(x.double(), labels, r.double(), *rest, t)
    torch.testing.assert_close(sums, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes, exact_slopes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opposite_rows_are_at_pi_whatever_the_other_rows(dtype: torch.dtype) -> None:
    # Of length 1 to the bit; the others move the mean of the rows.
    x = torch.eye(16, dtype=dtype)
    others = torch.nn.functional.normalize(torch.randn(7, 16, dtype=dtype) + 1)
    labels, ref_labels = torch.arange(16), torch.arange(23)
    one = torch.ones(2, 1, dtype=dtype)
    args = (x, labels, torch.cat((-x, others)), ref_labels, "equal", "angular")
    for total in (row_sum, row_sum_fallback):
        sums, *_, grad, ref_grad = total(*args, "linear", "none", one, 0 * one, None, True)
        torch.testing.assert_close(sums[0], torch.full_like(sums[0], torch.pi))
        assert not grad.any() and not ref_grad.any()
