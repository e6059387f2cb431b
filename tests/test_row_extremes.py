# SPDX-License-Identifier: Apache-2.0
"""Row statistics where bounds from norms, overflow and cancellation meet their limits."""

import pytest
import torch

from flashmetric import functional as F
from flashmetric.ops.row_lse import row_lse, row_lse_fallback
from flashmetric.ops.row_sum import row_sum, row_sum_fallback

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
