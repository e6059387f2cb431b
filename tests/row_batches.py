# SPDX-License-Identifier: Apache-2.0
"""Batches for the tests of the ops on all pairs: awkward rows, every label rule, parameters."""

from typing import Any

import torch
from torch import Tensor

from helpers import make_rows
from row_oracle import IGNORED, UNIT

ROW_DISTANCES = [
    "euclidean",
    "sqeuclidean",
    "cosine",
    "dot",
    "angular",
    "sqrt_cosine",
    "rbf",
    "cityblock",
    "chi2",
]
FORMULAS = [
    "none",
    "linear",
    "square",
    "hinge",
    "squared_hinge",
    "softplus",
    "exp",
    "squared_sigmoid",
]
THRESHOLD_FORMULAS = ["hinge", "squared_hinge", "softplus", "squared_sigmoid"]
KINDS = ["positive", "negative"]
RULES = ["equal", "any", *(f"group:{p}{n}" for p in "asd" for n in "asd")]

Pairs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, str]


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_batch(
    n: int,
    m: int | None,
    d: int,
    distance: str = "euclidean",
    *,
    rule: str = "equal",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    strides: str = "contiguous",
    classes: int = 3,
) -> Pairs:
    """The leading arguments of the ops.

    Where there are enough rows some are equal, some all but equal, some zero, and from two of them
    the label is missing.
    """
    x = _rows(n, d, distance, dtype, device, strides)
    labels = make_words(n, rule, classes=classes, device=device)
    if m is None:
        return x, labels, None, None, rule, distance
    r = _rows(m, d, distance, dtype, device, strides)
    if n > 8 and m > 8:
        r[0], r[2], r[5, : d // 2] = x[0], x[2], x[5, : d // 2]
    return x, labels, r, make_words(m, rule, classes=classes, device=device), rule, distance


def _rows(
    n: int, d: int, distance: str, dtype: torch.dtype, device: torch.device | str, strides: str
) -> Tensor:
    # make_rows for the strides alone: the values are changed in place.
    out = make_rows(n, d, dtype, device=device, strides=strides).detach()
    rows = torch.randn(n, d, dtype=torch.float64)
    if distance == "chi2":
        rows.abs_()
    if distance == "rbf":
        rows.div_(2 * max(d, 1) ** 0.5)
    if n > 8:
        rows[1] = rows[0]
        rows[3] = rows[2] * (1 + 1e-3)
        rows[4], rows[6] = 0, 0
        rows[7, : d // 2] = rows[5, : d // 2]
    if distance in UNIT:
        torch.nn.functional.normalize(rows, out=rows)
        if n > 8:
            rows[3] = rows[2]
            rows[3, :1] += 1e-3
    return out.copy_(rows)


def make_words(
    n: int, rule: str, *, classes: int = 3, device: torch.device | str = "cpu"
) -> Tensor:
    """Random labels for a rule, [n] or [n, 2]; two are missing where there are more than eight."""
    labels = torch.randint(classes, (n,))
    if rule == "any":
        labels = 1 << torch.randint(63, (n, 2))
        labels[torch.randint(3, (n, 2)) > 0] = 0
        labels[:, 0] |= torch.randint(4, (n,))
    elif rule != "equal":
        labels = torch.stack((labels, torch.randint(2, (n,))), 1)
    if n > 8:
        labels[8, ...] = IGNORED
        labels[3, ...] = IGNORED
    return labels.to(device)


def make_parameters(
    batch: Pairs, *, by_row: bool, bounded: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, offset and bound: positives repel in some rows if ``by_row``."""
    x = batch[0]
    n, options = len(x), {"dtype": accumulated(x.dtype), "device": x.device}
    scale = torch.tensor([[0.7], [-0.6]], **options)
    offset = torch.tensor([[-0.43], [0.61]], **options)
    if by_row:
        scale = (scale * torch.empty(2, n).uniform_(-0.5, 2).to(**options)).contiguous()
        offset = offset + torch.randn(2, n).to(**options)
    bound = None
    if bounded:
        # About half of the pairs are kept.
        middle = {"dot": 0.0, "sqeuclidean": 8.0, "cityblock": 5.0, "euclidean": 2.8}
        low, high = torch.empty(2, n).uniform_(0.7, 1.4).unbind()
        bound = torch.stack((low, high)).to(**options) * middle.get(batch[5], 0.8)
    return scale, offset, bound


def make_thresholds(
    batch: Pairs, k: int, *, rows: int | None = None, padding: int = 0, top: float | None = None
) -> Tensor:
    """Ascending thresholds [rows, k] within the range of the distances, -inf in front."""
    x = batch[0]
    n = len(x) if rows is None else rows
    if top is None:
        top = {"sqeuclidean": 16.0, "cityblock": 9.0, "euclidean": 4.0, "chi2": 3.0}.get(
            batch[5], 1.6
        )
    t = torch.rand(n, k, dtype=torch.float64).mul_(1.2 * top).sub_(0.1 * top)
    if batch[5] == "dot":
        t.sub_(top)
    t = t.sort(1).values
    for i in range(n):
        t[i, : i % (padding + 1)] = -torch.inf
    return t.to(accumulated(x.dtype)).to(x.device)


def assert_matches(
    ours: Tensor, truth: Tensor, rows_dtype: torch.dtype, what: Any = None, rounded: bool = False
) -> None:
    """Agreement up to the rounding of the arithmetic for rows of that dtype.

    ``rounded``: a gradient, which is rounded once more, to the dtype of the rows.
    """
    tolerance = 1e-10 if rows_dtype == torch.float64 else 2e-4
    if rounded:
        assert ours.dtype == rows_dtype
        tolerance = max(tolerance, 2 * torch.finfo(rows_dtype).eps)
    finite = truth[truth.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 0.0
    torch.testing.assert_close(
        ours.double().cpu(),
        truth.double(),
        rtol=tolerance,
        atol=tolerance * size,
        msg=lambda text: f"{what}: {text}",
    )
