# SPDX-License-Identifier: Apache-2.0
"""Arguments that losses share: how they are passed, and what is said about wrong ones."""

import copy
import inspect
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import flashmetric
from flashmetric import functional as F
from flashmetric.catalog import ENTRIES, Entry
from flashmetric.distances import LearnedMahalanobis, Mahalanobis
from flashmetric.labels import Labels, ignoring, multi_hot, two_level
from flashmetric.losses import LearnedTemperature

BATCH = [entry for entry in ENTRIES if entry.call == "batch"]


def rows(n: int = 12, d: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, d, generator=generator, dtype=torch.float64)


LABELS = torch.arange(12) % 4


def name_of(entry: Entry) -> str:
    return entry.name


def make(entry: Entry, **overrides: object) -> torch.nn.Module:
    options: dict[str, Any] = {**dict(entry.example), **overrides}
    for name in {"features", "embedding_size"} & options.keys():
        options[name] = 5
    return getattr(flashmetric, entry.name)(**options)


@pytest.mark.parametrize("entry", [e for e in BATCH if e.listed], ids=name_of)
def test_positions_are_those_of_pytorch_metric_learning(entry: Entry) -> None:
    loss, x, r = make(entry).double(), rows(), rows(seed=1)
    listed = (torch.tensor([0, 1, 2]), torch.tensor([4, 5, 6]), torch.tensor([1, 2, 3]))
    by_name = {"indices_tuple": listed, "ref_emb": r, "ref_labels": LABELS}
    assert loss(x, LABELS, listed, r, LABELS).equal(loss(x, LABELS, **by_name))


def constants() -> list[tuple[Entry, str, float]]:
    found = []
    for entry in ENTRIES:
        given = dict(entry.example)
        parameters = inspect.signature(getattr(flashmetric, entry.name)).parameters
        for name, parameter in parameters.items():
            default = given.get(name, parameter.default)
            size = name in ("features", "embedding_size")
            if isinstance(default, (int, float)) and not isinstance(default, bool) and not size:
                sizes = [math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-300, 1e39, 1e-40]
                found += [(entry, name, value) for value in sizes]
    return found


@pytest.mark.parametrize(("entry", "name", "value"), constants())
def test_extreme_constants_work_or_are_named(entry: Entry, name: str, value: float) -> None:
    try:
        loss = make(entry, **{name: value})
    except (TypeError, ValueError) as error:
        assert re.match(rf"{name} must|learn_beta must be True with {name}", str(error))
        assert "got" in str(error)
        return
    assert abs(value) < 1
    if entry.call == "batch":
        x = rows().float().requires_grad_()
        loss(x, LABELS).backward()


def test_extreme_logarithms() -> None:
    with pytest.raises(ValueError, match=r"log_scale must be at most 41.4, .*; got 1000"):
        F.siglip_loss(rows(), ref_emb=rows(), log_scale=1000.0)


