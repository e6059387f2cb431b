# SPDX-License-Identifier: Apache-2.0
"""Correctness gate: a contender whose loss or gradient is wrong is not timed.

The truth of the triplet and the contrastive loss is written out again here, in float64 and from
coordinate differences, so that it shares no code with any contender. That of the other losses is
the package's dense reference in float64, which the tests hold against loops over the formulas; a
peer that disagrees with it computes another function, and is not timed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import loss_builders, loss_table
from bench.cases import Case

# D is no multiple of a vector width and N none of a tile.
GATE_ROWS, GATE_FEATURES = 100, 37
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LIMITS = (LOSS_TOLERANCE, GRADIENT_TOLERANCE)
# Within a case, float32 forms of different summation order are compared with each other.
AGREEMENT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate for one contender.

    Attributes:
        passed: Whether it may be timed.
        text: Errors found, or why it could not be judged.
        operators: The package's operators that it called.
    """

    passed: bool
    text: str
    operators: tuple[str, ...] = ()


def gate_case(kernel: str) -> Case:
    """The small case on which a kernel is judged."""
    if line := loss_table.find(kernel):
        case = line.case(GATE_ROWS, GATE_FEATURES)
        return replace(case, per_class=min(case.per_class, 8))
    return Case(kernel, GATE_ROWS, GATE_FEATURES, "half" if kernel == "contrastive" else "")


def distances(x: Tensor) -> Tensor:
    """All distances [N, N] from differences, with gradient zero on the diagonal."""
    squared = (x[:, None, :] - x[None, :, :]).square().sum(2)
    diagonal = torch.eye(len(x), dtype=torch.bool)
    return squared.masked_fill(diagonal, 1.0).sqrt().masked_fill(diagonal, 0.0)


def true_hardest(x: Tensor, labels: Tensor) -> Tensor:
    """Distances [2, N] to the hardest positive and the hardest negative of every row."""
    distance = distances(x)
    same = labels[:, None] == labels[None, :]
    other = ~torch.eye(len(x), dtype=torch.bool)
    rows = [
        torch.stack([distance[i][same[i] & other[i]].amax(), distance[i][~same[i]].amin()])
        for i in range(len(x))
    ]
    return torch.stack(rows, dim=1)


def truth(kernel: str, x: Tensor, labels: Tensor, margin: float) -> tuple[Tensor, Tensor | None]:
    """Computes a kernel's result and gradient in float64.

    Args:
        kernel: ``"triplet"``, ``"contrastive"``, ``"hardest"`` or a line of the table of losses.
        x: Embeddings.  # [N, D]
        labels: Classes.  # [N]
        margin: Margin of the loss.

    Returns:
        The result, and its gradient [N, D] (None for the bare operator).
    """
    x = x.detach().double().requires_grad_()
    if kernel == "hardest":
        return true_hardest(x, labels).detach(), None
    if line := loss_table.find(kernel):
        return dense_truth(loss_builders.ours(line), x, labels)
    if kernel == "triplet":
        positive, negative = true_hardest(x, labels)
        loss = torch.relu(positive - negative + margin).mean()
    else:
        distance = distances(x)
        same = labels[:, None] == labels[None, :]
        other = ~torch.eye(len(x), dtype=torch.bool)
        loss = torch.zeros((), dtype=torch.float64)
        for terms in (distance[same & other], torch.relu(margin - distance[~same])):
            loss = loss + terms[terms > 0].mean()
    loss.backward()
    return loss.detach(), x.grad


def dense_truth(loss: loss_builders.Loss, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient by the package's reference on the whole matrix of distances."""
    from flashmetric.reference import dense

    if isinstance(loss, torch.nn.Module):
        loss = loss.double()
    with dense():
        value = loss(x, labels)
    value.backward()
    return value.detach(), x.grad


def relative(ours: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm; infinite if anything is not finite."""
    if ours.shape != expected.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def judge(
    result: Tensor,
    grad: Tensor | None,
    expected: tuple[Tensor, Tensor | None],
    limits: tuple[float, float] = LIMITS,
) -> Verdict:
    """Compares a contender's result and gradient with the truth.

    Args:
        result: Its loss, or the distances that the bare operator selected.
        grad: Its gradient.
        expected: What ``truth`` returned.
        limits: Largest relative errors of result and gradient.

    Returns:
        The verdict with both errors.
    """
    true_result, true_grad = expected
    loss_limit, grad_limit = limits
    loss_error = relative(result, true_result)
    text = f"loss error {loss_error:.1e} (limit {loss_limit:.0e})"
    passed = loss_error <= loss_limit
    if true_grad is not None:
        grad_error = float("inf") if grad is None else relative(grad, true_grad)
        passed = passed and grad_error <= grad_limit
        text += f", gradient error {grad_error:.1e} (limit {grad_limit:.0e})"
    return Verdict(passed, text)


def disagreement(value: dict, reference: dict, tolerance: float = AGREEMENT_TOLERANCE) -> str:
    """Compares loss and gradient norm of two contenders at full size.

    Args:
        value: ``loss`` and ``grad_norm`` of a contender.
        reference: The same of the one it is held against.
        tolerance: Largest relative difference.

    Returns:
        An empty string, or what differs.
    """
    for key in ("loss", "grad_norm"):
        ours, theirs = value.get(key), reference.get(key)
        if ours is None or theirs is None:
            continue
        if not abs(ours - theirs) <= tolerance * max(abs(theirs), 1e-30):
            return f"wrong at this size ({key} {ours:.6g}, expected {theirs:.6g})"
    return ""
