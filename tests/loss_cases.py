# SPDX-License-Identifier: Apache-2.0
"""Every loss of the catalog, and variants with learned numbers, in the form of their calls."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import flashmetric
from flashmetric import LearnedTemperature, distances
from flashmetric.catalog import ENTRIES
from flashmetric.catalog.entry import Call

FEATURES = 6
CLASSES = 6
PER_CLASS = 4
ROWS = CLASSES * PER_CLASS


@dataclass(frozen=True)
class Case:
    """A loss, and what it is called with."""

    name: str
    make: Callable[[], nn.Module]
    call: Call = "batch"
    one_graph: bool = True
    """Whether no shape depends on the labels, so that nothing waits for the device."""

    def __call__(self, loss: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch in the form that it is called in."""
        half = len(x) // 2
        if self.call == "towers":
            return loss(x[:half], ref_emb=x[half : 2 * half])
        if self.call == "scores":
            similar = labels[:half] % 2
            return loss(x[:half], similar.unsqueeze(1).expand(-1, x.shape[1]))
        return loss(x, labels)

    def loss(self) -> nn.Module:
        """A new loss; its learned numbers are the same every time."""
        torch.manual_seed(0)
        return self.make()


def _of(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(flashmetric, name)(**options)


def _with_margins() -> nn.Module:
    return flashmetric.TripletMarginLoss(
        nn.Parameter(torch.linspace(0.1, 0.4, CLASSES**2).view(CLASSES, CLASSES)),
        mining="batch_all",
        max_positives=PER_CLASS,
    )


def _share_of_positives(pairs: flashmetric.functional.Pairs) -> Tensor:
    logit = flashmetric.functional.Logit(-2.0)
    lse = pairs.logsumexp(logit, logit)
    return (torch.logaddexp(lse.positive, lse.negative) - lse.positive).mean()


_SIZED: dict[str, dict[str, object]] = {
    # Without these the positives are counted, which waits for the device.
    "LiftedStructureLoss": {"max_positives": PER_CLASS},
    "QuadrupletLoss": {"class_size": PER_CLASS},
    "TripletRatioLoss": {"max_positives": PER_CLASS},
    "AngularLoss": {"max_positives": PER_CLASS},
}

PLAIN = [Case(e.name, _of(e.name, **dict(e.example)), e.call, e.one_graph) for e in ENTRIES]
SIZED = [
    Case(f"{e.name}-sized", _of(e.name, **dict(e.example), **_SIZED[e.name]), e.call)
    for e in ENTRIES
    if e.name in _SIZED
]
LEARNED = [
    Case("NTXentLoss-learned", lambda: flashmetric.NTXentLoss(LearnedTemperature(0.2))),
    Case("SupConLoss-learned", lambda: flashmetric.SupConLoss(LearnedTemperature(0.2), form="in")),
    Case("InfoNCELoss-learned", lambda: flashmetric.InfoNCELoss(LearnedTemperature(0.2)), "towers"),
    Case("MarginLoss-learned", _of("MarginLoss", learn_beta=True)),
    Case(
        "MarginLoss-classes",
        _of("MarginLoss", learn_beta=True, num_classes=CLASSES, nu=0.1),
        "classes",
    ),
    Case("TripletMarginLoss-margins", _with_margins, "classes"),
    Case(
        "TripletMarginLoss-mahalanobis",
        lambda: flashmetric.TripletMarginLoss(distance=distances.LearnedMahalanobis(FEATURES)),
    ),
    Case(
        "ContrastiveLoss-cityblock",
        lambda: flashmetric.ContrastiveLoss(
            distance=distances.Cityblock(nn.Parameter(torch.linspace(0.5, 1.5, FEATURES)))
        ),
    ),
    Case(
        "PairLoss",
        lambda: flashmetric.PairLoss(
            _share_of_positives, distance=distances.LearnedMahalanobis(FEATURES, 4)
        ),
    ),
]
VARIANTS = [
    Case(
        "TripletMarginLoss-batch_all",
        _of("TripletMarginLoss", mining="batch_all", max_positives=PER_CLASS),
    ),
    Case(
        "TripletMarginLoss-semi_hard",
        _of("TripletMarginLoss", mining="semi_hard", max_positives=PER_CLASS),
    ),
    Case("TripletMarginLoss-easy", _of("TripletMarginLoss", mining="easy_positive")),
    Case("MultiSimilarityLoss-mining", _of("MultiSimilarityLoss", mining=True)),
    Case("ContrastiveLoss-snr", lambda: flashmetric.ContrastiveLoss(distance=distances.SNR())),
]
CASES = [*PLAIN, *SIZED, *LEARNED, *VARIANTS]


def name_of(case: object) -> str | None:
    return case.name if isinstance(case, Case) else None


def labels_of(n: int = ROWS) -> Tensor:
    """Classes from 0, of four rows each."""
    return torch.arange(n) % CLASSES


def rows(n: int = ROWS, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows near unit length, none negative: the chi-squared distance asks for that."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    return x.abs().mul_(0.4).to(dtype)


class Model(nn.Module):
    """An encoder and the loss of what it yields."""

    def __init__(self, case: Case, features: int = 5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(features, FEATURES)
        self.loss = case.loss()
        self.case = case

    def embeddings(self, inputs: Tensor) -> Tensor:
        """Rows that are not negative."""
        return self.encoder(inputs).square()

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.case(self.loss, self.embeddings(inputs), labels)
