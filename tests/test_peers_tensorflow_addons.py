# SPDX-License-Identifier: Apache-2.0
"""The "tensorflow_addons" presets against numpy written from the documented formulas.

TensorFlow Addons is archived, so its losses are restated here: batch-hard with a masked maximum
that falls back to the row minimum and a masked minimum that falls back to the row maximum, and the
squared contrastive loss. Gradients are checked against central differences.
"""

import numpy as np
import pytest
import torch

from presets import BATCHES, SUBJECTS, contrastive, labelled_rows, triplet, value_and_grads

SMALL_BATCHES = BATCHES | {"regular": [0, 1, 2] * 4}


def euclidean(x: np.ndarray) -> np.ndarray:
    return np.sqrt(((x[:, None, :] - x[None, :, :]) ** 2).sum(-1))


def triplet_hard(x, labels, margin=1.0, soft=False):
    """Mean over all rows of max(hardest positive - hardest negative + margin, 0).

    The hardest positive is max_j (d_ij - min_j d_ij) [j positive] + min_j d_ij, the hardest
    negative min_j (d_ij - max_j d_ij) [j negative] + max_j d_ij. The soft form is
    log(1 + e^(difference)), in which the margin has no part.
    """
    d = euclidean(x)
    same = labels[:, None] == labels[None, :]
    positive, negative = same & ~np.eye(len(x), dtype=bool), ~same
    low, high = d.min(1, keepdims=True), d.max(1, keepdims=True)
    hardest_positive = ((d - low) * positive).max(1, keepdims=True) + low
    hardest_negative = ((d - high) * negative).min(1, keepdims=True) + high
    difference = hardest_positive - hardest_negative
    return np.mean(np.log1p(np.exp(difference)) if soft else np.maximum(difference + margin, 0))


def squared_contrastive(d, y, margin=1.0):
    """Mean over pairs of y d^2 + (1 - y) max(margin - d, 0)^2."""
    return np.mean(y * d**2 + (1 - y) * np.maximum(margin - d, 0) ** 2)


def contrastive_all_pairs(x, labels, margin=1.0):
    i, j = np.nonzero(~np.eye(len(x), dtype=bool))
    y = (labels[i] == labels[j]).astype(float)
    return squared_contrastive(euclidean(x)[i, j], y, margin) if len(i) else 0.0


def numeric_gradient(loss, x, step=1e-6):
    grad = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        grad[index] = (loss(x + shift) - loss(x - shift)) / (2 * step)
    return grad


def check(ours, formula, labels, dtype):
    x, _ = labelled_rows(len(labels), 4, 3)
    labels = np.array(labels)
    value, grad = value_and_grads(lambda x: ours(x, torch.from_numpy(labels)), x.to(dtype))
    tight = dtype == torch.float64
    assert value.item() == pytest.approx(formula(x.numpy(), labels), rel=1e-12 if tight else 1e-5)
    expected = numeric_gradient(lambda x: formula(x, labels), x.numpy())
    np.testing.assert_allclose(
        grad.double().numpy(), expected, rtol=0, atol=1e-7 if tight else 1e-5
    )


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("labels", SMALL_BATCHES.values(), ids=SMALL_BATCHES)
def test_triplet_hard(subject, labels, dtype):
    check(triplet(subject, "tensorflow_addons"), triplet_hard, labels, dtype)


@pytest.mark.parametrize("labels", SMALL_BATCHES.values(), ids=SMALL_BATCHES)
def test_soft_triplet_hard_is_smooth_without_margin(subject, labels):
    ours = triplet(subject, "tensorflow_addons", smooth=True, margin=0.0)
    check(ours, lambda x, y: triplet_hard(x, y, soft=True), labels, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("labels", SMALL_BATCHES.values(), ids=SMALL_BATCHES)
def test_contrastive_all_pairs(subject, labels, dtype):
    ours = contrastive(subject, "tensorflow_addons")
    check(ours, contrastive_all_pairs, labels, dtype)


def test_contrastive_given_pairs(subject):
    x, _ = labelled_rows(9, 4, 3)
    i, j, y = np.array([0, 1, 2, 5, 5]), np.array([3, 4, 8, 6, 6]), np.array([1, 0, 0, 1, 0])
    indices = tuple(torch.from_numpy(k) for k in (i[y == 1], j[y == 1], i[y == 0], j[y == 0]))
    value = contrastive(subject, "tensorflow_addons", neg_margin=4.0)(x, indices_tuple=indices)
    expected = squared_contrastive(euclidean(x.numpy())[i, j], y, margin=4.0)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_zero_distance(subject):
    x = torch.ones(6, 3, dtype=torch.float64)
    labels = torch.arange(6) % 2
    value, grad = value_and_grads(lambda x: triplet(subject, "tensorflow_addons")(x, labels), x)
    assert triplet_hard(x.numpy(), labels.numpy()) == 1.0
    # Six times 1/6, not 6/6: the last bit depends on the order of the sum.
    assert value.item() == pytest.approx(1.0, rel=1e-15) and not grad.any()
    value, grad = value_and_grads(lambda x: contrastive(subject, "tensorflow_addons")(x, labels), x)
    assert value.item() == pytest.approx(18 / 30) and not grad.any()


def test_empty_batch_is_zero_where_the_formula_has_no_value(subject):
    x, labels = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="zero-size array"):
        triplet_hard(x.numpy(), labels.numpy())
    assert triplet(subject, "tensorflow_addons")(x, labels).item() == 0.0
