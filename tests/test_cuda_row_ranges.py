# SPDX-License-Identifier: Apache-2.0
"""Row sums of the tile engine where rounding, scaling or skipping could go wrong, interpreted."""

from typing import Any

import numpy as np
import pytest

from cuda_batch import Batch
from cuda_reference import problem, swapped, unit, usual_margins
from cuda_row_reference import check_row_grad, check_row_sum
from cuda_rows import Terms, row_grad, row_sum


def check(batch: Batch, formula: str, margins: tuple[float, float], *, grad: bool = True) -> None:
    """One launch."""
    terms = Terms.of_margins(formula, margins)
    check_row_sum(batch, terms, row_sum(batch, terms, grad=grad))


def check_weights(batch: Batch, margins: tuple[float, float], **roles: Any) -> None:
    """The gradient of a weighted sum."""
    terms = Terms.of_margins("hinge", margins)
    typed = {name: {"weight": np.float32(weight)} for name, weight in roles.items()}
    check_row_grad(batch, terms, row_grad(batch, terms, **typed), **typed)


@pytest.mark.parametrize("grad", [True, False])
def test_margins_below_rounding(grad: bool) -> None:
    # Negatives within the margin whose products say nothing of their distance.
    rng = np.random.default_rng(3)
    x = unit(rng.standard_normal((200, 40)))
    for i in range(5):  # one such pair in each of five warps' tiles
        x[160 + 8 * i] = x[32 * i] + 1e-5 * rng.standard_normal(40)
    check(Batch(x.astype(np.float32), np.arange(200)), "hinge", (0.0, 2e-4), grad=grad)


def test_weights_of_near_pairs() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((70, 40)).astype(np.float32)
    x[35:] = x[:35] * np.float32(1 + 2.0**-12)
    weight, labels = rng.standard_normal((2, 70)), rng.integers(0, 3, 70)
    check_weights(Batch(x, labels), (0.001, 4.0), own=weight, other=weight)
    refs = swapped(Batch(x, labels, x[30:66].copy(), labels[30:66].copy()))
    check_weights(refs, (0.001, 4.0), other=weight)


@pytest.mark.parametrize("powers", [range(0, 30, 6), range(0, -30, -6), (0, 20, 0, -20, 3)])
def test_weights_that_grow_from_tile_to_tile(powers: Any) -> None:
    # Each column tile's weights are far larger (or smaller) than those before.
    rng = np.random.default_rng(7)
    batch = problem(rng, 40, 20, 3, 300)
    weight = np.repeat(2.0 ** np.array(powers), 64)[None, :300] * rng.standard_normal((2, 300))
    weight[:, 64:70] = 0
    check_weights(batch, (0.5, 7.0), other=weight)


@pytest.mark.parametrize("formula", ["hinge", "squared_hinge"])
def test_exact_gradients_before_any_weight(formula: str) -> None:
    # The first tile has near pairs only; the second brings weights that must be fitted.
    rng = np.random.default_rng(8)
    r = np.repeat(rng.standard_normal((1, 40)), 90, 0)
    x = r[:4] + 2.0**-10 * rng.integers(-1, 2, (4, 40))
    r[64:] += rng.standard_normal((26, 40))
    batch = Batch(np.float32(x), np.arange(4) % 2, np.float32(r), np.arange(90) % 2)
    check(batch, formula, (0.001, 9.0))


def test_labels_are_compared_in_full() -> None:
    rng = np.random.default_rng(9)
    wide = np.array([0, 1, 1 + 2**32, -1, -1 - 2**33, -(2**63) + 1, 2**63 - 1])
    x = rng.standard_normal((70, 8)).astype(np.float32)
    check(Batch(x, rng.choice(wide, 70)), "hinge", usual_margins("euclidean", 8))


@pytest.mark.parametrize("scale", [1e15, 1e-15, 1e-20])
def test_magnitudes(scale: float) -> None:
    rng = np.random.default_rng(10)
    x = (scale * rng.standard_normal((50, 40))).astype(np.float32)
    batch = Batch(x, rng.integers(0, 3, 50))
    for formula in ("hinge", "squared_hinge"):
        check(batch, formula, (0.5 * scale, 8.0 * scale))


@pytest.mark.parametrize("distance", ["euclidean", "dot"])
def test_one_row_far_from_the_others(distance: str) -> None:
    rng = np.random.default_rng(11)
    x = rng.standard_normal((70, 40)).astype(np.float32)
    x[11] *= 1e4
    batch = Batch(x, rng.integers(0, 4, 70), distance=distance)
    check(batch, "squared_hinge", usual_margins(distance, 40))


@pytest.mark.parametrize("grad", [True, False])
def test_nearly_nothing_in_a_tile(grad: bool) -> None:
    # Column tiles without a positive and beyond the negatives' margin are skipped by warps.
    rng = np.random.default_rng(15)
    group = np.arange(200) // 50
    x = 0.1 * rng.standard_normal((200, 20)) + 3 * np.eye(20)[group]
    x[130] = x[3] + 0.01
    labels = group.copy()
    labels[130], labels[131] = 7, 0
    check(Batch(x.astype(np.float32), labels), "hinge", (0.3, 0.5), grad=grad)
