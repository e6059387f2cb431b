# SPDX-License-Identifier: Apache-2.0
"""The oracle proved alone: numbers worked out by hand, loops over plain floats, gradcheck."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from flashmetric import reference
from loop_oracle import loop_contrastive, loop_triplet

DISTANCES = ("euclidean", "sqeuclidean", "cosine", "dot")
LOSSES = (reference.triplet_margin_loss, reference.contrastive_loss)

# Points on a line: distances 01=1 02=3 03=7 12=2 13=6 23=4.
LINE = [[0.0], [1.0], [3.0], [7.0]]
# Cosines 01=0 02=-1 03=.6 12=0 13=.8 23=-.6.
PLANE = [[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [3.0, 4.0]]
PAIRS = [0, 0, 1, 1]
REF = {"ref_emb": [[0.0], [4.0], [9.0]], "ref_labels": [0, 1, 0]}
THREE = ([0, 2], [1, 3], [3, 1])
FOUR = ([1, 2], [0, 3], [2, 1, 2], [0, 3, 1])
FAR = {"pos_margin": 2.0, "neg_margin": 5.0}

TRIPLET_TABLE = [
    (LINE, PAIRS, {"margin": 2.0, "reduction": "none"}, [0, 1, 4, 0]),
    (LINE, PAIRS, {"margin": 2.0}, 1.25),
    (LINE, PAIRS, {"margin": 2.0, "reduction": "mean_nonzero"}, 2.5),
    (LINE, PAIRS, {"margin": 2.0, "reduction": "sum"}, 5),
    (LINE, PAIRS, {"margin": 2.0, "swap": True, "reduction": "none"}, [1, 1, 4, 4]),
    (
        LINE,
        PAIRS,
        {"margin": 2.0, "smooth": True, "reduction": "none"},
        [0.6931471805599453, 1.3132616875182228, 4.01814992791781, 0.6931471805599453],
    ),
    (LINE, PAIRS, {"margin": 2.0, "distance": "sqeuclidean", "reduction": "none"}, [0, 0, 14, 0]),
    (LINE, PAIRS, {"margin": 2.0, "distance": "dot", "reduction": "none"}, [2, 9, 0, 0]),
    (
        PLANE,
        PAIRS,
        {"margin": 0.1, "distance": "cosine", "reduction": "none"},
        [0.7, 0.9, 0.7, 1.5],
    ),
    (
        [[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.0, -3.0]],
        PAIRS,
        {"margin": 0.5, "normalize": True, "reduction": "none"},
        [0.5, 0.5, 0.5, 0.5],
    ),
    (LINE, [0, 0, 1, 2], {"margin": 3.0, "reduction": "none"}, [1, 2, 0, 0]),
    (LINE, [0, 0, 1, 2], {"margin": 3.0}, 1.5),
    (LINE, [0, 0, 1, 2], {"margin": 3.0, "empty": "keep", "reduction": "none"}, [1, 2, 1, 0]),
    (LINE, [0, 0, 1, 2], {"margin": 3.0, "empty": "keep"}, 1.0),
    (LINE, [5, 5, 5, 5], {"margin": 3.0, "empty": "keep", "reduction": "none"}, [3, 3, 3, 3]),
    (LINE, [5, 5, 5, 5], {"margin": 3.0}, 0),
    ([[4.0]], [0], {"margin": 3.0, "empty": "keep"}, 3),
    ([[0.0], [10.0]], [0, 1], {"margin": 1.0, "reduction": "none", **REF}, [6, 6]),
    (LINE, None, {"margin": 2.0, "reduction": "none", "indices_tuple": THREE}, [0, 4]),
    (LINE, None, {"margin": 2.0, "reduction": "none", "indices_tuple": FOUR}, [0, 3, 4]),
    (LINE, None, {"margin": 2.0, "indices_tuple": FOUR}, 7 / 3),
    (LINE, None, {"margin": 2.0, "reduction": "mean_nonzero", "indices_tuple": FOUR}, 3.5),
]
CONTRASTIVE_TABLE = [
    (LINE, PAIRS, {**FAR, "reduction": "sum"}, 14),
    (LINE, PAIRS, {**FAR, "reduction": "mean"}, 14 / 12),
    (LINE, PAIRS, {**FAR, "reduction": "mean_separate"}, 2.25),
    (LINE, PAIRS, {**FAR, "reduction": "mean_nonzero"}, 4.5),
    (LINE, PAIRS, {**FAR, "reduction": "none"}, [2, 3, 7, 2]),
    (LINE, PAIRS, {**FAR, "power": 2, "reduction": "sum"}, 34),
    (LINE, PAIRS, {**FAR, "power": 2, "reduction": "mean_nonzero"}, 10.5),
    (LINE, PAIRS, {**FAR, "power": 2, "scale": 0.5, "reduction": "mean"}, 17 / 12),
    (LINE, PAIRS, {**FAR, "distance": "sqeuclidean", "reduction": "none"}, [0, 1, 15, 14]),
    (LINE, PAIRS, {"neg_margin": -5.0, "distance": "dot", "reduction": "none"}, [0, 2, 0, 2]),
    (PLANE, PAIRS, {"distance": "cosine", "reduction": "none"}, [1.6, 1.8, 1.6, 3.0]),
    (LINE, [0, 0, 0, 0], {"reduction": "mean"}, 23 / 6),
    (LINE, [0, 1, 2, 3], {**FAR, "reduction": "mean_separate"}, 20 / 12),
    ([[0.0], [10.0]], [0, 1], {**FAR, "reduction": "none", **REF}, [8, 8]),
    (LINE, None, {**FAR, "reduction": "none", "indices_tuple": THREE}, [0, 0, 5, 0]),
    (LINE, None, {**FAR, "reduction": "mean", "indices_tuple": THREE}, 5 / 4),
    (LINE, None, {**FAR, "reduction": "none", "indices_tuple": FOUR}, [0, 0, 7, 0]),
    (LINE, None, {**FAR, "reduction": "sum", "indices_tuple": ([2, 2], [3, 3], [], [])}, 4),
]


def tensors(options: dict) -> dict:
    """The options of a table row with its lists as tensors."""
    made = dict(options)
    if "ref_emb" in made:
        made["ref_emb"] = torch.tensor(made["ref_emb"], dtype=torch.float64)
        made["ref_labels"] = torch.tensor(made["ref_labels"])
    if "indices_tuple" in made:
        made["indices_tuple"] = tuple(
            torch.tensor(i, dtype=torch.int64) for i in made["indices_tuple"]
        )
    return made


def batch(n: int = 7, d: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random float64 rows of three classes, the last row alone in its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    labels[-1] = 9
    return x, labels


def reference_rows(d: int = 3) -> dict:
    """References for `batch`, some labels of which have no anchor."""
    ref_emb, ref_labels = batch(5, d, seed=1)
    return {"ref_emb": ref_emb, "ref_labels": ref_labels}


@pytest.mark.parametrize(("x", "labels", "options", "expected"), TRIPLET_TABLE)
def test_triplet_hand_numbers(x, labels, options, expected):
    check_hand_number(reference.triplet_margin_loss, x, labels, options, expected)


@pytest.mark.parametrize(("x", "labels", "options", "expected"), CONTRASTIVE_TABLE)
def test_contrastive_hand_numbers(x, labels, options, expected):
    check_hand_number(reference.contrastive_loss, x, labels, options, expected)


def check_hand_number(loss, x, labels, options, expected):
    x = torch.tensor(x, dtype=torch.float64)
    labels = None if labels is None else torch.tensor(labels)
    value = loss(x, labels, **tensors(options))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)


def test_pairwise_distance_hand_numbers():
    x, r = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [4.0, 3.0]])
    expected = {
        "euclidean": [[5.0, math.sqrt(2)], [0.0, 5.0]],
        "sqeuclidean": [[25.0, 2.0], [0.0, 25.0]],
        "cosine": [[1.0, 0.04], [1.0, 1.0]],
        "dot": [[0.0, -24.0], [0.0, 0.0]],
    }
    for distance in DISTANCES:
        value = reference.pairwise_distance(x, r, distance)
        torch.testing.assert_close(value, torch.tensor(expected[distance]))


@pytest.mark.parametrize("source", ["self", "ref", "three", "four"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_triplet_matches_loops(distance, normalize, source):
    x, labels, more = loop_case(source)
    if normalize and distance in ("euclidean", "sqeuclidean"):
        x[4] = x[5] + 1  # all unit rows are 1 from a zero row: rounding would choose among them
    for smooth, swap, reduction, empty in itertools.product(
        (False, True), (False, True), ("mean", "mean_nonzero", "sum", "none"), ("skip", "keep")
    ):
        options = {
            "margin": 0.3,
            "distance": distance,
            "normalize": normalize,
            "smooth": smooth,
            "swap": swap,
            "reduction": reduction,
            "empty": empty,
        }
        value = reference.triplet_margin_loss(x, labels, **options, **more)
        assert value.tolist() == pytest.approx(loop_triplet(x, labels, **options, **more), 1e-12)


@pytest.mark.parametrize("source", ["self", "ref", "three", "four"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_contrastive_matches_loops(distance, normalize, source):
    x, labels, more = loop_case(source)
    for power, reduction in itertools.product(
        (1, 2), ("mean", "mean_separate", "mean_nonzero", "sum", "none")
    ):
        options = {
            "pos_margin": 0.2,
            "neg_margin": 1.4,
            "distance": distance,
            "normalize": normalize,
            "power": power,
            "scale": 0.7,
            "reduction": reduction,
        }
        value = reference.contrastive_loss(x, labels, **options, **more)
        expected = loop_contrastive(x, labels, **options, **more)
        assert value.tolist() == pytest.approx(expected, 1e-12)


def loop_case(source):
    """A batch with a duplicate and a zero row, and where its pairs come from."""
    x, labels = batch()
    x[3], x[4] = x[1], 0.0
    if source == "self":
        return x, labels, {}
    if source == "ref":
        return x, labels, reference_rows()
    indices = torch.randint(0, 7, (4, 11), generator=torch.Generator().manual_seed(2))
    return x, None, {"indices_tuple": tuple(indices[:3] if source == "three" else indices)}


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance, normalize, with_ref):
    x, labels = batch(6, 2)
    x.requires_grad_()
    ref = reference_rows(2) if with_ref else {}
    inputs = (x, ref["ref_emb"].requires_grad_()) if with_ref else (x,)
    shared = {"distance": distance, "normalize": normalize, "reduction": "none"}

    def triplet(x, ref_emb=None, **options):
        return reference.triplet_margin_loss(
            x, labels, **shared, **options, ref_emb=ref_emb, ref_labels=ref.get("ref_labels")
        )

    def contrastive(x, ref_emb=None, **options):
        return reference.contrastive_loss(
            x, labels, **shared, **options, ref_emb=ref_emb, ref_labels=ref.get("ref_labels")
        )

    for smooth, swap, empty in itertools.product((False, True), (False, True), ("skip", "keep")):
        options = {"margin": 1.1, "smooth": smooth, "swap": swap, "empty": empty}
        assert torch.autograd.gradcheck(lambda *a, o=options: triplet(*a, **o), inputs)
    for power in (1, 2):
        options = {"pos_margin": 0.1, "neg_margin": 1.7, "power": power}
        assert torch.autograd.gradcheck(lambda *a, o=options: contrastive(*a, **o), inputs)


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_given_indices(loss, length):
    x, _ = batch()
    indices = tuple(torch.randperm(7, generator=torch.Generator().manual_seed(i)) for i in range(4))
    indices = (*indices[:2], indices[0].roll(1), indices[3]) if length == 4 else indices[:3]
    assert torch.autograd.gradcheck(
        lambda x: loss(x, reduction="none", indices_tuple=indices), x.requires_grad_()
    )
