# SPDX-License-Identifier: Apache-2.0
"""Triplet losses of awkward batches, in narrow dtypes, and given options that make no sense."""

import pytest
import torch

from flashmetric.functional import (
    lmnn_loss,
    triplet_margin_loss,
    triplet_quotient_loss,
    triplet_ratio_loss,
)
from flashmetric.losses import LMNNLoss, TripletMarginLoss, TripletQuotientLoss, TripletRatioLoss
from loop_triplets import FORMS, MINING, TYPES, batch

LOSSES = [
    *(TripletMarginLoss(mining=mining) for mining in MINING),
    *(TripletMarginLoss(mining="batch_all", type_of_triplets=kind) for kind in TYPES),
    *(TripletMarginLoss(mining="batch_all", **form) for form in FORMS),
    TripletMarginLoss.preset("tubui_scaled_anchor"),
    TripletMarginLoss.preset("pml"),
    TripletRatioLoss(),
    TripletRatioLoss(mining="semi_hard"),
    TripletQuotientLoss(),
    LMNNLoss(),
]
losses = pytest.mark.parametrize("loss", LOSSES, ids=repr)
DEGENERATE = {
    "no-rows": (0, 1),
    "one-row": (1, 1),
    "two-rows": (2, 1),
    "two-classes-of-one": (2, 2),
    "one-class": (6, 1),
    "all-distinct": (6, 6),
}


@losses
@pytest.mark.parametrize(("n", "classes"), DEGENERATE.values(), ids=DEGENERATE)
def test_without_any_triplet(loss: TripletMarginLoss, n: int, classes: int) -> None:
    x, labels = batch(n, classes=classes)
    value = loss(x, labels)
    value.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    if not isinstance(loss, LMNNLoss) or classes == n:
        assert value.item() == 0.0 and not x.grad.any()


@losses
@pytest.mark.parametrize("row", [0.0, 1.0])
def test_equal_rows_have_a_finite_gradient(loss: TripletMarginLoss, row: float) -> None:
    x = torch.full((6, 3), row, dtype=torch.float64, requires_grad=True)
    value = loss(x, torch.arange(6) % 2)
    value.backward()
    assert value.isfinite() and x.grad is not None and x.grad.isfinite().all()


@losses
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_show(loss: TripletMarginLoss, bad: float) -> None:
    x, labels = batch()
    x = x.detach().clone()
    x[7, 1] = bad
    x.requires_grad_()
    value = loss(x, labels)
    value.backward()
    assert value.isnan() and x.grad is not None and x.grad.isnan().any()


@losses
def test_gradcheck(loss: TripletMarginLoss) -> None:
    x, labels = batch(8, 3, seed=5)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (x,))


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_rows(loss: TripletMarginLoss, dtype: torch.dtype) -> None:
    x, labels = batch()
    x = x.detach().to(dtype).requires_grad_()
    exact = loss(x.double(), labels)
    value = loss(x, labels)
    value.backward()
    assert value.dtype == torch.float32 and x.grad is not None and x.grad.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


OPTIONS = [
    (triplet_margin_loss, {"mining": "hard"}, ValueError, "mining must be one of"),
    (triplet_margin_loss, {"hinge": 1}, TypeError, "hinge must be True or False"),
    (triplet_margin_loss, {"hinge": False, "smooth": True}, ValueError, "hinge must be True"),
    (
        triplet_margin_loss,
        {"hinge": False, "reduction": "mean_nonzero"},
        ValueError,
        "reduction must not be 'mean_nonzero' without hinge",
    ),
    (triplet_margin_loss, {"type_of_triplets": "hard"}, ValueError, "type_of_triplets must be 'a"),
    (
        triplet_margin_loss,
        {"type_of_triplets": "hard", "mining": "batch_all", "smooth": True},
        ValueError,
        "type_of_triplets must be 'all' except",
    ),
    (triplet_margin_loss, {"swap": True, "mining": "batch_all"}, ValueError, "swap must be False"),
    (triplet_margin_loss, {"exact": True, "mining": "semi_hard"}, ValueError, "exact must be Fal"),
    (triplet_margin_loss, {"max_positives": 0}, ValueError, "max_positives must be at least 1"),
    (triplet_margin_loss, {"max_positives": 1.0}, TypeError, "max_positives must be an integer"),
    (triplet_ratio_loss, {"const": "a"}, TypeError, "const must be a number"),
    (triplet_ratio_loss, {"reduction": "mean_nonzero"}, ValueError, "reduction must be one of"),
    (triplet_quotient_loss, {"margin": 0.0}, ValueError, "margin must be above 0"),
    (triplet_quotient_loss, {"distance": "dot"}, ValueError, "distance must never be negative"),
    (triplet_quotient_loss, {"mining": "batch_all"}, ValueError, "mining must be one of"),
    (lmnn_loss, {"n_neighbors": 0}, ValueError, "n_neighbors must be at least 1"),
    (lmnn_loss, {"n_neighbors": 1.5}, TypeError, "n_neighbors must be an integer"),
    (
        lmnn_loss,
        {"target_neighbors": torch.zeros(3, 1, dtype=torch.int64)},
        ValueError,
        r"target_neighbors must have shape \[13, k\]",
    ),
    (lmnn_loss, {"target_neighbors": [[1]]}, TypeError, "target_neighbors must be an int64"),
]


@pytest.mark.parametrize(("function", "options", "error", "message"), OPTIONS)
def test_option_errors(function, options: dict, error: type[Exception], message: str) -> None:
    x, labels = batch()
    with pytest.raises(error, match=message):
        function(x, labels, **options)
