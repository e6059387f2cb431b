# SPDX-License-Identifier: Apache-2.0
"""Every loss of the package beside the peers that define it the same way, or nearly so.

A line is a kernel of the benchmark like the triplet and the contrastive loss; ``python -m bench
--losses`` runs them all. Peers get the same rows, of unit length, and hyper-parameters under which
both compute the same function: the gate holds them to that. Where no hyper-parameters reach that,
the line has the nearest form, and its note, which the report prints, says what differs.

A peer that scales rows to unit length differentiates through that, so ours does so as well.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from bench.cases import Case

Options = dict[str, Any]
PML, ST = "pytorch-metric-learning", "sentence-transformers"
QUICK_ROWS = 256


@dataclass(frozen=True)
class Peer:
    """A loss of another library.

    Attributes:
        name: Its class.
        options: Its arguments. A pair (class, arguments) is a distance or a reducer of PML.
        method: For sentence-transformers, the method that takes (labels, embeddings).
        normalized: Called with rows scaled to unit length, which its users do themselves.
        note: What is not the same; printed in the table.
        judged_by: Another line whose function it computes, and by which the gate judges it.
        limits: Largest relative errors of loss and gradient, where the gate's own are too tight.
        grows: Its memory and time grow with N to this power.
        step: If set, the largest batch that fits into memory is looked for, to this many rows.
    """

    name: str
    options: Options = field(default_factory=dict)
    method: str = ""
    normalized: bool = False
    note: str = ""
    judged_by: str = ""
    limits: tuple[float, float] | None = None
    grows: int = 2
    step: int = 0


@dataclass(frozen=True)
class Line:
    """One loss of the table.

    Attributes:
        name: Class of the package.
        options: Its arguments; ``preset`` is the name of a preset.
        n: Batch size; of each tower, if there are two.
        per_class: Rows per class.
        pml: Loss of pytorch-metric-learning; None if it has none like it.
        st: Likewise of sentence-transformers.
        also: Further batch sizes.
        call: What the loss is called with, as in ``flashmetric.catalog``.
        label: Name of the line, if that of the class is ambiguous.
        formula: A loss of one's own for ``flashmetric.pair_loss`` in place of the class, by its
            name in ``loss_builders``.
        note: Printed in the table.
    """

    name: str
    options: Options = field(default_factory=dict)
    n: int = 2048
    per_class: int = 8
    pml: Peer | None = None
    st: Peer | None = None
    also: tuple[int, ...] = ()
    call: Literal["batch", "towers", "scores", "classes"] = "batch"
    label: str = ""
    formula: str = ""
    note: str = ""

    @property
    def kernel(self) -> str:
        """Name of the line."""
        return self.label or self.name

    @property
    def peers(self) -> dict[str, Peer]:
        """Its peers by the name of the contender."""
        both = {PML: self.pml, ST: self.st}
        return {name: peer for name, peer in both.items() if peer is not None}

    def case(self, n: int, features: int) -> Case:
        """The line at one batch size."""
        towers = self.call == "towers"
        per_class = 2 if towers else self.per_class
        return Case(self.kernel, n, features, per_class=per_class, towers=towers)

    def cases(self, features: int) -> list[Case]:
        """The line's batch sizes, small ones first."""
        return [self.case(n, features) for n in sorted((self.n, *self.also))]


_ALL_TRIPLETS = "MarginLoss over triplets"
_UNIT = {"preset": "pml"}  # normalises, as the peer does
_CUBE = "it holds positive pairs x negative pairs"

