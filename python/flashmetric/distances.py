# SPDX-License-Identifier: Apache-2.0
"""Distances with parameters. Losses take them, or a name, as ``distance=``.

Names: ``"euclidean"``, ``"sqeuclidean"``, ``"cosine"`` (1 - cosine), ``"dot"`` (minus the inner
product), ``"angular"`` (the angle, in radians), ``"sqrt_cosine"`` (the root of 1 - cosine),
``"rbf"`` (1 - exp(-squared distance)), ``"cityblock"`` (sum of magnitudes), ``"chi2"`` (sum of
(x - r)^2 / (x + r), for features that are not negative). Smaller always means closer.

An object maps the rows first and then uses the kernel of a name; what it learns gets gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashmetric.checks import check_positive
from flashmetric.ops.distance import accumulate_dtype, full_precision
from flashmetric.ops.first_order import first_order_only

__all__ = [
    "RBF",
    "SNR",
    "ChiSquared",
    "Cityblock",
    "LearnedMahalanobis",
    "Mahalanobis",
    "Metric",
]


class Metric(nn.Module):
    """A named distance of mapped rows; subclass it for a distance of your own.

    Set ``kernel`` to the name, and override :meth:`rows`.
    """

    kernel: str = "euclidean"

    def rows(self, x: Tensor) -> Tensor:
        """Map rows [N, D] to those that the kernel compares, [N, any]; differentiable."""
        return x

    def anchor_scale(self, rows: Tensor) -> Tensor | None:
        """Factor [N] on all distances of each anchor, from its mapped row; None for 1."""
        return None

    forward: Callable[..., Tensor] = rows


def _widened(x: Tensor) -> Tensor:
    """Half precision widened once, which is exact: what maps the rows must not round them."""
    return x.to(accumulate_dtype(x.dtype))


class _Product(torch.autograd.Function):
    """``x @ factor.T``, of which autocast rounds neither the value nor, by itself, a gradient."""

    @staticmethod
    @full_precision
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        """Rows [N, D] times the factor [any, D] transposed."""
        ctx.save_for_backward(x, factor)
        return x @ factor.T

    @staticmethod
    @first_order_only
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients, of those that are wanted."""
        x, factor = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return grad @ factor if wanted[0] else None, grad.T @ x if wanted[1] else None


_apply_product: Callable[[Tensor, Tensor], Tensor] = _Product.apply


def _product(x: Tensor, factor: Tensor) -> Tensor:
    """``x @ factor.T`` as precise as the distances that follow."""
    x = _widened(x)
    return _apply_product(x, factor.to(x.dtype))


class RBF(Metric):
    r"""Distance 1 - K of the radial basis function kernel.

    .. math:: d(x, r) = 1 - \exp(-\lVert x - r \rVert^2 / \sigma^2)

    Args:
        sigma: width of the kernel, in units of the rows; above 0. Default: 1.

    Source:
        As the slides on one-shot learning print it: sigma squared, not twice that.
    """

    kernel = "rbf"

    def __init__(self, sigma: float = 1.0) -> None:
        """Check and store the width."""
        super().__init__()
        check_positive("sigma", sigma)
        self.sigma = float(sigma)

    def rows(self, x: Tensor) -> Tensor:
        """Rows in units of sigma."""
        return _widened(x) / self.sigma

    def extra_repr(self) -> str:
        """The width."""
        return f"sigma={self.sigma}"


class SNR(Metric):
    r"""Signal-to-noise distance: variance of the difference over variance of the anchor.

    .. math:: d(x, r) = \operatorname{var}(x - r) / \operatorname{var}(x)

    over the features of a row. It is not symmetric: the first row is the anchor. A constant anchor
    has no variance; its distances are 0, with gradient 0.

    Args:
        normalize: scale rows to unit length first, as pytorch-metric-learning does. Default: True.

    Source:
        T. Yuan et al.: Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning,
        CVPR 2019.
    """

    kernel = "sqeuclidean"

    def __init__(self, normalize: bool = True) -> None:
        """Store whether rows are scaled."""
        super().__init__()
        self.normalize = normalize

    def rows(self, x: Tensor) -> Tensor:
        """Rows less their mean."""
        # Here, because all functions import this module.
        from flashmetric.functional.normalize import normalize_rows

        x = normalize_rows(x) if self.normalize else _widened(x)
        centred = x - x.mean(1, keepdim=True)
        # What a constant row leaves is the rounding of its mean, not a variance to divide by.
        rounding = (8 * torch.finfo(x.dtype).eps) ** 2
        wide, length = (y.detach().to(torch.float64).square().sum(1) for y in (centred, x))
        return centred.masked_fill((wide <= rounding * length).unsqueeze(1), 0)

    def anchor_scale(self, rows: Tensor) -> Tensor:
        """One over the squared length of each centred row; 0 for a constant row."""
        wide = rows if rows.dtype == torch.float64 else rows.float()
        variance = wide.square().sum(1)
        constant = variance == 0
        return variance.masked_fill(constant, 1).reciprocal().masked_fill(constant, 0)

    def extra_repr(self) -> str:
        """Whether rows are scaled."""
        return f"normalize={self.normalize}"


