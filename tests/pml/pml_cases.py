# SPDX-License-Identifier: Apache-2.0
"""Fused losses of flashmetric.pml beside their parents: settings, calls, what must agree."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.distances import (
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DivisorReducer,
    MeanReducer,
    PerAnchorReducer,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from flashmetric.pml import losses
from presets import assert_same, labelled_rows

Options = dict[str, Callable[[], Any]]

LP: Options = {
    "l2": LpDistance,
    "l2-squared": lambda: LpDistance(power=2),
    "l2-plain": lambda: LpDistance(normalize_embeddings=False),
    "l1": lambda: LpDistance(p=1),
}
SIMILARITIES: Options = {
    "cosine": CosineSimilarity,
    "cosine-l1": lambda: CosineSimilarity(p=1),
    "dot": lambda: DotProductSimilarity(normalize_embeddings=False),
}
SUMMED: Options = {"mean": MeanReducer, "sum": SumReducer, "nonzero": AvgNonZeroReducer}
LISTED: Options = {
    "classes": lambda: ClassWeightedReducer(torch.arange(1.0, 9.0)),
    "above": lambda: ThresholdReducer(low=0.1),
    "mean": MeanReducer,
    "anchors": PerAnchorReducer,
}
CALLS = ("batch", "references", "views", "triplets", "pairs", "listed-references")


def _default(name: str) -> Options:
    return {name: lambda: None}


def settings() -> Iterator[tuple[str, str, dict[str, Callable[[], Any]]]]:
    """Id, class, and constructors of arguments."""
    lengths = {"l2": LpDistance, "dot": SIMILARITIES["dot"]}
    every = {**LP, **SIMILARITIES}
    table: list[tuple[str, dict[str, Any], Options, Options]] = [
        ("TripletMarginLoss", {}, every, SUMMED),
        ("TripletMarginLoss", {"margin": 0.3, "smooth_loss": True}, LP, SUMMED),
        ("ContrastiveLoss", {"pos_margin": 0.2, "neg_margin": 1.1}, LP, SUMMED),
        ("ContrastiveLoss", {"pos_margin": 0.9, "neg_margin": 0.1}, SIMILARITIES, SUMMED),
        ("ContrastiveLoss", {}, {"snr": SNRDistance}, SUMMED),
        ("SignalToNoiseRatioContrastiveLoss", {"neg_margin": 1.9}, _default("snr"), SUMMED),
        ("IntraPairVarianceLoss", {"pos_eps": 0.1, "neg_eps": 0.2}, lengths, SUMMED),
        (
            "NTXentLoss",
            {"temperature": 0.8},
            {**LP, **SIMILARITIES},
            {"mean": MeanReducer, "sum": SumReducer},
        ),
        ("MarginLoss", {"beta": 1.25}, lengths, {"divisor": DivisorReducer, **SUMMED}),
        ("MultiSimilarityLoss", {"alpha": 3, "beta": 20, "base": 0.4}, every, LISTED),
        ("CircleLoss", {"m": 0.3, "gamma": 30}, _default("cosine"), LISTED),
        ("SupConLoss", {"temperature": 0.8}, every, LISTED),
        ("GeneralizedLiftedStructureLoss", {"pos_margin": 0.1}, every, LISTED),
        ("LiftedStructureLoss", {"pos_margin": 0.1}, every, LISTED),
        ("TupletMarginLoss", {}, _default("cosine"), LISTED),
        ("AngularLoss", {}, _default("l2"), LISTED),
        ("NCALoss", {"softmax_scale": 0.7}, every, LISTED),
        ("NPairsLoss", {}, every, LISTED),
        ("FastAPLoss", {"num_bins": 7}, _default("l2-squared"), LISTED),
        ("RankedListLoss", {"margin": 0.4, "Tn": 0}, LP, LISTED),
        ("SoftTripleLoss", {"num_classes": 8, "embedding_size": 6}, _default("cosine"), LISTED),
    ]
    for name, arguments, distances, reducers in table:
        fixed = {key: (lambda value=value: value) for key, value in arguments.items()}
        smooth = "-smooth" if "smooth_loss" in arguments else ""
        first = next(iter(reducers))
        for distance, make in distances.items():
            # Every distance with the first reducer, and every reducer with the first distance.
            chosen = reducers if distance == next(iter(distances)) else [first]
            for reducer in chosen:
                options = {**fixed, "distance": make, "reducer": reducers[reducer]}
                yield f"{name}{smooth}-{distance}-{reducer}", name, options
        yield (
            f"{name}{smooth}-regularized",
            name,
            {**fixed, "embedding_regularizer": LpRegularizer, "embedding_reg_weight": lambda: 0.1},
        )


SETTINGS = list(settings())
SELF_ONLY = {"NPairsLoss", "FastAPLoss", "RankedListLoss", "SoftTripleLoss"}
PAIRWISE = {"LiftedStructureLoss", "TupletMarginLoss", "AngularLoss"}


def supported(name: str, setting: str, call: str) -> bool:
    """Whether the parent can compute it."""
    references = call in ("references", "views", "listed-references")
    if name in SELF_ONLY and references:
        return False
    if name == "RankedListLoss" and call in ("triplets", "pairs"):
        return False
    # Their losses have one column more than this reducer can take.
    return not (setting.endswith("-anchors") and name in PAIRWISE)


def build(name: str, options: dict[str, Callable[[], Any]]) -> tuple[Any, Any]:
    """Ours and the parent's, with equal parameters."""
    arguments = [{key: make() for key, make in options.items()} for _ in range(2)]
    given = [{k: v for k, v in each.items() if v is not None} for each in arguments]
    ours, theirs = getattr(losses, name)(**given[0]), getattr(peer, name)(**given[1])
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def forbid_matrices(module: Any) -> None:
    """No distance matrix may be computed by this loss or miner."""

    def compute_mat(*_: Any) -> None:
        raise AssertionError("the parent's code was reached")

    module.distance.compute_mat = compute_mat