LINES = (
    # Log-sum-exps.
    Line("MultiSimilarityLoss", {}, 4096, pml=Peer("MultiSimilarityLoss")),
    Line("SupConLoss", {}, 4096, pml=Peer("SupConLoss")),
    Line(
        "InfoNCELoss",
        {},
        4096,
        call="towers",
        pml=Peer(
            "SupConLoss",
            {"temperature": 0.07},
            note="its NTXentLoss holds N x N^2 numbers; with one positive, its SupConLoss is the "
            "same function",
        ),
        st=Peer("MultipleNegativesRankingLoss", {"scale": 1 / 0.07}),
        note="two towers of N rows: no symmetry to use",
    ),
    Line(
        "InfoNCELoss",
        {},
        4096,
        per_class=2,
        pml=Peer("SupConLoss", {"temperature": 0.07}, note="as for the two towers"),
        label="InfoNCELoss, one batch",
    ),
    Line(
        "NTXentLoss",
        {},
        512,
        per_class=4,
        pml=Peer("NTXentLoss", note=_CUBE, grows=3),
        also=(4096,),
    ),
    Line("CircleLoss", {}, 4096, pml=Peer("CircleLoss")),
    Line(
        "ContrastiveImageTextLoss",
        {},
        4096,
        call="towers",
        st=Peer(
            "MultipleNegativesRankingLoss",
            {
                "scale": 1 / 0.07,
                "directions": ("query_to_doc", "doc_to_query"),
                "partition_mode": "per_direction",
            },
        ),
        note="learns the temperature; the peer's is a number",
    ),
    Line(
        "LiftedStructureLoss",
        _UNIT,
        pml=Peer("LiftedStructureLoss", note=_CUBE, grows=3),
        also=(256,),
    ),
    Line("GeneralizedLiftedStructureLoss", _UNIT, pml=Peer("GeneralizedLiftedStructureLoss")),
    Line(
        "NPairsLoss",
        _UNIT,
        per_class=2,
        pml=Peer("NPairsLoss"),
        note="N/2 anchors with N/2 positives",
    ),
    Line(
        "RankedListLoss",
        {"neg_temperature": 0.0},
        pml=Peer(
            "RankedListLoss",
            {"margin": 0.4, "Tn": 0.0},
            note="temperatures 0, where the definitions meet; it adds 1e-5 per row to each divisor",
            limits=(1e-3, 2e-3),
        ),
    ),
    Line(
        "RankedListLoss",
        {},
        pml=Peer(
            "RankedListLoss",
            {"margin": 0.4, "Tn": 10.0},
            note="differentiates its weights, which are constants in the paper: gradient not gated",
            limits=(1e-3, float("inf")),
        ),
        label="RankedListLoss, weighted",
    ),
    Line("NCALoss", _UNIT, pml=Peer("NCALoss")),
    Line(
        "AngularLoss",
        _UNIT,
        per_class=2,
        pml=Peer("AngularLoss", normalized=True, note="given unit rows: it leaves negatives as is"),
    ),
    Line("AdaptiveWeightedTripletLoss"),
    Line(
        "SoftTripletLoss",
        {"num_classes": 256, "tau": 0.0},
        call="classes",
        pml=Peer("SoftTripleLoss", {"num_classes": 256}),
        note="2560 centres; without the regulariser, which the peer has as an option",
    ),
    # Histograms and sums over pairs.
    Line("FastAPLoss", {}, pml=Peer("FastAPLoss")),
    Line(
        "ContrastiveLoss",
        {"normalize": True},
        pml=Peer("ContrastiveLoss"),
    ),
    Line(
        "MarginLoss",
        {},
        pml=Peer(
            "MarginLoss",
            note="averages over all triplets, so a pair counts once per triplet; gated by that "
            "formula",
            judged_by=_ALL_TRIPLETS,
        ),
    ),
    Line(
        "MarginLoss",
        {"normalize": True},
        512,
        pml=Peer("MarginLoss"),
        label=_ALL_TRIPLETS,
        formula="margin_over_triplets",
        note="the peer's mean, by pair_loss on counts instead of triplets",
    ),
    Line(
        "SNRContrastiveLoss",
        _UNIT,
        1024,
        pml=Peer("SignalToNoiseRatioContrastiveLoss", note="it holds N x N x D numbers"),
    ),
    Line("SigLIPLoss", {}, 4096, call="towers"),
    Line("BinomialDevianceLoss"),
    Line("ExponentialContrastiveLoss", {"q": 2.0}, note="L1 distances: no matrix product"),
    Line("LogisticDistanceLoss"),
    Line("SigmoidVerificationLoss"),
    Line("CosineTargetLoss"),
    Line("CosineEmbeddingLoss"),
    Line("CosineContrastiveLoss"),
    Line("VerificationLoss", {}, note="L1 distances: no matrix product"),
    Line("PairHingeLoss", {"label_convention": "similar=1"}, call="scores", note="N D scores"),
    # Triplets.
    Line(
        "TripletMarginLoss",
        {"margin": 0.2},
        st=Peer("BatchHardTripletLoss", {"margin": 0.2}, "batch_hard_triplet_loss"),
        label="batch-hard triplet",
    ),
    Line(
        "TripletMarginLoss",
        {"mining": "batch_all", "margin": 0.2, "reduction": "mean_nonzero"},
        4096,
        per_class=64,
        also=(512,),
        st=Peer("BatchAllTripletLoss", {"margin": 0.2}, "batch_all_triplet_loss", step=64),
        label="batch-all triplet",
    ),
    Line(
        "TripletMarginLoss",
        {"mining": "semi_hard", "margin": 0.2},
        st=Peer("BatchSemiHardTripletLoss", {"margin": 0.2}, "batch_semi_hard_triplet_loss"),
        label="semi-hard triplet",
    ),
    Line("TripletRatioLoss"),
    Line("TripletQuotientLoss"),
    Line("QuadrupletLoss"),
    Line("LMNNLoss"),
)


def find(kernel: str) -> Line | None:
    """The line of that name, or None for the kernels of the other benchmark."""
    return next((line for line in LINES if line.kernel == kernel), None)


def peer(kernel: str, contender: str) -> Peer | None:
    """The peer that a contender is in a line; None for ours and the bare product."""
    line = find(kernel)
    return line.peers.get(contender) if line else None


def grid(features: int = 128, quick: bool = False, only: list[str] | None = None) -> list[Case]:
    """The cases of ``--losses``.

    Args:
        features: Features of every case.
        quick: One small batch per line.
        only: Names of lines or classes; all if None or empty.

    Returns:
        The cases in the order of the table, small batches of a line first.
    """
    lines = [line for line in LINES if not only or {line.name, line.kernel} & set(only)]
    if quick:
        return [line.case(min(line.n, QUICK_ROWS), features) for line in lines]
    return [case for line in lines for case in line.cases(features)]
