# SPDX-License-Identifier: Apache-2.0
"""Images to train on and images held out: scikit-learn's digits, or a folder of IDX files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashmetric.demo.errors import DemoError, optional_module
from flashmetric.demo.idx import find_idx, read_idx

HELD_OUT_SHARE = 0.3
OPEN_SET_CLASSES = 3
_MIN_SIDE, _MAX_SIDE = 8, 512


@dataclass(frozen=True)
class ImageSet:
    """Grey images [N, 1, H, W] as uint8 with their int64 labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return self.labels.numel()

    def classes(self) -> list[int]:
        """Return the labels that occur, in ascending order."""
        return sorted(set(self.labels.tolist()))

    def select(self, mask: Tensor) -> "ImageSet":
        """Return the images where ``mask`` [N] is true."""
        return ImageSet(self.images[mask], self.labels[mask])


@dataclass(frozen=True)
class Split:
    """What a run learns from and what it is judged on.

    Attributes:
        name: Name for the report.
        rule: How the held-out images were chosen, in words.
        train: Images the network learns from.
        test: Held-out images, never seen in training.
        open_set: True if the classes of ``test`` are absent from ``train``.
    """

    name: str
    rule: str
    train: ImageSet
    test: ImageSet
    open_set: bool = False

    def pixel_statistics(self) -> tuple[float, float]:
        """Return mean and standard deviation of the training pixels, scaled to 0..1."""
        counts = torch.bincount(self.train.images.flatten(), minlength=256).double()
        value = torch.arange(256, dtype=torch.float64) / 255
        share = counts / counts.sum()
        mean = float((share * value).sum())
        variance = float((share * (value - mean) ** 2).sum())
        return mean, max(variance, 1e-12) ** 0.5


def load_split(folder: Path | None, *, open_set: bool = False) -> Split:
    """Load the images of a run.

    Args:
        folder: Folder with the four IDX files of MNIST or Fashion-MNIST, plain or ``.gz``;
            None for scikit-learn's ``load_digits``.
        open_set: Leave the highest three classes out of training and judge on them alone.

    Returns:
        The split; see :func:`load_digits` and :func:`load_idx_folder` for the rule.

    Raises:
        DemoError: If files are missing or damaged, or scikit-learn is needed and missing.
    """
    split = load_digits() if folder is None else load_idx_folder(folder)
    return _hold_out_classes(split) if open_set else split


def load_digits() -> Split:
    """Load scikit-learn's 1797 digits of 8x8 pixels and hold out the last 30 % of each class.

    The file is not shuffled first: neighbouring images of a class look more alike than distant
    ones, so a shuffled split would leave near copies of the held-out images in training.
    """
    bunch = optional_module("sklearn.datasets").load_digits()
    # The pixels are the integers 0..16.
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    everything = ImageSet(images, labels)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in everything.classes():
        members = torch.nonzero(labels == label).flatten()
        held_out[members[len(members) - round(HELD_OUT_SHARE * len(members)) :]] = True
    return Split(
        name="scikit-learn digits",
        rule="the last 30 % of each class",
        train=everything.select(~held_out),
        test=everything.select(held_out),
    )


def load_idx_folder(folder: Path) -> Split:
    """Load MNIST-style IDX files; the ``t10k`` files are the held-out images."""
    if not folder.is_dir():
        raise DemoError(f"{folder} is not a folder; scripts/get-data.sh can fetch one")
    train = _load_idx_pair(folder, "train")
    test = _load_idx_pair(folder, "t10k")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DemoError(
            f"{folder}: training images are {_size(train)} but held-out images are {_size(test)}"
        )
    return Split(folder.resolve().name, "the t10k files", train, test)


def _load_idx_pair(folder: Path, part: str) -> ImageSet:
    image_path = find_idx(folder, f"{part}-images-idx3-ubyte")
    label_path = find_idx(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(images) != len(labels):
        raise DemoError(
            f"{folder}: {image_path.name} has {len(images)} images "
            f"but {label_path.name} has {len(labels)} labels"
        )
    pair = ImageSet(images.unsqueeze(1), labels.long())
    if not all(_MIN_SIDE <= side <= _MAX_SIDE for side in images.shape[1:]):
        raise DemoError(
            f"{image_path}: images are {_size(pair)}, expected {_MIN_SIDE} to {_MAX_SIDE} a side"
        )
    return pair


def _size(images: ImageSet) -> str:
    return "x".join(map(str, images.images.shape[2:]))


def _hold_out_classes(split: Split) -> Split:
    classes = split.train.classes()
    if len(classes) < OPEN_SET_CLASSES + 2:
        raise DemoError(f"--open-set needs at least {OPEN_SET_CLASSES + 2} classes")
    unseen = classes[-OPEN_SET_CLASSES:]
    train_unseen = torch.isin(split.train.labels, torch.tensor(unseen))
    test_unseen = torch.isin(split.test.labels, torch.tensor(unseen))
    if not test_unseen.any():
        raise DemoError(f"--open-set: no held-out image has a label in {unseen}")
    names = ", ".join(str(label) for label in unseen)
    return Split(
        name=split.name,
        rule=f"open set: the classes {names} in {split.rule}; training sees the others only",
        train=split.train.select(~train_unseen),
        test=split.test.select(test_unseen),
        open_set=True,
    )
