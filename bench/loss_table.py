# SPDX-License-Identifier: Apache-2.0
"""Every loss of the package against the peer that defines it the same way.

A line is a kernel of the benchmark like the triplet and the contrastive loss; ``python -m bench
--losses`` runs them all. Peers get the same rows, of unit length, and hyper-parameters under which
both compute the same function: the gate holds them to that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bench.cases import Case

Loss = Callable[[Tensor, Tensor], Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One loss of the table.

    Attributes:
        name: Class of the package.
        options: Its arguments.
        n: Batch size.
        per_class: Rows per class.
        pml: Class of pytorch-metric-learning and its arguments; None if it has none like it.
        sentence_transformers: Likewise, with the method that takes (labels, embeddings).
        also: Further batch sizes.
        towers: Called with the two halves of the batch instead of labels.
        kernel: Key of the line, where the class alone is ambiguous.
    """

    name: str
    options: Options
    n: int = 2048
    per_class: int = 8
    pml: tuple[str, Options] | None = None
    sentence_transformers: tuple[str, str, Options] | None = None
    also: tuple[int, ...] = ()
    towers: bool = False
    label: str = ""

    @property
    def kernel(self) -> str:
        """Name of the line."""
        return self.label or self.name

    def cases(self, features: int) -> list[Case]:
        """The line's batch sizes, small ones first."""
        sizes = sorted((self.n, *self.also))
        return [Case(self.kernel, n, features, per_class=self.per_class) for n in sizes]


def ours(line: Line) -> Loss:
    """The package's loss."""
    import flashmetric

    loss = getattr(flashmetric, line.name)(**line.options)
    if line.towers:
        return lambda x, labels: loss(x[: len(x) // 2], ref_emb=x[len(x) // 2 :])
    return loss


def pml(line: Line) -> Loss:
    """pytorch-metric-learning's."""
    from pytorch_metric_learning import losses

    name, options = line.pml
    return getattr(losses, name)(**options)


def sentence_transformers(line: Line) -> Loss:
    """sentence-transformers', the function inside the module, without a model."""
    from sentence_transformers.sentence_transformer import losses

    name, method, options = line.sentence_transformers
    function = getattr(getattr(losses, name)(model=None, **options), method)
    return lambda x, labels: function(labels, x)


_BUILDERS = {"ours": ours, "pml": pml, "sentence_transformers": sentence_transformers}

LINES = (
    Line("MultiSimilarityLoss", {}, 4096, pml=("MultiSimilarityLoss", {}), also=(512,)),
    Line("SupConLoss", {}, 4096, pml=("SupConLoss", {}), also=(512,)),
    Line("InfoNCELoss", {}, 4096, per_class=2, also=(512,)),
    Line("NTXentLoss", {}, 512, per_class=4, pml=("NTXentLoss", {}), also=(4096,)),
    Line("CircleLoss", {}, 4096, pml=("CircleLoss", {})),
    Line("SigLIPLoss", {}, 4096, towers=True),
    Line("ContrastiveImageTextLoss", {}, 4096, towers=True),
    Line("LiftedStructureLoss", {}, pml=("LiftedStructureLoss", {}), also=(256,)),
    Line("GeneralizedLiftedStructureLoss", {}, pml=("GeneralizedLiftedStructureLoss", {})),
    Line("NPairsLoss", {}, per_class=2, pml=("NPairsLoss", {})),
    Line("RankedListLoss", {}, pml=("RankedListLoss", {"margin": 0.4, "Tn": 10.0})),
    Line("FastAPLoss", {}, pml=("FastAPLoss", {})),
    Line("MarginLoss", {}, pml=("MarginLoss", {}), also=(512,)),
    Line("NCALoss", {}, pml=("NCALoss", {})),
    Line("AngularLoss", {}, per_class=2, pml=("AngularLoss", {})),
    Line("BinomialDevianceLoss", {}),
    Line("SNRContrastiveLoss", {}, pml=("SignalToNoiseRatioContrastiveLoss", {})),
    Line(
        "TripletMarginLoss",
        {"mining": "batch_all", "margin": 0.2},
        4096,
        per_class=64,
        also=(256, 512),
        sentence_transformers=("BatchAllTripletLoss", "batch_all_triplet_loss", {"margin": 0.2}),
        label="batch-all triplet",
    ),
    Line(
        "TripletMarginLoss",
        {"mining": "semi_hard", "margin": 0.2},
        label="semi-hard triplet",
    ),
    Line("TripletRatioLoss", {}, 1024, label="Hoffer's ratio"),
)


def builds(whose: str) -> dict[str, Callable[[float], Loss]]:
    """Per line that has such a contender, a function that makes its loss."""
    chosen = [line for line in LINES if whose == "ours" or getattr(line, whose) is not None]
    return {line.kernel: lambda _, line=line: _BUILDERS[whose](line) for line in chosen}


def grid(features: int = 128, quick: bool = False) -> list[Case]:
    """The cases of ``--losses``."""
    cases = [case for line in LINES for case in line.cases(features)]
    return [case for case in cases if case.n <= 512] if quick else cases
