# SPDX-License-Identifier: Apache-2.0
"""Who is compared: every contender in one place, each called the way its users call it.

All contenders of a loss compute the same function of rows that already have unit length:

* triplet: batch-hard mining, Euclidean distance, margin 0.2, mean over the anchors;
* contrastive: all ordered pairs, Euclidean distance, positive margin 0, negative margin of the
  case; mean over the active positives plus mean over the active negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import loss_builders
from bench.loss_builders import Loss
from bench.loss_table import PML, ST

OURS = "flashmetric"
BARE = "bare x @ x.T"


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss.

    Attributes:
        name: As printed.
        build: Per kernel, a function of the margin that returns the loss. It imports what it
            needs; ImportError means that the contender is not installed.
        env: Environment of its process.
        differentiable: False if there is no backward to time.
        compiled: True if the first call at a size compiles.
        python: Key of another interpreter that may run it.
        preload: Modules that are slow to import.
        package: Distribution whose version the gate's line names.
    """

    name: str
    build: dict[str, Callable[[float], Loss]]
    env: dict[str, str] = field(default_factory=dict)
    differentiable: bool = True
    compiled: bool = False
    python: str = ""
    preload: tuple[str, ...] = ()
    package: str = ""


def flashmetric_triplet(margin: float) -> Loss:
    """The library's batch-hard triplet loss."""
    import flashmetric

    return flashmetric.TripletMarginLoss(margin=margin, distance="euclidean", reduction="mean")


def flashmetric_contrastive(margin: float) -> Loss:
    """The library's contrastive loss over all pairs."""
    import flashmetric

    return flashmetric.ContrastiveLoss(neg_margin=margin, reduction="mean_nonzero")


def flashmetric_hardest(margin: float) -> Loss:
    """The library's mining operator alone; returns the selected distances [2, N]."""
    import flashmetric  # noqa: F401  (registers the operator)

    return lambda x, labels: torch.ops.flashmetric.hardest(x, labels, None, None, "euclidean")[1]


