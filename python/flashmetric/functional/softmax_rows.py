# SPDX-License-Identifier: Apache-2.0
"""What the softmax losses share: temperatures, towers without labels, and shares of a softmax."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_number, check_rows
from flashmetric.functional.pairs import LogSumExps, Pairs, Parameter, Term
from flashmetric.labels import Labels
from flashmetric.ops.ordered_sum import ordered_sum

Reduction = Literal["mean", "sum", "none"]
Form = Literal["out", "in"]
REDUCTION, FORM = get_args(Reduction), get_args(Form)

LabelPair = tuple[Tensor | Labels | None, Tensor | Labels | None]


def check_positive(name: str, value: object) -> None:
    """Raise unless ``value`` is a number above 0."""
    check_number(name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be above 0, got {value}")


def check_scalar(name: str, value: object) -> None:
    """Raise unless ``value`` is a number or a tensor with one element, which may be learned."""
    if not isinstance(value, Tensor):
        check_number(name, value)
    elif value.ndim or not value.is_floating_point():
        raise ValueError(f"{name} must be a number or a floating-point tensor of shape []")


def check_temperature(value: object) -> None:
    """Raise unless ``value`` is a number above 0, or a tensor with one element."""
    check_scalar("temperature", value)
    if not isinstance(value, Tensor):
        check_positive("temperature", value)


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
    given = (labels, ref_labels, indices_tuple)
    if ref_emb is None or any(value is not None for value in given):
        return labels, ref_labels
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


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z); torch's own is only approximate above its threshold."""
    return torch.logaddexp(z, torch.zeros_like(z))


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
        return rows if reduction == "none" else ordered_sum(rows), counted
    everything = everything.masked_fill(~counted, 0)
    if reduction == "none":
        return everything + pairs.sum(Term("linear", scale)).positive / count, counted
    # With the weights in the scale one number is wanted, whose gradient comes with it.
    mean = pairs.total(Term("linear", scale / count)).positive
    return ordered_sum(everything) + mean, counted


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [N, D] of the given numbers [P], as [P, D].

    ``rows[index]`` adds up its gradients in an order that depends on the number of threads, and
    ``index_select`` does on CUDA in any; that of an embedding is fixed.
    """
    return torch.nn.functional.embedding(index, rows)


def reduce_rows(rows: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Reduce values per anchor, which are 0 where an anchor does not count."""
    if reduction == "none":
        return rows
    total = ordered_sum(rows)
    return total if reduction == "sum" else total / counted.sum().clamp(min=1)
