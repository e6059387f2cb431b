# SPDX-License-Identifier: Apache-2.0
"""Rows of unit length, and how long rows are."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_rows
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.first_order import first_order_only

L2Power = Literal[1, 2]
L2_POWER = get_args(L2Power)


class NormalizeRows(torch.autograd.Function):
    """Differentiable row normalisation: x [N, D] -> unit rows [N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Scale by the largest element first, so that no square overflows or vanishes."""
        ctx.dtype = x.dtype
        # A compiler writes into contiguous tensors only.
        x = x.to(accumulate_dtype(x.dtype)).contiguous()
        # One tensor of the rows' size: fresh memory costs more than the arithmetic.
        scaled = x.abs()
        # A column of zeros stands in where there are no features: the largest of none is undefined.
        largest = scaled if x.shape[1] else x.new_zeros((x.shape[0], 1))
        size = largest.amax(1, keepdim=True)
        # Below the smallest normal number the inverse of the norm would overflow.
        zero = size < torch.finfo(x.dtype).tiny
        torch.div(x, size, out=scaled)
        norm = torch.linalg.vector_norm(scaled, 2, 1, keepdim=True)
        unit: Tensor = scaled.div_(norm).masked_fill_(zero, 0)
        ctx.save_for_backward(unit, norm.mul_(size).reciprocal_().masked_fill_(zero, 0))
        return unit

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Project the gradient on the tangent of the sphere."""
        unit, inverse = ctx.saved_tensors
        product = grad * unit
        radial = product.sum(1, keepdim=True)
        tangent: Tensor = product.copy_(unit).mul_(radial).sub_(grad).mul_(inverse.neg())
        return tangent.to(ctx.dtype)


def normalize_rows(x: Tensor) -> Tensor:
    r"""Scale every row to Euclidean length 1; a zero row stays zero and gets no gradient.

    Equivalent to::

        y = x / x.norm(dim=1, keepdim=True)  # but 0 / 0 = 0, and no overflow in between

    .. math:: y_i = x_i / \lVert x_i \rVert, \qquad
        \partial L / \partial x_i = (g_i - (g_i \cdot y_i)\, y_i) / \lVert x_i \rVert

    Args:
        x: rows, shape [N, D], float32, float16, bfloat16 or float64.

    Returns:
        Unit rows, shape [N, D], float32 (float64 for float64 rows); gradients come back in the
        dtype of ``x``. A row that holds NaN or an infinity becomes NaN. There are no second
        derivatives.

    Zero rows:
        A row whose largest magnitude is below the smallest normal number counts as a zero row.
        Every other one has length 1, also those shorter than the 1e-12 below which
        ``torch.nn.functional.normalize`` divides by 1e-12 instead. Between zero rows and all others
        the losses find the distance 1 by ``"cosine"`` and ``"sqrt_cosine"``, pi / 2 by
        ``"angular"``, 1 by ``"euclidean"`` with ``normalize=True`` (0 between two zero rows), and
        no gradient reaches a zero row.

    Raises:
        TypeError: ``x`` is no dense tensor of these dtypes.
        ValueError: ``x`` does not have two dimensions.

    Determinism:
        Bitwise reproducible on the CPU.

    Memory:
        O(N D).

    Example:
        >>> import torch
        >>> from flashmetric.functional import normalize_rows
        >>> normalize_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    check_rows("x", x)
    return _normalize_rows(x)


_normalize_rows: Callable[[Tensor], Tensor] = NormalizeRows.apply


def row_sizes(rows: Tensor, power: L2Power) -> Tensor:
    """Lengths of rows (power 1) or their squares (power 2), [N]."""
    rows = rows.to(accumulate_dtype(rows.dtype))
    # The derivative of the length of a zero row is 0, as torch has it.
    return rows.square().sum(1) if power == 2 else torch.linalg.vector_norm(rows, dim=1)
