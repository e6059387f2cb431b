# SPDX-License-Identifier: Apache-2.0
"""What is timed: batch sizes, data and loss settings. Every contender of a case gets the same."""

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES_PER_CLASS = 8
TRIPLET_MARGIN = 0.2
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
DIMS = (64, 128, 256, 512, 1024)

# Contrastive work depends on how many negatives lie inside the margin. "few" is a batch late in
# training, "half" one at its start. The margin is set from the data to reach these shares.
ACTIVE_SHARE = {"few": 0.02, "half": 0.5}


@dataclass(frozen=True)
class Case:
    """One problem: a loss at one size.

    Attributes:
        kernel: ``"triplet"``, ``"contrastive"``, ``"hardest"`` (the bare mining operator), or the
            class of a loss of ``loss_table``.
        n: Batch size.
        d: Features per embedding.
        activity: Key of ``ACTIVE_SHARE``; only contrastive cases have one.
        per_class: Rows per class.
        towers: Two towers of N rows each, row i of one in the class of row i of the other.
    """

    kernel: str
    n: int
    d: int
    activity: str = ""
    per_class: int = SAMPLES_PER_CLASS
    towers: bool = False

    @property
    def title(self) -> str:
        """Row label, for example ``contrastive (half) N=4096 D=128``."""
        return f"{self.label} N={self.n} D={self.d}"

    @property
    def label(self) -> str:
        """Name of the series the case belongs to."""
        return f"{self.kernel} ({self.activity})" if self.activity else self.kernel


@dataclass(frozen=True)
class Setting:
    """What the data of a case implies for its loss.

    Attributes:
        margin: Triplet margin, or the margin of the negative pairs.
        active: Share of triplets (or of negative pairs) with a loss above zero; of neither for the
            losses of the table, whose margins are their own.
    """

    margin: float
    active: float


def draw(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draws unit embeddings around one centre per class, rows shuffled.

    Args:
        case: Its size is used.
        seed: Seed of the generator.

    Returns:
        Embeddings [N, D], float32, and labels [N], int64; [2 N, D] and [2 N] of two towers, the
        first of them in the first half.
    """
    generator = torch.Generator().manual_seed(seed)
    count = case.n * (1 + case.towers)
    classes = -(-count // case.per_class)
    centres = torch.nn.functional.normalize(torch.randn(classes, case.d, generator=generator))
    # Tight and loose classes: some anchors satisfy the margin and some do not, at every D.
    spread = 0.3 + 1.5 * torch.rand(classes, 1, generator=generator)
    labels = torch.arange(count) // case.per_class
    noise = torch.randn(count, case.d, generator=generator) / case.d**0.5
    x = torch.nn.functional.normalize(centres[labels] + spread[labels] * noise)
    order = torch.randperm(count, generator=generator)
    if case.towers:
        order = torch.arange(count).view(-1, 2).T.flatten()
    return x[order].contiguous(), labels[order].contiguous()


def settle(case: Case) -> Setting:
    """Finds the margin that gives a contrastive case its activity, and measures the share.

    Args:
        case: The case; its data are drawn again.

    Returns:
        Margin and active share, from at most 256 anchors against all rows.
    """
    if case.kernel not in ("triplet", "contrastive", "hardest"):
        return Setting(0.0, float("nan"))
    x, labels = draw(case)
    anchors = slice(0, min(case.n, 256))
    distance = torch.cdist(x[anchors], x)  # [A, N]
    same = labels[anchors, None] == labels[None, :]
    if case.kernel == "contrastive":
        negatives = distance[~same].sort().values
        # Halfway between two neighbouring distances, so that rounding cannot flip that pair.
        k = min(max(int(ACTIVE_SHARE[case.activity] * len(negatives)), 1), len(negatives) - 1)
        return Setting(float(negatives[k - 1] + negatives[k]) / 2, k / len(negatives))
    hardest_positive = distance.masked_fill(~same, -1.0).amax(1)
    hardest_negative = distance.masked_fill(same, float("inf")).amin(1)
    violated = hardest_positive - hardest_negative + TRIPLET_MARGIN > 0
    return Setting(TRIPLET_MARGIN, violated.double().mean().item())


def grid(
    only: str | None, sizes: list[int] | None, dims: list[int] | None, scope: str
) -> list[Case]:
    """Lists the cases of a run, small batches first within each number of features.

    Args:
        only: ``"triplet"`` or ``"contrastive"`` to keep one loss.
        sizes: Batch sizes that replace those of the scope.
        dims: Numbers of features that replace those of the scope.
        scope: ``"quick"``, ``"default"`` or ``"full"``.

    Returns:
        The cases in the order in which they run.
    """
    pairs = {
        ("quick", "triplet"): [(128, (256, 1024))],
        ("quick", "contrastive"): [(128, (256, 1024))],
        ("default", "triplet"): [
            (128, (256, 512, 1024, 2048, 4096, 8192, 16384)),
            (512, (256, 1024, 4096)),
        ],
        ("default", "contrastive"): [(128, (256, 512, 1024, 2048, 4096, 8192)), (512, (1024,))],
        ("full", "triplet"): [(d, SIZES) for d in DIMS],
        ("full", "contrastive"): [(d, SIZES) for d in DIMS],
    }
    cases = []
    for kernel in ("triplet", "contrastive"):
        if only not in (None, kernel):
            continue
        chosen = pairs[scope, kernel]
        if sizes or dims:
            chosen = [(d, tuple(sizes or SIZES)) for d in (dims or (128,))]
        for activity in ("",) if kernel == "triplet" else ("few", "half"):
            for d, ns in chosen:
                if activity == "half" and scope != "full" and not (sizes or dims):
                    # The second level is a check that the ratios hold, not a second full table.
                    ns = tuple(n for n in ns if n in (1024, 4096)) if d == 128 else ()
                cases += [Case(kernel, n, d, activity) for n in sorted(ns)]
    return cases
