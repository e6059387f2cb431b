# SPDX-License-Identifier: Apache-2.0
"""Descriptors of every pixel that find the same point in another view of an image.

Two photographs come with scikit-learn. The network learns on one, from pairs of views of which one
is turned, stretched and of other colours; the other one is held out. A pair has one positive per
pixel and all other pixels as negatives: 25 600 x 25 600 comparisons without --quick.

python examples/train_dense_descriptors.py --loss batch_hard
"""

import math
import sys
from collections.abc import Callable

import digits
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, normalize

import flashmetric

WITHIN = 3.0  # pixels, of a match that counts as right


class Descriptors(nn.Module):
    """Images [1, 3, H, W] to unit descriptors [1, 32, H, W]."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=4, dilation=4),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Describe every pixel."""
        return normalize(self.layers(images))


def two_views(photo: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return a crop, a distorted view of it, and where each pixel of the view is in the crop.

    Positions are [1, side, side, 2] in the units of ``grid_sample``: -1 to 1 across the crop.
    """

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    top, left = (int(draw(0, size - side + 1).item()) for size in photo.shape[1:])
    crop = photo[None, :, top : top + side, left : left + side]
    angle, stretch, shift = draw(-0.4, 0.4), draw(0.85, 1.15, 2), draw(-0.15, 0.15, 2, 1)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    where = affine_grid(torch.cat((turn * stretch, shift), 1)[None], crop.shape, False)
    view = grid_sample(crop, where, align_corners=False)
    view = view * draw(0.7, 1.3, 1, 3, 1, 1) + draw(-0.2, 0.2, 1, 3, 1, 1)
    return crop, view + 0.02 * torch.randn(view.shape, generator=generator), where


def rows_at(descriptors: Tensor, where: Tensor) -> Tensor:
    """Return the descriptors [N, 32] at positions [1, 1, N, 2]."""
    return normalize(grid_sample(descriptors, where, align_corners=False)[0, :, 0].T)


@torch.no_grad()
def accuracy(model: nn.Module, photo: Tensor, device: torch.device) -> float:
    """Return the share of pixels whose nearest descriptor in the crop is at most 3 px off."""
    generator = torch.Generator().manual_seed(1)
    right, asked, side = 0, 0, 128
    for _ in range(4):
        crop, view, where = (t.to(device) for t in two_views(photo, side, generator))
        inside = (where.abs() < 1).all(-1).flatten()
        queries, truth = model(view)[0].flatten(1).T[inside], where.flatten(0, 2)[inside]
        similarity = queries[::16] @ model(crop)[0].flatten(1)
        found = similarity.argmax(1)
        position = torch.stack((found % side, found // side), 1)
        off = (position + 0.5 - (truth[::16] + 1) * side / 2).norm(dim=1)
        right, asked = right + int((off <= WITHIN).sum()), asked + len(off)
    return right / asked


def main() -> None:
    """Train on one photograph, and compare the matching accuracy on the other."""
    parser = digits.arguments(__doc__)
    parser.add_argument("--loss", default="info_nce", choices=["info_nce", "batch_hard"])
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    photo, held_out = (
        torch.from_numpy(load_sample_image(name) / 255.0).float().permute(2, 0, 1)
        for name in ("china.jpg", "flower.jpg")
    )
    model = Descriptors().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    info_nce = flashmetric.InfoNCELoss(temperature=0.05)
    triplet = flashmetric.TripletMarginLoss(margin=0.5)

    def batch_hard(x: Tensor, ref_emb: Tensor) -> Tensor:
        pixel = torch.arange(len(x), device=x.device)
        return triplet(x, pixel, ref_emb=ref_emb, ref_labels=pixel)

    loss_fn: Callable[..., Tensor] = info_nce if options.loss == "info_nce" else batch_hard
    before = accuracy(model, held_out, device)

    generator = torch.Generator().manual_seed(options.seed)
    steps, side = (40, 48) if options.quick else (100, 160)
    for number in range(steps):
        crop, view, where = (t.to(device) for t in two_views(photo, side, generator))
        inside = (where.abs() < 1).all(-1).flatten()
        anchors = model(view)[0].flatten(1).T[inside]
        positives = rows_at(model(crop), where.flatten(1, 2)[:, None, inside])
        loss = loss_fn(anchors, ref_emb=positives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 10 == 0:
            print(f"step {number:4}  loss {loss.item():.4f}  pixels {len(anchors)}")

    after = accuracy(model, held_out, device)
    print(f"matches within {WITHIN} px on the held-out photograph: {before:.3f} -> {after:.3f}")
    if after < before + 0.05:
        sys.exit("training did not raise the matching accuracy by 0.05")


if __name__ == "__main__":
    main()
