# SPDX-License-Identifier: Apache-2.0
"""Losses that are a softmax over pairs: one positive, or several, against all negatives."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from flashmetric import functional as F
from flashmetric.checks import check_flag, check_positive
from flashmetric.distances import Metric
from flashmetric.functional import angular, circle, image_text, info_nce, n_pairs, sup_con
from flashmetric.functional.normalize import L2Power
from flashmetric.functional.softmax_rows import Form, Reduction
from flashmetric.losses.base import Loss
from flashmetric.losses.temperature import LearnedTemperature
from flashmetric.ops.distance import Distance

_N_PAIRS_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"l2": 0.02 * 0.25},
    "pml": {"normalize": True},
    "rdml": {"l2": 0.005 / 2, "l2_power": 1},
    "tensorflow_addons": {"l2": 0.002 * 0.25},
}
_ANGULAR_PRESETS: dict[str, dict[str, Any]] = {
    "pml": {"alpha": 40.0},
    "rdml": {"n_pairs_lambda": 2.0, "l2": 0.005 / 2, "l2_power": 1},
}


class NPairsLoss(Loss):
    """N-pairs loss, see :func:`flashmetric.functional.n_pairs_loss`.

    Args:
        l2: weight of the regulariser on the lengths of rows.
        l2_power: 2 for squared lengths, or 1.
        distance: a name or a distance with parameters; logits are minus the distance.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Presets:
        The regulariser of others: ``"paper"``, ``"pml"`` (none, unit rows), ``"rdml"`` (unsquared
        lengths) and ``"tensorflow_addons"``.

    Example:
        >>> from flashmetric import NPairsLoss
        >>> NPairsLoss.preset("paper").l2
        0.005
    """

    function = staticmethod(F.n_pairs_loss)
    check = staticmethod(n_pairs.check_n_pairs_options)
    presets = _N_PAIRS_PRESETS

    def __init__(
        self,
        l2: float = 0.0,
        *,
        l2_power: L2Power = 2,
        distance: Distance | Metric = "dot",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            l2=l2, l2_power=l2_power, distance=distance, normalize=normalize, reduction=reduction
        )


class InfoNCELoss(Loss):
    """InfoNCE of two towers, see :func:`flashmetric.functional.info_nce_loss`.

    Args:
        temperature: what similarities are divided by; a :class:`LearnedTemperature` is learned
            safely, an ``nn.Parameter`` as it is.
        distance: a name or a distance with parameters; similarities are minus the distance.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from flashmetric import InfoNCELoss
        >>> queries, keys = torch.eye(2), torch.eye(2)
        >>> InfoNCELoss(temperature=1.0)(queries, ref_emb=keys).item()
        0.3132...
    """

    function = staticmethod(F.info_nce_loss)
    check = staticmethod(info_nce.check_info_nce_options)

    def __init__(
        self,
        temperature: float | Tensor | LearnedTemperature = 0.07,
        *,
        distance: Distance | Metric = "cosine",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            temperature=temperature, distance=distance, normalize=normalize, reduction=reduction
        )


class NTXentLoss(Loss):
    """NT-Xent over labelled rows, see :func:`flashmetric.functional.ntxent_loss`.

    Args:
        temperature: what similarities are divided by; a :class:`LearnedTemperature` is learned
            safely, an ``nn.Parameter`` as it is.
        distance: a name or a distance with parameters; similarities are minus the distance.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        SimCLR's loss of two views:

        >>> import torch
        >>> from flashmetric import NTXentLoss
        >>> views = torch.eye(2).repeat(2, 1)
        >>> NTXentLoss(temperature=1.0)(views, torch.arange(2).repeat(2)).item()
        0.5514...
    """

    function = staticmethod(F.ntxent_loss)
    check = staticmethod(info_nce.check_info_nce_options)

    def __init__(
        self,
        temperature: float | Tensor | LearnedTemperature = 0.07,
        *,
        distance: Distance | Metric = "cosine",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            temperature=temperature, distance=distance, normalize=normalize, reduction=reduction
        )


class SupConLoss(Loss):
    """Supervised contrastive loss, see :func:`flashmetric.functional.sup_con_loss`.

    Args:
        temperature: what similarities are divided by; a :class:`LearnedTemperature` is learned
            safely, an ``nn.Parameter`` as it is.
        form: ``"out"`` or ``"in"``: whether positives are averaged outside of the logarithm.
        distance: a name or a distance with parameters; similarities are minus the distance.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import SupConLoss
        >>> SupConLoss(0.07, form="in").temperature
        0.07
    """

    function = staticmethod(F.sup_con_loss)
    check = staticmethod(sup_con.check_sup_con_options)

    def __init__(
        self,
        temperature: float | Tensor | LearnedTemperature = 0.1,
        *,
        form: Form = "out",
        distance: Distance | Metric = "cosine",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            temperature=temperature,
            form=form,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )


class CircleLoss(Loss):
    """Circle loss, see :func:`flashmetric.functional.circle_loss`.

    Args:
        m: relaxation: positives should exceed 1 - m, negatives stay below m.
        gamma: scale of the logits.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import CircleLoss
        >>> CircleLoss(m=0.25, gamma=256).gamma
        256
    """

    function = staticmethod(F.circle_loss)
    check = staticmethod(circle.check_circle_options)

    def __init__(
        self, m: float = 0.4, gamma: float = 80.0, *, reduction: Reduction = "mean"
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(m=m, gamma=gamma, reduction=reduction)


class AngularLoss(Loss):
    """Angular loss, see :func:`flashmetric.functional.angular_loss`.

    Args:
        alpha: angle at the negative, in degrees.
        n_pairs_lambda: if given, the N-pairs loss plus this times the angular loss.
        l2: weight of the regulariser of the N-pairs loss.
        l2_power: 2 for squared lengths in it, or 1.
        normalize: scale rows, the negatives included, to unit length first.
        max_positives: how many positives of an anchor to take; None for all.
        form: ``"log"`` for the smooth form of the paper's batches, or ``"hinge"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Presets:
        ``"pml"``: 40 degrees; that library's negatives are as long as they come, here all rows have
        unit length. ``"rdml"``: on top of the N-pairs loss.

    Example:
        >>> from flashmetric import AngularLoss
        >>> AngularLoss.preset("pml").alpha
        40.0
    """

    function = staticmethod(F.angular_loss)
    check = staticmethod(angular.check_angular_options)
    presets = _ANGULAR_PRESETS

    def __init__(
        self,
        alpha: float = 45.0,
        *,
        n_pairs_lambda: float | None = None,
        l2: float = 0.0,
        l2_power: L2Power = 2,
        normalize: bool = True,
        max_positives: int | None = None,
        form: angular.AngularForm = "log",
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            alpha=alpha,
            n_pairs_lambda=n_pairs_lambda,
            l2=l2,
            l2_power=l2_power,
            normalize=normalize,
            max_positives=max_positives,
            form=form,
            reduction=reduction,
        )


class ContrastiveImageTextLoss(Loss):
    """Contrastive loss of two towers, both ways: see :func:`~.functional.image_text_loss`.

    Args:
        temperature: what similarities are divided by, at first.
        learn_temperature: learn ``logit_scale``, the logarithm of one over the temperature.
        max_scale: limit of one over the temperature. Above it ``logit_scale`` has no gradient: call
            :meth:`clamp_` after every step of the optimiser.
        form: ``"out"`` or ``"in"``, which differ if labels give several positives.
        distance: a name or a distance with parameters; similarities are minus the distance.
        normalize: scale rows to unit length first.
        reduction: ``"mean"`` or ``"sum"``.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveImageTextLoss
        >>> loss = ContrastiveImageTextLoss()
        >>> images, texts = torch.randn(4, 8), torch.randn(4, 8)
        >>> loss(images, ref_emb=texts).backward()
        >>> loss.logit_scale.grad.shape
        torch.Size([])
    """

    function = staticmethod(F.image_text_loss)
    check = staticmethod(image_text.check_image_text_options)

    logit_scale: float | Tensor
    max_scale: float

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learn_temperature: bool = True,
        max_scale: float = 100.0,
        form: Form = "out",
        distance: Distance | Metric = "cosine",
        normalize: bool = False,
        reduction: image_text.ImageTextReduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        check_positive("temperature", temperature)
        check_flag("learn_temperature", learn_temperature)
        scale = -math.log(temperature)
        super().__init__(
            logit_scale=nn.Parameter(torch.tensor(scale)) if learn_temperature else scale,
            max_scale=max_scale,
            form=form,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the learned scale back to its limit, from where it can fall again."""
        if isinstance(self.logit_scale, Tensor):
            self.logit_scale.clamp_(max=math.log(self.max_scale))