def arguments(call: str, dtype: torch.dtype) -> tuple[Tensor, tuple[Any, ...], Tensor | None]:
    """Rows, what follows them in the call but for the references, and those."""
    x, labels = labelled_rows(16, 6, 4, dtype)
    labels[0] = 7  # an anchor without a positive
    if call == "batch":
        return x, (labels,), None
    if call in ("triplets", "pairs"):
        return x, (labels, listed(call, labels, labels)), None
    n = 16 if call == "views" else 13
    refs, ref_labels = labelled_rows(n, 6, 5, dtype, seed=1)
    if call == "views":
        return x, (labels, None, labels), refs
    indices = listed("pairs", labels, ref_labels) if call == "listed-references" else None
    return x, (labels, indices, ref_labels), refs


def listed(kind: str, labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, ...]:
    """A third of all triplets or pairs."""
    generator = torch.Generator().manual_seed(5)
    if kind == "triplets":
        every = loss_and_miner_utils.get_all_triplets_indices(labels, ref_labels)
        keep = torch.rand(len(every[0]), generator=generator) < 0.3
        return tuple(index[keep] for index in every)
    a1, p, a2, n = loss_and_miner_utils.get_all_pairs_indices(labels, ref_labels)
    some = torch.rand(len(a1), generator=generator) < 0.5
    others = torch.rand(len(a2), generator=generator) < 0.3
    return a1[some], p[some], a2[others], n[others]


def outcome(
    loss: Any, x: Tensor, rest: tuple[Any, ...], refs: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients in the rows, the references and the parameters."""
    x = x.clone().requires_grad_()
    labels, indices, ref_labels = (*rest, None, None)[:3]
    if refs is None:
        value = loss(x, labels, indices)
    else:
        refs = refs.clone().requires_grad_()
        value = loss(x, labels, indices, refs, ref_labels)
    value.sum().backward()
    leaves = [x, *([] if refs is None else [refs]), *loss.parameters()]
    return value.detach(), [torch.zeros_like(y) if y.grad is None else y.grad for y in leaves]


def check(ours: Any, theirs: Any, *call: Any) -> None:
    """Loss and gradients agree, and so do dtype and shape."""
    value, grads = outcome(ours, *call)
    peer_value, peer_grads = outcome(theirs, *call)
    assert (value.dtype, value.shape) == (peer_value.dtype, peer_value.shape)
    assert_same([value, *grads], [peer_value, *peer_grads])