class TestTemperature:
    LOSSES = (F.info_nce_loss, F.ntxent_loss, F.sup_con_loss)

    @pytest.mark.parametrize("function", LOSSES)
    @pytest.mark.parametrize("value", [0.0, -0.1])
    def test_a_tensor_has_to_be_above_0(self, function: Any, value: float) -> None:
        with pytest.raises(ValueError, match="temperature must be above 0, got"):
            function(rows(), LABELS, temperature=torch.tensor(value))
        with pytest.raises(TypeError, match="temperature must be a floating-point tensor"):
            function(rows(), LABELS, temperature=torch.tensor(1))
        with pytest.raises(ValueError, match="temperature must be a number, got shape"):
            function(rows(), LABELS, temperature=torch.ones(1))

    @pytest.mark.parametrize("name", ["InfoNCELoss", "NTXentLoss", "SupConLoss"])
    def test_a_learned_one_stays_above_0(self, name: str) -> None:
        loss = getattr(flashmetric, name)(LearnedTemperature(0.2, max_scale=50.0)).double()
        plain = getattr(flashmetric, name)(0.2)
        torch.testing.assert_close(loss(rows(), LABELS), plain(rows(), LABELS))
        scale = loss.temperature.logit_scale
        optimizer = torch.optim.SGD([scale], lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            loss(rows(), LABELS).backward()
            assert scale.grad is not None and scale.grad.isfinite()
            optimizer.step()
        assert loss.temperature().item() >= 1 / 50 - 1e-12
        with torch.no_grad():
            scale.fill_(10.0)
        assert loss.temperature().item() == pytest.approx(1 / 50)
        optimizer.zero_grad()
        loss(rows(), LABELS).backward()
        assert scale.grad != 0  # the way back
        assert set(loss.state_dict()) == {"temperature.logit_scale"}
        for same in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert same(rows(), LABELS).equal(loss(rows(), LABELS))

    def test_gradient(self) -> None:
        loss = flashmetric.SupConLoss(LearnedTemperature(0.5)).double()
        scale = loss.temperature.logit_scale
        loss(rows(), LABELS).backward()
        t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        F.sup_con_loss(rows(), LABELS, temperature=t).backward()
        assert t.grad is not None
        torch.testing.assert_close(scale.grad, -0.5 * t.grad)

    def test_messages(self) -> None:
        with pytest.raises(ValueError, match="start must be above 0, got 0"):
            LearnedTemperature(0)
        with pytest.raises(TypeError, match="max_scale must be a number, got str"):
            LearnedTemperature(max_scale="x")


def test_margin_options_without_a_learned_beta() -> None:
    for options in ({"num_classes": 3}, {"nu": 0.1}):
        with pytest.raises(ValueError, match="learn_beta must be True with (num_classes|nu)"):
            flashmetric.MarginLoss(**options)
        flashmetric.MarginLoss(**options, learn_beta=True)
    for wrong in ("3", 2.0, True):
        with pytest.raises(TypeError, match="num_classes must be an integer, got"):
            flashmetric.MarginLoss(num_classes=wrong, learn_beta=True)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        flashmetric.MarginLoss(num_classes=0, learn_beta=True)


@pytest.mark.parametrize("name", ["info_nce", "image_text", "n_pairs", "siglip"])
def test_two_towers_without_labels(name: str) -> None:
    function, x = getattr(F, f"{name}_loss"), rows()
    with pytest.raises(ValueError, match="ref_emb, .*must be given unless .*; got None"):
        function(x)
    with pytest.raises(ValueError, match="labels must be given with ref_labels; got None"):
        function(x, ref_emb=x, ref_labels=LABELS)
    with pytest.raises(ValueError, match="ref_emb must have a row for each of embeddings, 12.*5"):
        function(x, ref_emb=x[:5])
    with pytest.raises(ValueError, match=r"labels must have shape \[12\].*got \(12, 5\), rows to"):
        function(x, x)


@pytest.mark.parametrize("name", ["ntxent", "sup_con"])
def test_labels_are_needed(name: str) -> None:
    for given in ({}, {"ref_emb": rows()}):
        with pytest.raises(ValueError, match="labels must be given unless .*; got None"):
            getattr(F, f"{name}_loss")(rows(), **given)


TAGS = (torch.arange(12).unsqueeze(1) % torch.tensor([2, 3, 4]) == 0).repeat(1, 30)
COMPOSED: dict[str, Labels] = {
    "plain": ignoring(LABELS, 7),
    "any": multi_hot(TAGS),
    "all": multi_hot(TAGS, "all"),
    "groups": two_level(LABELS, torch.arange(12) // 6, positives="same", negatives="any"),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_ignoring_any_labels(name: str) -> None:
    labels, x = COMPOSED[name], rows()
    out = torch.zeros(12, dtype=torch.bool)
    out[[1, 6]] = True
    ignored = ignoring(labels, rows=out)
    kept = Labels(labels.words[~out], labels.rule)
    for loss in (
        flashmetric.ContrastiveLoss(),
        flashmetric.SupConLoss(),
        flashmetric.TripletMarginLoss(0.5),
        flashmetric.TripletMarginLoss(0.5, mining="batch_all"),
    ):
        torch.testing.assert_close(loss(x, ignored), loss(x[~out], kept))


def test_ignoring_a_class_with_groups() -> None:
    groups, x, loss = torch.arange(12) // 6, rows(), flashmetric.ContrastiveLoss()
    kept = LABELS != 2
    expected = loss(x[kept], two_level(LABELS[kept], groups[kept], positives="same"))
    inside = two_level(ignoring(LABELS, 2), groups, positives="same")
    outside = ignoring(two_level(LABELS, groups, positives="same"), 2)
    assert inside.words[:, 0].equal(outside.words[:, 0])
    for labels in (inside, outside):
        torch.testing.assert_close(loss(x, labels), expected)


def test_ignoring_messages() -> None:
    with pytest.raises(ValueError, match="rows must be given for labels of several classes"):
        ignoring(COMPOSED["any"])
    with pytest.raises(TypeError, match="rows must be a bool tensor"):
        ignoring(LABELS, rows=LABELS)
    with pytest.raises(ValueError, match=r"rows must have shape \(12,\), .*got \(3,\)"):
        ignoring(LABELS, rows=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="classes must be one class per row, .*'any'"):
        two_level(COMPOSED["any"], LABELS)


def test_the_least_int64_is_no_label() -> None:
    labels = LABELS.clone()
    labels[labels == 0] = -(2**63)
    loss = flashmetric.ContrastiveLoss()
    assert loss(rows(), labels).equal(loss(rows(), ignoring(LABELS, 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_metric_keeps_its_precision(dtype: torch.dtype) -> None:
    x = rows(12, 5).to(dtype)
    learned = LearnedMahalanobis(5)
    with torch.no_grad():
        learned.factor.copy_(rows(5, 5, seed=2))
    fixed = Mahalanobis(torch.eye(5) + 0.3)
    for metric in (learned, fixed):
        exact = copy.deepcopy(metric).double().rows(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            ours = metric.rows(x)
            loss = flashmetric.ContrastiveLoss(distance=metric)(x, LABELS)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
        assert loss.equal(flashmetric.ContrastiveLoss(distance=metric)(x, LABELS))


@pytest.mark.parametrize("distance", ["cosine", "sqrt_cosine", "angular", "euclidean"])
def test_zero_rows(distance: str) -> None:
    # As documented by normalize_rows().
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-20, 0.0]], requires_grad=True)
    far = {"angular": math.pi / 2}.get(distance, 1.0)
    loss = flashmetric.PairLoss(
        lambda pairs: pairs.sum(F.Term("linear")).positive, distance=distance, normalize=True
    )
    labels = torch.zeros(3, dtype=torch.int64)
    total = loss(x, labels)
    torch.testing.assert_close(total[0], torch.tensor(2 * far))
    total.sum().backward()
    assert x.grad is not None and x.grad[0].eq(0).all() and x.grad[1].isfinite().all()
    assert F.normalize_rows(x.detach())[2].tolist() == [1.0, 0.0]


def test_float16_sums_that_overflow_skip_the_step() -> None:
    x = rows(64, 4).half().requires_grad_()
    loss = flashmetric.ContrastiveLoss(distance="sqeuclidean", neg_margin=10.0, reduction="sum")
    value = loss(x, torch.arange(64))
    (value * 65536.0).backward()
    assert value.isfinite() and value.dtype == torch.float32
    assert x.grad is not None and x.grad.isinf().any()
