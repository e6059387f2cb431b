# SPDX-License-Identifier: Apache-2.0
"""Dense descriptors: every pixel of one view against every pixel of another."""

import importlib
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

import flashmetric
from bench.clients.session import Job

Library = Literal["flashmetric", "pytorch-metric-learning", "torch"]
TEMPERATURE = 0.07
MARGIN = 0.05
_PATCH = 7


def photograph() -> Tensor:
    """A photograph that comes with scikit-learn, [3, H, W] between 0 and 1."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").copy())
    return pixels.permute(2, 0, 1).float() / 255


def views(pixels: int, features: int) -> tuple[Tensor, Tensor]:
    """Descriptors of the same pixels in two views, each [pixels, features].

    A descriptor is a random projection of a patch; the other view is darker and noisy.

    Args:
        pixels: Number of pixels; of a part of the photograph twice as wide as high, or square.
        features: Length of a descriptor.

    Returns:
        Row i of both is the same pixel.
    """
    high = 1
    while high * high * 4 <= pixels:
        high *= 2
    wide = pixels // high
    whole = photograph()
    # The middle shows buildings; the sky above them has no two pixels that can be told apart.
    top, left = (whole.shape[1] - high) // 2, (whole.shape[2] - wide) // 2
    image = whole[:, top : top + high, left : left + wide]
    if high * wide != pixels or image.shape[1:] != (high, wide):
        raise ValueError(f"pixels must be a power of two up to 131072; got {pixels}")
    draw = torch.Generator().manual_seed(0)
    kernel = torch.randn(features, 3, _PATCH, _PATCH, generator=draw)
    other = 0.8 * image + 0.01 * torch.randn(image.shape, generator=draw)

    def describe(view: Tensor) -> Tensor:
        padded = functional.pad(view[None], (_PATCH // 2,) * 4, mode="reflect")
        # Without its mean, which patches of one image have in common.
        rows = functional.conv2d(padded, kernel)[0].flatten(1).t()
        return rows - rows.mean(0)

    return describe(image), describe(other)


class Dense(Job):
    """One loss of two views, and its gradient; descriptors are scaled to unit length in the loss.

    Args:
        library: Whose loss.
        loss: ``"InfoNCE"`` or ``"batch-hard triplet"``.
        pixels: Descriptors per view.
        features: Length of a descriptor.
    """

    def __init__(self, library: Library, loss: str, pixels: int, features: int) -> None:
        """Draw the descriptors and make the loss."""
        first, second = views(pixels, features)
        self.rows = [first.requires_grad_(), second.requires_grad_()]
        super().__init__(self.rows)
        self.numbers = torch.arange(pixels)
        self.compute = {
            ("flashmetric", "InfoNCE"): self.fused_infonce,
            ("flashmetric", "batch-hard triplet"): self.fused_triplet,
            ("pytorch-metric-learning", "InfoNCE"): self.pml_infonce,
            ("pytorch-metric-learning", "batch-hard triplet"): self.pml_triplet,
            ("torch", "InfoNCE"): self.torch_infonce,
            ("torch", "batch-hard triplet"): self.torch_triplet,
        }[library, loss]

    def backward(self) -> Tensor:  # noqa: D102
        value = self.compute(*self.rows)
        value.backward()
        return value

    def fused_infonce(self, x: Tensor, y: Tensor) -> Tensor:
        return flashmetric.InfoNCELoss(TEMPERATURE, normalize=True)(x, ref_emb=y)

    def fused_triplet(self, x: Tensor, y: Tensor) -> Tensor:
        loss = flashmetric.TripletMarginLoss.preset("pml_batch_hard", margin=MARGIN)
        return loss(x, self.numbers, ref_emb=y, ref_labels=self.numbers.clone())

    def pml_infonce(self, x: Tensor, y: Tensor) -> Tensor:
        # With one positive per row the same function as its NTXentLoss, which holds N x N^2.
        losses = importlib.import_module("pytorch_metric_learning.losses")
        numbers = self.numbers
        return losses.SupConLoss(TEMPERATURE)(x, numbers, None, y, numbers.clone())

    def pml_triplet(self, x: Tensor, y: Tensor) -> Tensor:
        losses = importlib.import_module("pytorch_metric_learning.losses")
        miners = importlib.import_module("pytorch_metric_learning.miners")
        numbers, others = self.numbers, self.numbers.clone()
        mined = miners.BatchHardMiner()(x, numbers, y, others)
        return losses.TripletMarginLoss(MARGIN)(x, numbers, mined, y, others)

    def torch_infonce(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = functional.normalize(x), functional.normalize(y)
        return functional.cross_entropy(x @ y.t() / TEMPERATURE, self.numbers)

    def torch_triplet(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = functional.normalize(x), functional.normalize(y)
        with torch.no_grad():
            hardest = (x @ y.t()).fill_diagonal_(-torch.inf).argmax(1)
        positive, negative = (x - y).norm(dim=1), (x - y[hardest]).norm(dim=1)
        over = (positive - negative + MARGIN).relu()
        return over.sum() / (over > 0).sum().clamp(min=1)
