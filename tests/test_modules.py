# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flashmetric
from flashmetric import ContrastiveLoss, TripletMarginLoss
from flashmetric.functional import contrastive_loss, normalize_rows, triplet_margin_loss
from helpers import make_labels, make_rows

FUNCTIONS: list[Callable[..., Tensor]] = [triplet_margin_loss, contrastive_loss]
X = torch.zeros(4, 3)
LABELS = torch.tensor([0, 0, 1, 1])
INDEX = torch.tensor([0, 1])


def test_public_names() -> None:
    assert flashmetric.__version__ == "0.1.0"
    for name in flashmetric.__all__:
        assert hasattr(flashmetric, name)


def test_repr_rebuilds_the_module() -> None:
    triplet = TripletMarginLoss(0.5, distance="cosine", swap=True)
    assert repr(triplet) == (
        "TripletMarginLoss(margin=0.5, distance='cosine', mining='batch_hard', "
        "type_of_triplets='all', smooth=False, hinge=True, swap=True, scale=1.0, anchor_scale=1.0, "
        "reduction='mean', empty='skip', max_positives=None, normalize=False, exact=False)"
    )
    contrastive = ContrastiveLoss(0.1, 2.0, power=2)
    assert repr(contrastive) == (
        "ContrastiveLoss(0.1, 2.0, distance='euclidean', power=2, scale=1.0, "
        "reduction='mean_nonzero', normalize=False)"
    )
    for module in (triplet, contrastive):
        rebuilt = eval(repr(module))
        assert repr(rebuilt) == repr(module)


@pytest.mark.parametrize("module", [TripletMarginLoss(0.3, swap=True), ContrastiveLoss(scale=2.0)])
def test_copies(module: nn.Module) -> None:
    x, labels = make_rows(12, 4), make_labels(12)
    assert not module.state_dict() and not list(module.parameters())
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert repr(twin) == repr(module)
        assert twin(x, labels).equal(module(x, labels))


def test_modules_equal_functions() -> None:
    x, labels, r, ref_labels = make_rows(12, 4), make_labels(12), make_rows(9, 4), make_labels(9)
    options: dict[str, Any] = {"distance": "sqeuclidean", "reduction": "sum", "normalize": True}
    triplet = {"margin": 0.7, "smooth": True, "swap": True, "empty": "keep", "exact": True}
    triplet.update(options)
    pair = {"pos_margin": 0.1, "neg_margin": 1.5, "power": 2, "scale": 3.0, **options}
    for module, function, hyper in (
        (TripletMarginLoss, triplet_margin_loss, triplet),
        (ContrastiveLoss, contrastive_loss, pair),
    ):
        for given in ({}, {"ref_emb": r, "ref_labels": ref_labels}):
            ours = module(**hyper)(x, labels, **given)
            assert ours.equal(function(x, labels, **hyper, **given))
        indices = (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5]))
        ours = module(**hyper)(x, indices_tuple=indices)
        assert ours.equal(function(x, indices_tuple=indices, **hyper))


def test_presets() -> None:
    def settings(module: nn.Module) -> dict[str, object]:
        return {name: value for name, value in vars(module).items() if name[0] != "_"}

    same = settings(TripletMarginLoss(0.05, normalize=True, reduction="mean_nonzero"))
    assert settings(TripletMarginLoss.preset("pml_batch_hard")) == same
    assert settings(TripletMarginLoss.preset("pml")) == {**same, "mining": "batch_all"}
    same = settings(TripletMarginLoss(5.0, empty="keep"))
    assert settings(TripletMarginLoss.preset("sentence_transformers")) == same
    same = settings(TripletMarginLoss(2.0, empty="keep"))
    assert settings(TripletMarginLoss.preset("tensorflow_addons", margin=2.0)) == same

    assert settings(ContrastiveLoss.preset("pml")) == settings(ContrastiveLoss(normalize=True))
    same = settings(
        ContrastiveLoss(0.0, 0.5, distance="cosine", power=2, scale=0.5, reduction="mean")
    )
    assert settings(ContrastiveLoss.preset("sentence_transformers")) == same
    same = settings(ContrastiveLoss(power=2, reduction="mean"))
    assert settings(ContrastiveLoss.preset("tensorflow_addons")) == same


@pytest.mark.parametrize("module", [TripletMarginLoss, ContrastiveLoss])
def test_unknown_preset(module: Any) -> None:
    message = "name must be one of 'pml', .*'sentence_transformers', .*; got 'oml'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        module.preset("oml")
    with pytest.raises(TypeError, match="speed"):
        module.preset("pml", speed=1)


