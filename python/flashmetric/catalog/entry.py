# SPDX-License-Identifier: Apache-2.0
"""One row of the table of losses."""

from dataclasses import dataclass
from typing import Literal

Statistic = Literal[
    "pair sums",
    "log-sum-exp",
    "hardest pairs",
    "batch-all triplets",
    "histograms",
    "listed pairs",
    "products in slabs",
]

Call = Literal["batch", "towers", "pairs", "scores", "classes"]
"""``(embeddings, labels)`` and all that goes with it; two towers ``(embeddings, ref_emb=...)``
whose rows belong together; explicit pairs only; ``(scores, labels)`` of pairs;
``(embeddings, labels)`` with labels that number learned classes from 0."""


@dataclass(frozen=True)
class Entry:
    """What docs/losses.md says about a loss; Markdown, formulas in plain text."""

    name: str
    """Class in :mod:`flashmetric.losses`."""
    rows: str
    """Rows of the specification that it covers, such as "B1, B9"."""
    title: str
    formula: str
    defaults: str
    """Hyper-parameters and what they are by default, with the preset names."""
    source: str
    """Paper, and the reference code whose defaults are taken."""
    statistic: Statistic
    """The primitive that carries it."""
    reduction: str
    """What the loss is averaged over."""
    complexity: str
    """Arithmetic and memory, G being N M D multiply-adds."""
    disagreements: str
    """Where the slides, the paper and the reference codes differ, and which is taken here."""
    example: tuple[tuple[str, object], ...] = ()
    """Arguments with which tests construct the loss; needed if it has required ones."""
    call: Call = "batch"
    """What it is called with: see :data:`Call`."""
    listed: bool = True
    """Whether ``indices_tuple`` may replace the labels."""
    holds_factors: bool = False
    """Whether its published gradient treats some factors of the loss as constants."""
    one_graph: bool = True
    """Whether it compiles to one graph: False where a shape depends on the labels."""
