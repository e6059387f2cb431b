# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmetric import functional, reference
from flashmetric.functional import contrastive_loss
from helpers import (
    DISTANCES,
    DTYPES,
    REF_SHAPES,
    SHAPES,
    check_unwanted_gradients,
    compare,
    make_indices,
    make_labels,
    make_refs,
    make_rows,
    rows_with_overflowing_distances,
)

REDUCTIONS = ["mean", "mean_separate", "mean_nonzero", "sum", "none"]
# Margins at which both kinds of pairs are partly active for normally distributed rows.
MARGINS = {
    "euclidean": {"pos_margin": 2.0, "neg_margin": 5.0},
    "sqeuclidean": {"pos_margin": 8.0, "neg_margin": 20.0},
    "cosine": {"pos_margin": 0.3, "neg_margin": 1.1},
    "dot": {"pos_margin": -1.0, "neg_margin": 2.0},
}
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(*args: object, distance: str = "euclidean", **options: object) -> None:
    options = {**MARGINS[distance], "distance": distance, **options}
    compare(functional.contrastive_loss, reference.contrastive_loss, *args, **options)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], distance: str, device: torch.device) -> None:
    x = make_rows(*shape, torch.float32, device=device)
    check(x, make_labels(shape[0], device=device), distance=distance, reduction="mean")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", REF_SHAPES, ids=str)
def test_references(shape: tuple[int, int, int], distance: str, device: torch.device) -> None:
    n, m, d = shape
    for reduction in ("mean_separate", "none"):
        check(
            make_rows(n, d, device=device),
            make_labels(n, device=device),
            **make_refs(m, d, device=device),
            distance=distance,
            reduction=reduction,
        )