OPTION_ERRORS = [
    (FUNCTIONS, {"distance": "l1"}, ValueError, "distance must be one of .*; got 'l1'"),
    (FUNCTIONS, {"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
    (FUNCTIONS, {"reduction": "max"}, ValueError, "reduction must be one of .*; got 'max'"),
    (FUNCTIONS[:1], {"margin": "a"}, TypeError, "margin must be a number, got str"),
    (FUNCTIONS[:1], {"margin": True}, TypeError, "margin must be a number, got bool"),
    (FUNCTIONS[:1], {"margin": np.True_}, TypeError, "margin must be a number, got bool"),
    (
        FUNCTIONS[:1],
        {"margin": torch.tensor(0.2)},
        TypeError,
        "margin must be a number, got Tensor",
    ),
    (FUNCTIONS[:1], {"margin": 10**400}, ValueError, "margin must be finite, got 1000"),
    (FUNCTIONS[:1], {"margin": np.float32("inf")}, ValueError, "margin must be finite, got inf"),
    (FUNCTIONS[:1], {"margin": float("nan")}, ValueError, "margin must be finite, got nan"),
    (FUNCTIONS[:1], {"mining": "all"}, ValueError, "mining must be one of .*; got 'all'"),
    (FUNCTIONS[:1], {"smooth": None}, TypeError, "smooth must be True or False, got None"),
    (FUNCTIONS[:1], {"swap": 0}, TypeError, "swap must be True or False, got 0"),
    (FUNCTIONS[:1], {"empty": "drop"}, ValueError, "empty must be one of .*; got 'drop'"),
    (FUNCTIONS[:1], {"exact": 1}, TypeError, "exact must be True or False, got 1"),
    (FUNCTIONS[1:], {"pos_margin": "a"}, TypeError, "pos_margin must be a number"),
    (FUNCTIONS[1:], {"neg_margin": float("inf")}, ValueError, "neg_margin must be finite"),
    (FUNCTIONS[1:], {"power": 3}, ValueError, "power must be one of 1, 2; got 3"),
    (FUNCTIONS[1:], {"power": True}, ValueError, "power must be one of 1, 2; got True"),
    (FUNCTIONS[1:], {"power": np.array([1, 2])}, ValueError, "power must be .*; got ndarray"),
    (FUNCTIONS[1:], {"power": torch.tensor([1, 2])}, ValueError, "power must be .*; got Tensor"),
    (FUNCTIONS, {"distance": np.array(["dot"] * 2)}, ValueError, "distance must be .*; got ndarr"),
    (FUNCTIONS, {"reduction": None}, ValueError, "reduction must be one of .*; got None"),
    (FUNCTIONS[1:], {"scale": None}, TypeError, "scale must be a number, got NoneType"),
]


@pytest.mark.parametrize(("functions", "options", "error", "message"), OPTION_ERRORS)
def test_option_errors(
    functions: list[Callable[..., Tensor]],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    modules = {triplet_margin_loss: TripletMarginLoss, contrastive_loss: ContrastiveLoss}
    for function in functions:
        with pytest.raises(error, match=message):
            function(X, LABELS, **options)
        with pytest.raises(error, match=message):
            modules[function](**options)


REF = {"ref_emb": X, "ref_labels": LABELS}
TENSOR_ERRORS = [
    ({"embeddings": [[1.0]]}, TypeError, "embeddings must be a tensor, got list"),
    ({"embeddings": X[0]}, ValueError, r"embeddings must have shape .*, got \(3,\)"),
    ({"embeddings": X.long()}, TypeError, "embeddings must be float32, .*, got int64"),
    ({"embeddings": X.to_sparse()}, TypeError, "embeddings must be a dense .* layout sparse_coo"),
    ({**REF, "ref_emb": X.to_sparse()}, TypeError, "ref_emb must be a dense tensor, got layout sp"),
    ({"labels": None}, ValueError, "labels must be given unless indices_tuple is; got None"),
    ({"labels": [0, 0, 1, 1]}, TypeError, "labels must be a tensor, got list"),
    ({"labels": LABELS[:3]}, ValueError, r"labels must have shape \[4\], .*; got \(3,\)"),
    ({"labels": LABELS[None]}, ValueError, r"labels must have shape \[4\], .*; got \(1, 4\)"),
    ({"labels": LABELS.float()}, TypeError, "labels must be int64, int32 or bool, got float32"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels must have the device .* cpu; got meta"),
    ({"ref_labels": LABELS}, ValueError, "ref_labels must come with ref_emb"),
    ({"ref_emb": X}, ValueError, "ref_labels must be given with ref_emb"),
    ({**REF, "ref_emb": 1}, TypeError, "ref_emb must be a tensor, got int"),
    ({**REF, "ref_emb": X[0]}, ValueError, "ref_emb must have shape"),
    ({**REF, "ref_emb": X[:, :2]}, ValueError, "ref_emb must have as many features .* 3; got"),
    ({**REF, "ref_emb": X.double()}, ValueError, "ref_emb must have the dtype .* float32; got f"),
    ({**REF, "ref_emb": X.to("meta")}, ValueError, "ref_emb must have the device of embeddings"),
    ({**REF, "ref_labels": LABELS[:2]}, ValueError, r"ref_labels must have shape \[4\], one label"),
    ({"indices_tuple": INDEX}, TypeError, "indices_tuple must be a tuple of tensors, got Tensor"),
    ({"indices_tuple": (INDEX,) * 2}, ValueError, "indices_tuple must hold 3 or 4 tensors, got 2"),
    ({"indices_tuple": (INDEX, INDEX, [0])}, TypeError, r"indices_tuple\[2\] must be a tensor"),
    (
        {"indices_tuple": (INDEX, INDEX[None], INDEX)},
        ValueError,
        r"indices_tuple\[1\] must have one dimension",
    ),
    ({"indices_tuple": (INDEX.int(), INDEX, INDEX)}, TypeError, "must be int64, got int32"),
    ({"indices_tuple": (INDEX.to("meta"), INDEX, INDEX)}, ValueError, "cpu; got meta"),
    (
        {"indices_tuple": (INDEX, INDEX, INDEX[:1])},
        ValueError,
        r"indices_tuple\[2\] must be as long as indices_tuple\[0\], 2; got 1",
    ),
    (
        {"indices_tuple": (INDEX, INDEX, INDEX, INDEX[:1])},
        ValueError,
        r"indices_tuple\[3\] must be as long as indices_tuple\[2\], 2; got 1",
    ),
    (
        {"indices_tuple": (INDEX, INDEX + 3, INDEX)},
        ValueError,
        r"indices_tuple\[1\] must hold row numbers from 0 to 3, got 3 to 4",
    ),
    ({"indices_tuple": (INDEX - 1, INDEX, INDEX)}, ValueError, "from 0 to 3, got -1 to 0"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("changed", "error", "message"), TENSOR_ERRORS)
def test_tensor_errors(
    changed: dict[str, Any],
    error: type[Exception],
    message: str,
    function: Callable[..., Tensor],
) -> None:
    arguments = {"embeddings": X, "labels": LABELS, **changed}
    with pytest.raises(error, match=message):
        function(arguments.pop("embeddings"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x must be a tensor, got list"),
        (X[0], ValueError, r"x must have shape .*, got \(3,\)"),
        (X.long(), TypeError, "x must be float32, .*, got int64"),
        (X.to_sparse(), TypeError, "x must be a dense tensor, got layout sparse_coo"),
    ],
)
def test_normalize_rows_errors(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalize_rows(x)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_any_real_number_will_do(number: Any) -> None:
    x, labels = make_rows(12, 4), make_labels(12)
    assert triplet_margin_loss(x, labels, margin=number).equal(
        triplet_margin_loss(x, labels, margin=0.5)
    )
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "power": 2}
        ours = contrastive_loss(
            x, labels, pos_margin=number, neg_margin=number, scale=number, **options
        )
        same = contrastive_loss(x, labels, pos_margin=0.5, neg_margin=0.5, scale=0.5, **options)
        assert ours.equal(same)
    contrastive_loss(x, labels, power=np.int64(2), neg_margin=np.int64(3)).backward()


REDUCED = [
    *(TripletMarginLoss(reduction=r) for r in ("mean", "mean_nonzero", "sum", "none")),
    TripletMarginLoss(swap=True, smooth=True),
    *(
        ContrastiveLoss(0.5, 3.0, reduction=r)
        for r in ("mean", "mean_separate", "mean_nonzero", "sum", "none")
    ),
]


@pytest.mark.parametrize("given", ["labels", "references", "indices"])
@pytest.mark.parametrize("loss", REDUCED, ids=repr)
def test_second_derivatives_are_refused(loss: nn.Module, given: str) -> None:
    x, r = make_rows(12, 4), make_rows(12, 4)
    options: dict[str, Any] = {"labels": make_labels(12)}
    if given == "references":
        options.update(ref_emb=r, ref_labels=make_labels(12))
    elif given == "indices":
        options = {"indices_tuple": tuple(torch.randint(12, (9,)) for _ in range(3))}
    leaves = [x, r] if given == "references" else [x]
    value = loss(x, **options).sum()
    plain = torch.autograd.grad(value, leaves, retain_graph=True)
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    for grad, expected in zip(grads, plain, strict=True):
        assert grad.equal(expected)
    for grad in grads:
        with pytest.raises(RuntimeError, match="first derivatives only"):
            (value + grad.square().sum()).backward(retain_graph=True)


def test_second_derivatives_of_normalized_rows_are_refused() -> None:
    x = make_rows(5, 4)
    value = (normalize_rows(x) * torch.randn(5, 4)).sum()
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()


def test_description_names_the_version() -> None:
    assert flashmetric._library.describe()["flashmetric"] == flashmetric.__version__


def test_a_training_step_separates_the_classes() -> None:
    net = nn.Linear(6, 3)
    x, labels = torch.randn(24, 6), torch.arange(24) % 3
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loss_function = TripletMarginLoss(1.0)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_function(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
