# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmetric import functional, reference
from flashmetric.functional import triplet_margin_loss
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

REDUCTIONS = ["mean", "mean_nonzero", "sum", "none"]
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(*args: object, **options: object) -> None:
    compare(functional.triplet_margin_loss, reference.triplet_margin_loss, *args, **options)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], distance: str, device: torch.device) -> None:
    x = make_rows(*shape, torch.float32, device=device)
    check(x, make_labels(shape[0], device=device), distance=distance)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", REF_SHAPES, ids=str)
def test_references(shape: tuple[int, int, int], distance: str, device: torch.device) -> None:
    n, m, d = shape
    check(
        make_rows(n, d, device=device),
        make_labels(n, device=device),
        **make_refs(m, d, device=device),
        distance=distance,
        swap=True,
    )


@pytest.mark.parametrize("strides", ["contiguous", "columns", "slice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_strides(dtype: torch.dtype, strides: str, device: torch.device) -> None:
    x = make_rows(53, 24, dtype, device=device, strides=strides)
    labels = make_labels(53, device=device)
    refs = make_refs(31, 24, dtype, device=device, strides=strides)
    check(x, labels, margin=0.5)
    check(x, labels, **refs, distance="cosine")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("empty", ["skip", "keep"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_options(distance: str, empty: str, reduction: str, device: torch.device) -> None:
    x = make_rows(41, 11, device=device)
    # Class 9 has one row, which so has no positive.
    labels = make_labels(41, 5, device=device)
    labels[7] = 9
    for smooth, swap, normalize in itertools.product((False, True), repeat=3):
        check(
            x,
            labels,
            margin=0.3,
            distance=distance,
            empty=empty,
            reduction=reduction,
            smooth=smooth,
            swap=swap,
            normalize=normalize,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("length", [3, 4])
def test_indices_tuple(length: int, with_ref: bool, reduction: str, device: torch.device) -> None:
    x = make_rows(20, 6, device=device)
    r = make_rows(30, 6, device=device) if with_ref else None
    m = 30 if with_ref else 20
    indices = make_indices(length, (40, 40) if length == 3 else (5, 9), 20, m, device)
    for swap, distance in itertools.product((False, True), DISTANCES):
        check(
            x,
            indices_tuple=indices,
            ref_emb=r,
            reduction=reduction,
            swap=swap,
            distance=distance,
        )


def test_empty_triplet_lists(device: torch.device) -> None:
    x = make_rows(4, 3, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    some = torch.arange(2, device=device)
    for indices in ((none,) * 3, (some, some, none, none), (none, none, some, some)):
        for reduction in REDUCTIONS:
            check(x, indices_tuple=indices, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
def test_label_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    check(make_rows(12, 5, device=device), make_labels(12, 2, device=device).to(dtype))


def test_label_values_are_only_compared(device: torch.device) -> None:
    x = make_rows(30, 5, device=device)
    labels = make_labels(30, device=device)
    far = torch.tensor([-(2**63), -1, 0, 2**63 - 1], device=device)[labels]
    assert triplet_margin_loss(x, labels).equal(triplet_margin_loss(x, far))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("with_ref", [False, True])
def test_gradcheck(with_ref: bool, distance: str, device: torch.device) -> None:
    x, r = make_rows(9, 4, device=device), make_rows(11, 4, device=device)
    labels, ref_labels = make_labels(9, 3, device=device), make_labels(11, 3, device=device)
    for smooth, swap in itertools.product((False, True), repeat=2):
        assert torch.autograd.gradcheck(
            lambda x, r, smooth=smooth, swap=swap: triplet_margin_loss(
                x,
                labels,
                ref_emb=r if with_ref else None,
                ref_labels=ref_labels if with_ref else None,
                distance=distance,
                smooth=smooth,
                swap=swap,
                margin=1.0,
            ),
            (x, r),
        )


@pytest.mark.parametrize("classes", ["one", "all distinct"])
@pytest.mark.parametrize("empty", ["skip", "keep"])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_degenerate_batches(n: int, empty: str, classes: str, device: torch.device) -> None:
    x = make_rows(n, 3, device=device)
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    if classes == "all distinct":
        labels = torch.arange(n, device=device)
    for reduction, smooth in itertools.product(REDUCTIONS, (False, True)):
        check(x, labels, empty=empty, reduction=reduction, smooth=smooth, swap=True)
    if empty == "skip":
        x.grad = None
        loss = triplet_margin_loss(x, labels)
        loss.backward()
        assert loss == 0 and x.grad is not None and not x.grad.any()


def test_no_references(device: torch.device) -> None:
    x, labels = make_rows(4, 3, device=device), make_labels(4, device=device)
    refs = make_refs(0, 3, device=device)
    for empty in ("skip", "keep"):
        check(x, labels, **refs, empty=empty, swap=True)


@pytest.mark.parametrize("distance", DISTANCES)
def test_duplicates_have_distance_and_gradient_zero(distance: str, device: torch.device) -> None:
    x = make_rows(8, 5, torch.float32, device=device).detach().repeat(3, 1).requires_grad_()
    labels = make_labels(24, 3, device=device)
    loss = triplet_margin_loss(x, labels, distance=distance, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    if distance != "dot":
        x = torch.ones(6, 5, device=device, requires_grad=True)
        labels = torch.arange(6, device=device) % 2
        loss = triplet_margin_loss(x, labels, distance=distance, margin=0.25, reduction="none")
        loss.sum().backward()
        assert (loss == 0.25).all() and x.grad is not None and not x.grad.any()


def test_ties_take_the_lowest_index(device: torch.device) -> None:
    x = torch.tensor([[0.0], [1.0], [-1.0], [2.0], [-2.0]], device=device)
    labels = torch.tensor([0, 0, 0, 1, 1], device=device)
    index, _ = torch.ops.flashmetric.hardest(x, labels, None, None, "euclidean")
    assert index[:, 0].tolist() == [1, 3]


@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
def test_huge_and_tiny_norms(scale: float, device: torch.device) -> None:
    x = (make_rows(33, 9, torch.float32, device=device).detach() * scale).requires_grad_()
    labels = make_labels(33, device=device)
    check(x, labels, distance="cosine")
    check(x, labels, normalize=True, swap=True)
    ours = triplet_margin_loss(x, labels, margin=0.0)
    truth = reference.triplet_margin_loss(x.double(), labels, margin=0.0)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=0)


def test_zero_rows(device: torch.device) -> None:
    x = make_rows(16, 5, torch.float32, device=device).detach()
    x[[0, 3, 4]] = 0
    x.requires_grad_()
    labels = torch.arange(16, device=device) % 3
    for options in ({"distance": "cosine"}, {"normalize": True}, {}):
        triplet_margin_loss(x, labels, margin=2.0, **options).backward()
        assert x.grad is not None and x.grad.isfinite().all()
        if options:
            assert not x.grad[[0, 3, 4]].any()
        x.grad = None


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
        loss = triplet_margin_loss(x, labels, distance=distance, reduction=reduction)
        assert loss.isnan().all()
    index, values = torch.ops.flashmetric.hardest(x.detach(), labels, None, None, distance)
    assert ((index >= 0) & (index < 10)).all() and values.isnan().all()
    assert (labels[index[0]] == labels).all() and (labels[index[1]] != labels).all()
    loss.sum().backward()
    assert x.grad is not None and not x.grad.isfinite().all()


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "dot"])
def test_overflowing_distances_show(distance: str, device: torch.device) -> None:
    x = rows_with_overflowing_distances(device)
    labels = torch.arange(8, device=device) // 4
    index, values = torch.ops.flashmetric.hardest(x, labels, None, None, distance)
    assert (index >= 0).all() and values.isnan().all()
    for reduction in REDUCTIONS:
        loss = triplet_margin_loss(x, labels, distance=distance, reduction=reduction)
        assert loss.isnan().all()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("empty", ["skip", "keep"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labels", [[0, 1], [0, 0], [0, 0, 1]], ids=str)
def test_nan_shows_where_anchors_are_skipped(
    labels: list[int], reduction: str, empty: str, swap: bool, device: torch.device
) -> None:
    x = make_rows(len(labels), 3, device=device).detach()
    x[0, 1] = torch.nan
    x.requires_grad_()
    for loss in (triplet_margin_loss, reference.triplet_margin_loss):
        x.grad = None
        classes = torch.tensor(labels, device=device)
        value = loss(x, classes, reduction=reduction, empty=empty, swap=swap)
        assert value.isnan().all()
        value.sum().backward()
    x.grad = None
    triplet_margin_loss(x, classes, reduction=reduction, empty=empty, swap=swap).sum().backward()
    assert x.grad is not None and x.grad.isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_nan_row_is_no_pair(reduction: str, device: torch.device) -> None:
    x = torch.full((1, 3), torch.nan, device=device, requires_grad=True)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    for loss in (triplet_margin_loss, reference.triplet_margin_loss):
        x.grad = None
        value = loss(x, labels, reduction=reduction)
        value.sum().backward()
        assert not value.any() and x.grad is not None and not x.grad.any()


def test_half_gives_float32_loss_and_half_gradient(device: torch.device) -> None:
    x = make_rows(10, 4, torch.float16, device=device)
    loss = triplet_margin_loss(x, make_labels(10, 2, device=device))
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float16


def test_no_gradient_wanted(device: torch.device) -> None:
    check_unwanted_gradients(triplet_margin_loss, device)


@given(
    n=st.integers(0, 40),
    m=st.one_of(st.none(), st.integers(0, 40)),
    d=st.integers(1, 20),
    classes=st.integers(1, 6),
    distance=st.sampled_from(DISTANCES),
    reduction=st.sampled_from(REDUCTIONS),
    empty=st.sampled_from(["skip", "keep"]),
    swap=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_batch(
    n: int,
    m: int | None,
    d: int,
    classes: int,
    distance: str,
    reduction: str,
    empty: str,
    swap: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    check(
        make_rows(n, d),
        make_labels(n, classes),
        **make_refs(m, d, classes=classes),
        distance=distance,
        reduction=reduction,
        empty=empty,
        swap=swap,
    )
