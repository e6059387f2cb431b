# SPDX-License-Identifier: Apache-2.0
"""The distances for the PyTorch implementations of the ops: every formula once.

Each is a function of one number u of a pair::

    difference distances:  u = |x - r|^2 = bias(x) + bias(r) - 2 x.r,  du/dx = 2 (x - r)
    dot:                   u = -2 x.r,                                 du/dx = -2 r
    direct, cityblock:     u = sum |x - r|,                            du/dx = sign(x - r)
    direct, chi2:          u = sum (x - r)^2 / (x + r),  du/dx = (x - r) (x + 3 r) / (x + r)^2

``value(u)`` is the distance and ``slope(value)`` its derivative in u. Rows of "cosine", "angular"
and "sqrt_cosine" have unit length already; the cosine of a zero row is 0 by definition, so its u is
2. Rows of "rbf" were divided by its width.
"""

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

Distance = Literal[
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
DISTANCES: tuple[str, ...] = get_args(Distance)

SLAB_ELEMENTS = 1 << 20
"""Size of the largest temporary besides O(N D): a slab fits the caches, N x M does not."""

# Relative rounding error of u grows like (|x|^2 + |r|^2) / u; beyond this ratio the difference
# itself is squared instead.
NEAR = 2.0**-10

P = ParamSpec("P")
T = TypeVar("T")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of distances, sums and of all arithmetic for rows of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(kernel: Callable[P, T]) -> Callable[P, T]:
    """Keep autocast out of ``kernel``: matrix products stay in the accumulation dtype."""

    @wraps(kernel)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        query = next(value for value in args if isinstance(value, Tensor))
        device = query.device.type
        if not torch.is_autocast_enabled(device):
            return kernel(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return kernel(*args, **kwargs)

    return wrapper


def slabs(rows: int, row_elements: int) -> Iterator[slice]:
    """Split ``rows`` so that ``row_elements`` of each fit a slab."""
    step = max(1, SLAB_ELEMENTS // max(1, row_elements))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def is_direct(distance: str) -> bool:
    """Whether no inner product yields the distance: it is summed feature by feature."""
    return distance in ("cityblock", "chi2")


def is_difference(distance: str) -> bool:
    """Whether the distance is a function of |x - r|^2."""
    return distance != "dot" and not is_direct(distance)


def has_unit_rows(distance: str) -> bool:
    """Whether the rows are of unit length, and a zero row is at a constant distance."""
    return distance in ("cosine", "angular", "sqrt_cosine")


def squared_norms(x: Tensor) -> Tensor:
    """Squared row norms, [N]."""
    return x.square().sum(1)


def bias(norms: Tensor, distance: str) -> Tensor:
    """What a row adds to u, from its squared norm."""
    if not is_difference(distance):
        return torch.zeros_like(norms)
    if has_unit_rows(distance):
        return norms.masked_fill(norms == 0, 1)
    return norms


def value(u: Tensor, distance: str) -> Tensor:
    """Distance from u."""
    if distance == "dot":
        return u * 0.5
    u = u.clamp(min=0)
    if distance == "euclidean":
        return u.sqrt_()
    if distance == "cosine":
        return u.mul_(0.5)
    if distance == "angular":
        return u.sqrt_().mul_(0.5).clamp_(max=1).asin_().mul_(2)
    if distance == "sqrt_cosine":
        return u.mul_(0.5).sqrt_()
    if distance == "rbf":
        return u.neg_().expm1_().neg_()
    return u


def slope(value: Tensor, distance: str) -> Tensor:
    """Derivative of the distance in u, from the distance; NaN where the distance is NaN.

    The root has no derivative at 0; 0 is the subgradient that keeps duplicates finite.
    """
    if distance == "euclidean":
        return (0.5 / value).masked_fill_(value == 0, 0)
    if distance == "sqrt_cosine":
        return (0.25 / value).masked_fill_(value == 0, 0)
    if distance == "angular":
        sine = value.sin()
        return (0.5 / sine).masked_fill_((value == 0) | (sine <= 0) | (value >= math.pi), 0)
    if distance == "rbf":
        return 1 - value
    constant = 0.5 if distance in ("cosine", "dot") else 1.0
    return torch.full_like(value, constant).masked_fill_(value.isnan(), torch.nan)


def exact_u(x: Tensor, r: Tensor, distance: str) -> Tensor:
    """Values of u from paired rows [..., D], without cancellation."""
    if distance == "dot":
        return (x * r).sum(-1).mul_(-2)
    if distance == "cityblock":
        return (x - r).abs_().sum(-1)
    if distance == "chi2":
        total = x + r
        return (x - r).square_().div_(total).masked_fill_(total == 0, 0).sum(-1)
    u = (x - r).square_().sum(-1)
    if has_unit_rows(distance):
        u.masked_fill_(has_zero_row(x, r), 2)
    return u


def du_dx(x: Tensor, r: Tensor, distance: str) -> Tensor:
    """Gradients of u in x for paired rows [..., D]."""
    if distance == "dot":
        return (r * -2).expand(torch.broadcast_shapes(x.shape, r.shape))
    if distance == "cityblock":
        return (x - r).sign_()
    if distance == "chi2":
        total = x + r
        # Two quotients: the square of a small total would underflow.
        slope = ((x + 3 * r) / total).mul_((x - r) / total)
        return slope.masked_fill_(total == 0, 0)
    gradient = (x - r).mul_(2)
    if has_unit_rows(distance):
        gradient.masked_fill_(has_zero_row(x, r).unsqueeze(-1), 0)
    return gradient


def has_zero_row(x: Tensor, r: Tensor) -> Tensor:
    """Which of the paired rows [..., D] hold a row of zeros."""
    return (x.any(-1) & r.any(-1)).logical_not_()


def poison(*norms: Tensor) -> Tensor:
    """0-d tensor: NaN if four times any squared norm is not finite, else 0.

    Two rows of opposite directions are at four times the squared norm of one: below that bound no
    squared distance overflows.
    """
    total = (norms[0] * 4).mul_(0).sum()
    for other in norms[1:]:
        total = total + (other * 4).mul_(0).sum()
    return total
