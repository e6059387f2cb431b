# SPDX-License-Identifier: Apache-2.0
"""What the softmax losses share: temperatures, towers without labels, and shares of a softmax."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_positive_parameter, check_rows
from flashmetric.functional.anchor_reduction import softplus
from flashmetric.functional.pairs import LogSumExps, Pairs, Parameter, Term
from flashmetric.functional.totals import total_of
from flashmetric.labels import Labels
from flashmetric.ops.distance import accumulate_dtype

Reduction = Literal["mean", "sum", "none"]
Form = Literal["out", "in"]
REDUCTION, FORM = get_args(Reduction), get_args(Form)

LabelPair = tuple[Tensor | Labels | None, Tensor | Labels | None]


def check_temperature(value: object) -> None:
    """Raise unless ``value`` is a number above 0, or a tensor with one element."""
    check_positive_parameter("temperature", value)


def inverse_of(temperature: Parameter) -> Parameter:
    """One over the temperature; of a learned one in half precision in float32, unrounded."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(accumulate_dtype(temperature.dtype))
    return 1 / temperature


def check_reduction(value: object) -> None:
    """Raise unless ``value`` is the name of a reduction."""
    check_choice("reduction", value, REDUCTION)


def label_towers(
    embeddings: Tensor,
    labels: Tensor | Labels | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | Labels | None,
    indices_tuple: tuple[Tensor, ...] | None,
) -> LabelPair:
    """Labels as they are; without any, row i of both towers belongs together."""
    if labels is not None or indices_tuple is not None:
        return labels, ref_labels
    if ref_labels is not None:
        raise ValueError("labels must be given with ref_labels; got None")
    if ref_emb is None:
        raise ValueError(
            "ref_emb, rows of which number i belongs to row i of embeddings, must be given unless "
            "labels or indices_tuple are; got None"
        )
    check_rows("embeddings", embeddings)
    check_rows("ref_emb", ref_emb)
    n, m = embeddings.shape[0], ref_emb.shape[0]
    if m < n:
        raise ValueError(
            f"ref_emb must have a row for each of embeddings, {n}, unless labels are given; got {m}"
        )
    numbers = torch.arange(m, device=ref_emb.device)
    return numbers[:n], numbers


def negative_log_share(lse: LogSumExps) -> tuple[Tensor, Tensor]:
    """Per anchor log(1 + e^(negative - positive)), and which anchors have a positive.

    It is 0 where an anchor has no positive or no negative.
    """
    # NaN differs from -inf: rows that are not finite count, and show.
    counted = lse.positive != -torch.inf
    both = counted & (lse.negative != -torch.inf)
    # Filled before the formula: a where() after it would leave NaN in the gradient.
    z = lse.negative.masked_fill(~both, 0) - lse.positive.masked_fill(~both, 0)
    return softplus(z).masked_fill(~both, 0), counted


def shares_of_all(
    pairs: Pairs, lse: LogSumExps, scale: Parameter, form: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all others less the mean logit (``"out"``) or log mean share (``"in"``).

    Logits are -scale * distance. Returns the sum over the anchors, or the values [N] with
    reduction ``"none"``; and which anchors have a positive.
    """
    counted = lse.positive != -torch.inf
    positive = lse.positive.masked_fill(~counted, 0)
    everything = torch.logaddexp(positive, lse.negative)
    count = lse.positives.clamp(min=1).to(everything.dtype)
    if form == "in":
        rows = (everything - positive + count.log()).masked_fill(~counted, 0)
        return rows if reduction == "none" else total_of(rows), counted
    everything = everything.masked_fill(~counted, 0)
    if reduction == "none":
        return everything + pairs.sum(Term("linear", scale)).positive / count, counted
    # With the weights in the scale one number is wanted, whose gradient comes with it.
    mean = pairs.total(Term("linear", scale / count)).positive
    return total_of(everything) + mean, counted


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [N, D] of the given numbers [P], as [P, D].

    ``rows[index]`` adds up its gradients in an order that depends on the number of threads, and
    ``index_select`` does on CUDA in any; that of an embedding is fixed.
    """
    return torch.nn.functional.embedding(index, rows)