@pytest.mark.parametrize("strides", ["contiguous", "columns", "slice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_strides(dtype: torch.dtype, strides: str, device: torch.device) -> None:
    x = make_rows(53, 24, dtype, device=device, strides=strides)
    labels = make_labels(53, device=device)
    refs = make_refs(31, 24, dtype, device=device, strides=strides)
    check(x, labels, reduction="mean")
    check(x, labels, **refs, distance="cosine", reduction="none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("distance", DISTANCES)
def test_options(distance: str, power: int, reduction: str, device: torch.device) -> None:
    x, labels = make_rows(41, 11, device=device), make_labels(41, 5, device=device)
    for normalize in (False, True):
        check(
            x,
            labels,
            distance=distance,
            power=power,
            reduction=reduction,
            scale=0.7,
            normalize=normalize,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("length", [3, 4])
def test_indices_tuple(length: int, with_ref: bool, reduction: str, device: torch.device) -> None:
    x = make_rows(20, 6, device=device)
    r = make_rows(30, 6, device=device) if with_ref else None
    m = 30 if with_ref else 20
    indices = make_indices(length, (12, 12) if length == 3 else (5, 9), 20, m, device)
    for power, distance in itertools.product((1, 2), DISTANCES):
        check(
            x,
            indices_tuple=indices,
            ref_emb=r,
            reduction=reduction,
            power=power,
            distance=distance,
        )


def test_one_positive_and_one_negative_pair_count(device: torch.device) -> None:
    x = torch.tensor([[0.0], [0.5], [0.75]], device=device)
    pairs = tuple(torch.tensor([i], device=device) for i in (0, 1, 0, 2))
    assert contrastive_loss(x, indices_tuple=pairs) == 0.75


def test_empty_pair_lists(device: torch.device) -> None:
    x = make_rows(4, 3, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    some = torch.arange(2, device=device)
    for indices in ((none,) * 3, (some, some, none, none), (none, none, some, some)):
        for reduction in REDUCTIONS:
            check(x, indices_tuple=indices, reduction=reduction)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("with_ref", [False, True])
def test_gradcheck(with_ref: bool, distance: str, device: torch.device) -> None:
    x, r = make_rows(7, 3, device=device), make_rows(9, 3, device=device)
    labels, ref_labels = make_labels(7, 3, device=device), make_labels(9, 3, device=device)
    for power, reduction in itertools.product((1, 2), ("mean", "none")):
        assert torch.autograd.gradcheck(
            lambda x, r, power=power, reduction=reduction: contrastive_loss(
                x,
                labels,
                ref_emb=r if with_ref else None,
                ref_labels=ref_labels if with_ref else None,
                distance=distance,
                power=power,
                reduction=reduction,
                **MARGINS[distance],
            ),
            (x, r),
        )


@pytest.mark.parametrize("classes", ["one", "all distinct"])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_degenerate_batches(n: int, classes: str, device: torch.device) -> None:
    x = make_rows(n, 3, device=device)
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    if classes == "all distinct":
        labels = torch.arange(n, device=device)
    for reduction in REDUCTIONS:
        check(x, labels, reduction=reduction)
    if n < 2:
        loss = contrastive_loss(x, labels)
        loss.backward()
        assert loss == 0 and x.grad is not None and not x.grad.any()


def test_no_references(device: torch.device) -> None:
    x, labels = make_rows(4, 3, device=device), make_labels(4, device=device)
    refs = make_refs(0, 3, device=device)
    for reduction in REDUCTIONS:
        check(x, labels, **refs, reduction=reduction)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("offset", [0.0, 1e-6, 1e-4])
def test_near_duplicates_far_from_the_origin(
    offset: float, distance: str, device: torch.device
) -> None:
    # Gram-form distances lose all digits here, so this tests that such pairs are measured again.
    base = 10 + make_rows(6, 16, torch.float32, device=device).detach()
    x = base.repeat(3, 1)
    x = (x * (1 + offset * torch.randn_like(x))).requires_grad_()
    labels = make_labels(18, 2, device=device)
    check(x, labels, distance=distance, reduction="mean_separate", pos_margin=0.0)


def test_collapsed_batch(device: torch.device) -> None:
    x = torch.full((40, 8), 3.0, device=device, requires_grad=True)
    labels = make_labels(40, device=device)
    loss = contrastive_loss(x, labels, reduction="mean_separate")
    loss.backward()
    assert loss == 1 and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
def test_huge_and_tiny_norms(scale: float, device: torch.device) -> None:
    x = (make_rows(33, 9, torch.float32, device=device).detach() * scale).requires_grad_()
    labels = make_labels(33, device=device)
    check(x, labels, distance="cosine")
    check(x, labels, normalize=True)
    options = {"neg_margin": 4 * scale, "reduction": "mean"}
    ours = contrastive_loss(x, labels, **options)
    truth = reference.contrastive_loss(x.double(), labels, **options)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_rows(distance: str, device: torch.device) -> None:
    x = make_rows(16, 5, device=device).detach()
    x[[0, 3, 4]] = 0
    x.requires_grad_()
    check(x, torch.arange(16, device=device) % 3, distance=distance, normalize=True)
    if distance == "cosine":
        contrastive_loss(x, torch.arange(16, device=device) % 3, distance=distance).backward()
        assert x.grad is not None and not x.grad[[0, 3, 4]].any()


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("neg_margin", [1.0, 1.5])
def test_cosine_zero_rows_count_at_distance_one(
    neg_margin: float, with_ref: bool, device: torch.device
) -> None:
    x = make_rows(16, 5, device=device).detach()
    r = make_rows(12, 5, device=device).detach()
    x[::4] = r[::5] = 0
    x.requires_grad_(), r.requires_grad_()
    ref = {"ref_emb": r, "ref_labels": make_labels(12, device=device)} if with_ref else {}
    labels = make_labels(16, device=device)
    for reduction in REDUCTIONS:
        options = {"distance": "cosine", "pos_margin": 0.0, "neg_margin": neg_margin, **ref}
        check(x, labels, reduction=reduction, **options)
        check(
            x.detach().float().requires_grad_(),
            labels,
            reduction=reduction,
            **{**options, **({"ref_emb": r.detach().float().requires_grad_()} if with_ref else {})},
        )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_non_finite_rows_show(bad: float, distance: str, device: torch.device) -> None:
    x = make_rows(10, 4, torch.float32, device=device).detach()
    x[6, 2] = bad
    x.requires_grad_()
    labels = torch.arange(10, device=device) % 2
    if bad == 1e25 and distance == "cosine":
        # Normalisation brings a huge but finite row back into range.
        check(x, labels, distance=distance)
        return
    for reduction in REDUCTIONS:
        x.grad = None
        loss = contrastive_loss(x, labels, distance=distance, reduction=reduction)
        assert loss.isnan().all()
        loss.sum().backward()
        assert x.grad is not None and not x.grad.isfinite().all()


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "dot"])
def test_overflowing_distances_show(distance: str, device: torch.device) -> None:
    x = rows_with_overflowing_distances(device)
    for reduction in REDUCTIONS:
        labels = torch.arange(8, device=device) // 4
        loss = contrastive_loss(x, labels, distance=distance, reduction=reduction)
        assert loss.isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_nan_row_is_no_pair(reduction: str, device: torch.device) -> None:
    x = torch.full((1, 3), torch.nan, device=device, requires_grad=True)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    for loss in (contrastive_loss, reference.contrastive_loss):
        x.grad = None
        value = loss(x, labels, reduction=reduction)
        value.sum().backward()
        assert not value.any() and x.grad is not None and not x.grad.any()


def test_no_gradient_wanted(device: torch.device) -> None:
    check_unwanted_gradients(contrastive_loss, device)


@given(
    n=st.integers(0, 40),
    m=st.one_of(st.none(), st.integers(0, 40)),
    d=st.integers(1, 20),
    classes=st.integers(1, 6),
    distance=st.sampled_from(DISTANCES),
    reduction=st.sampled_from(REDUCTIONS),
    power=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_batch(
    n: int,
    m: int | None,
    d: int,
    classes: int,
    distance: str,
    reduction: str,
    power: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    check(
        make_rows(n, d),
        make_labels(n, classes),
        **make_refs(m, d, classes=classes),
        distance=distance,
        reduction=reduction,
        power=power,
    )
