# SPDX-License-Identifier: Apache-2.0
"""Makes the losses of the table, ours and the peers', each as a function of rows and labels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.loss_table import LINES, PML, ST, Line, Options

Loss = Callable[[Tensor, Tensor], Tensor]


def margin_over_triplets(pairs: Any, margin: float = 0.2, beta: float = 1.2) -> Tensor:
    """The margin loss averaged over the active halves of all triplets.

    A positive pair stands in as many triplets as its anchor has negatives, and the reverse: the
    counts replace the triplets.
    """
    from flashmetric.functional import Term

    sums = pairs.sum(Term("hinge", 1.0, margin - beta), Term("hinge", -1.0, margin + beta))
    loss = sums.positive * sums.negatives + sums.negative * sums.positives
    active = sums.active_positives * sums.negatives + sums.active_negatives * sums.positives
    return loss.sum() / active.sum().clamp(min=1)


FORMULAS = {"margin_over_triplets": margin_over_triplets}


def centres(options: Options, features: int) -> Tensor:
    """The same learned centres for everybody, [classes, 10, D]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(options["num_classes"], 10, features, generator=generator)


class Sized(nn.Module):
    """A loss with arguments or parameters that depend on the rows; made on the first call."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        """Keeps the function of the number of features that makes the loss."""
        super().__init__()
        self.make = make
        self.loss: nn.Module | None = None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Evaluates the loss, in the precision of the rows."""
        if self.loss is None:
            self.loss = self.make(x.shape[1]).to(x.dtype)
        return self.loss(x, labels)


def make_ours(line: Line, features: int | None = None) -> nn.Module:
    """The package's module; ``features`` only for those that need it."""
    import flashmetric

    options = dict(line.options)
    if line.call == "classes":
        options["embedding_size"] = features
    elif features is not None:
        options["features"] = features
    kind = getattr(flashmetric, line.name)
    preset = options.pop("preset", None)
    loss = kind.preset(preset, **options) if preset else kind(**options)
    if line.call == "classes":
        loss.centers.data.copy_(centres(line.options, features))
    return loss


def ours(line: Line) -> Loss:
    """The package's loss."""
    if line.formula:
        from flashmetric import pair_loss

        formula = FORMULAS[line.formula]
        return lambda x, labels: pair_loss(formula, x, labels, **line.options)
    if line.call == "classes" or line.name == "VerificationLoss":
        return Sized(lambda features: make_ours(line, features))
    loss = make_ours(line)
    if line.call == "towers":
        return Towers(loss)
    if line.call == "scores":
        return lambda x, labels: loss(x, (labels % 2).unsqueeze(1).expand_as(x))
    return loss


class Towers(nn.Module):
    """A loss of two towers, called with both halves of the rows."""

    def __init__(self, loss: nn.Module) -> None:
        """Keeps the loss."""
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Row i of the first half belongs to row i of the second."""
        half = len(x) // 2
        return self.loss(x[:half], ref_emb=x[half:])


def pml(line: Line) -> Loss:
    """pytorch-metric-learning's."""
    from pytorch_metric_learning import losses

    peer = line.pml
    kind = getattr(losses, peer.name)
    if line.call == "classes":

        def make(features: int) -> nn.Module:
            loss = kind(embedding_size=features, **peer.options)
            loss.fc.data.copy_(centres(peer.options, features).flatten(0, 1).T)
            return loss

        return Sized(make)
    loss = kind(**peer.options)
    if line.call == "towers":

        def towers(x: Tensor, labels: Tensor) -> Tensor:
            half = len(x) // 2
            return loss(x[:half], labels[:half], ref_emb=x[half:], ref_labels=labels[half:])

        return towers
    if peer.normalized:
        return lambda x, labels: loss(nn.functional.normalize(x), labels)
    return loss


def sentence_transformers(line: Line) -> Loss:
    """sentence-transformers', the function inside the module, without a model."""
    from sentence_transformers.sentence_transformer import losses

    peer = line.st
    loss = getattr(losses, peer.name)(model=None, **peer.options)
    if line.call == "towers":

        def towers(x: Tensor, labels: Tensor) -> Tensor:
            half = len(x) // 2
            return loss.compute_loss_from_embeddings([x[:half], x[half:]], None)

        return towers
    function = getattr(loss, peer.method)
    return lambda x, labels: function(labels, x)


def bare(line: Line) -> Loss:
    """The product of all rows that are compared."""
    if line.call == "towers":
        return lambda x, labels: x[: len(x) // 2] @ x[len(x) // 2 :].T
    return lambda x, labels: x @ x.T


def builds(whose: str) -> dict[str, Callable[[float], Loss]]:
    """Per line that has such a contender, a function that makes its loss.

    Args:
        whose: ``"ours"``, ``"bare"``, or the contender's name.

    Returns:
        Builders by the name of the line. They take a margin, which the table does not need.
    """
    makers = {"ours": ours, "bare": bare, PML: pml, ST: sentence_transformers}
    return {
        line.kernel: lambda _, line=line: makers[whose](line)
        for line in LINES
        if whose in ("ours", "bare") or whose in line.peers
    }