def mined_distances(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mines on the Gram matrix without autograd, then recomputes the selected pairs.

    Half precision is for the product and the N x N keys: the O(N D) rest is widened.
    """
    with torch.no_grad():
        gram = x @ x.T
        # |x|^2 of the anchor is constant along its row and cannot change the choice.
        key = gram.diagonal() - 2 * gram  # [N, N]
        same = labels[:, None] == labels[None, :]
        positive = key.masked_fill(~same, float("-inf")).argmax(1)
        negative = key.masked_fill(same, float("inf")).argmin(1)
    x = x.float()
    return (x - x[positive]).norm(dim=1), (x - x[negative]).norm(dim=1)


def best_hardest(margin: float) -> Loss:
    """The selected distances [2, N] of the best plain form."""
    return lambda x, labels: torch.stack(mined_distances(x, labels))


def best_triplet(margin: float) -> Loss:
    """The best plain form of the triplet loss: mining, then a loss over two distances per row."""

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        to_positive, to_negative = mined_distances(x, labels)
        return torch.relu(to_positive - to_negative + margin).mean()

    return loss


def naive_triplet(margin: float) -> Loss:
    """The textbook form: all distances under autograd, masks, row maximum and minimum."""

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        distance = torch.cdist(x, x)
        same = labels[:, None] == labels[None, :]
        to_positive = distance.masked_fill(~same, 0.0).amax(1)
        to_negative = distance.masked_fill(same, float("inf")).amin(1)
        return torch.relu(to_positive - to_negative + margin).mean()

    return loss


def plain_contrastive(margin: float) -> Loss:
    """All distances from the Gram matrix, clamped before the square root to keep gradients finite.

    About twice as fast as the same loss on torch.cdist, whose backward is not a matrix product.
    """

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        norm = (x * x).sum(1)
        squared = torch.addmm(norm[:, None] + norm[None, :], x, x.T, alpha=-2)
        # float16 knows neither 1e-12 nor the sum of a million terms.
        distance = squared.float().clamp_min(1e-12).sqrt()
        same = labels[:, None] == labels[None, :]
        positive = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        pull = torch.where(positive, distance, 0.0)
        push = torch.where(same, 0.0, torch.relu(margin - distance))
        pull = pull.sum() / (pull > 0).sum().clamp_min(1)
        return pull + push.sum() / (push > 0).sum().clamp_min(1)

    return loss


def compiled(build: Callable[[float], Loss]) -> Callable[[float], Loss]:
    """Wraps a builder so that its loss goes through torch.compile, one graph per size."""
    return lambda margin: torch.compile(build(margin), dynamic=False, fullgraph=True)


def pml_triplet(margin: float) -> Loss:
    """pytorch-metric-learning: BatchHardMiner feeding TripletMarginLoss."""
    from pytorch_metric_learning import distances, losses, miners, reducers

    distance = distances.LpDistance(normalize_embeddings=False)
    miner = miners.BatchHardMiner(distance=distance)
    function = losses.TripletMarginLoss(
        margin=margin, distance=distance, reducer=reducers.MeanReducer()
    )
    return lambda x, labels: function(x, labels, miner(x, labels))


def pml_hardest(margin: float) -> Loss:
    """pytorch-metric-learning: BatchHardMiner, then the distances [2, N] of what it selected."""
    from pytorch_metric_learning import distances, miners

    miner = miners.BatchHardMiner(distance=distances.LpDistance(normalize_embeddings=False))

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        anchor, positive, negative = miner(x, labels)
        return torch.stack([(x[anchor] - x[i]).norm(dim=1) for i in (positive, negative)])

    return loss


def pml_contrastive(margin: float) -> Loss:
    """pytorch-metric-learning: ContrastiveLoss with its own reducer."""
    from pytorch_metric_learning import distances, losses

    return losses.ContrastiveLoss(
        neg_margin=margin, distance=distances.LpDistance(normalize_embeddings=False)
    )


def sentence_transformers_triplet(margin: float) -> Loss:
    """sentence-transformers: the function inside BatchHardTripletLoss, without a model."""
    try:
        from sentence_transformers.sentence_transformer.losses import BatchHardTripletLoss
    except ModuleNotFoundError:  # where earlier releases have it
        from sentence_transformers.losses import BatchHardTripletLoss

    function = BatchHardTripletLoss(model=None, margin=margin)
    return lambda x, labels: function.batch_hard_triplet_loss(labels, x)


def bare_product(margin: float) -> Loss:
    """Only the product that every unfused form starts with."""
    return lambda x, labels: x @ x.T


CONTENDERS = (
    Contender(
        OURS,
        {
            "triplet": flashmetric_triplet,
            "contrastive": flashmetric_contrastive,
            "hardest": flashmetric_hardest,
            **loss_builders.builds("ours"),
        },
        env={"FLASHMETRIC_REQUIRE_NATIVE": "1"},
    ),
    Contender(
        "flashmetric fallback",
        {"triplet": flashmetric_triplet, "contrastive": flashmetric_contrastive},
        env={"FLASHMETRIC_BACKEND": "python", "FLASHMETRIC_REQUIRE_NATIVE": "0"},
    ),
    Contender("torch best", {"triplet": best_triplet, "contrastive": plain_contrastive}),
    Contender("torch naive", {"triplet": naive_triplet}),
    Contender(
        "torch.compile best",
        {"triplet": compiled(best_triplet), "contrastive": compiled(plain_contrastive)},
        compiled=True,
        preload=("torch._inductor.compile_fx",),
    ),
    Contender(
        PML,
        {"triplet": pml_triplet, "contrastive": pml_contrastive, **loss_builders.builds(PML)},
        preload=("pytorch_metric_learning.losses", "pytorch_metric_learning.miners"),
        package=PML,
    ),
    Contender(
        ST,
        {"triplet": sentence_transformers_triplet, **loss_builders.builds(ST)},
        python="st",
        preload=("sentence_transformers.sentence_transformer.losses",),
        package=ST,
    ),
    Contender(
        BARE,
        {
            "triplet": bare_product,
            "contrastive": bare_product,
            **loss_builders.builds("bare"),
        },
        differentiable=False,
    ),
)


def contenders_of(kernel: str) -> list[Contender]:
    """Lists who computes a kernel, the library first."""
    return [contender for contender in CONTENDERS if kernel in contender.build]


def find(name: str) -> Contender:
    """Returns the contender of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)