class Mahalanobis(Metric):
    r"""Mahalanobis distance of a fixed covariance.

    .. math:: d(x, r) = \sqrt{(x - r)^T \Sigma^{-1} (x - r)}

    Args:
        covariance: symmetric and positive definite, shape [D, D].
        squared: leave out the root. Default: False.

    Raises:
        TypeError: ``covariance`` is no floating-point tensor.
        ValueError: ``covariance`` is not square or not positive definite.
    """

    factor: Tensor

    def __init__(self, covariance: Tensor, *, squared: bool = False) -> None:
        """Factor the inverse once, in float64."""
        super().__init__()
        if not isinstance(covariance, Tensor) or not covariance.is_floating_point():
            raise TypeError("covariance must be a floating-point tensor")
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(f"covariance must have shape [D, D], got {tuple(covariance.shape)}")
        lower, failed = torch.linalg.cholesky_ex(covariance.double())
        if bool(failed):
            raise ValueError("covariance must be positive definite; add to its diagonal")
        inverse = torch.linalg.solve_triangular(
            lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
        )
        self.register_buffer("factor", inverse.to(covariance.dtype))
        self.kernel = "sqeuclidean" if squared else "euclidean"

    def rows(self, x: Tensor) -> Tensor:
        """Rows in the coordinates in which the covariance is the identity."""
        return _product(x, self.factor)


class LearnedMahalanobis(Metric):
    r"""Mahalanobis distance of a learned matrix, positive semi-definite by construction.

    .. math:: d(x, r) = \lVert L x - L r \rVert, \qquad A = L^T L

    Args:
        features: D, the size of a row.
        rank: rows of L. Default: ``features``.
        squared: leave out the root. Default: False.
    """

    def __init__(self, features: int, rank: int | None = None, *, squared: bool = False) -> None:
        """Begin with the Euclidean distance (of the first ``rank`` features)."""
        super().__init__()
        self.factor = nn.Parameter(torch.eye(features if rank is None else rank, features))
        self.kernel = "sqeuclidean" if squared else "euclidean"

    def rows(self, x: Tensor) -> Tensor:
        """L x."""
        return _product(x, self.factor)


class _Weighted(Metric):
    """A distance summed over features, with a weight per feature."""

    def __init__(self, weight: Tensor | None = None) -> None:
        """Store the weights; a parameter stays one, and is learned."""
        super().__init__()
        if isinstance(weight, nn.Parameter):
            self.weight: Tensor | None = weight
        else:
            if weight is not None and (weight.ndim != 1 or bool((weight < 0).any())):
                raise ValueError("weight must have shape [D] and hold no negative number")
            self.register_buffer("weight", weight)

    def rows(self, x: Tensor) -> Tensor:
        """Rows times the weights, which is the same and needs no kernel of its own."""
        if self.weight is None:
            return x
        x = _widened(x)
        return x * self.weight.to(x.dtype)


class Cityblock(_Weighted):
    r"""Weighted L1 distance.

    .. math:: d(x, r) = \sum_k w_k \lvert x_k - r_k \rvert

    Args:
        weight: not negative, shape [D]; an ``nn.Parameter`` is learned (and must be kept from
            turning negative by whoever trains it). Default: ones.
    """

    kernel = "cityblock"


class ChiSquared(_Weighted):
    r"""Weighted chi-squared distance of features that are not negative, such as histograms.

    .. math:: d(x, r) = \sum_k w_k \frac{(x_k - r_k)^2}{x_k + r_k}, \qquad 0 / 0 = 0

    Args:
        weight: not negative, shape [D]; an ``nn.Parameter`` is learned (and must be kept from
            turning negative by whoever trains it). Default: ones.
    """

    kernel = "chi2"
