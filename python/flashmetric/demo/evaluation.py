# SPDX-License-Identifier: Apache-2.0
"""Exact retrieval and nearest-neighbour scores in bounded memory.

Every score ranks references by Euclidean distance. Distances are computed for a few queries at a
time, so memory stays near ``tile_elements`` values whatever the number of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_TILE_ELEMENTS = 2**22


@dataclass(frozen=True)
class Scores:
    """Scores of one set of embeddings, all between 0 and 1.

    Attributes:
        recall_at_1: Share of queries whose nearest other image has the same class.
        recall_at_5: Share of queries with an image of the same class among the nearest five.
        map_at_r: Mean over queries of ``1/R * sum_{i<=R} P(i) rel(i)``, where R is the number of
            other images of the query's class, ``rel(i)`` tells whether the i-th nearest is one of
            them, and ``P(i)`` is the share of them among the nearest i (Musgrave, Belongie and
            Lim, "A Metric Learning Reality Check", ECCV 2020).
        knn_accuracy: Share of queries classified rightly by a vote of the nearest five references.
    """

    recall_at_1: float
    recall_at_5: float
    map_at_r: float
    knn_accuracy: float


def score(
    test: Tensor,
    test_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> Scores:
    """Score held-out embeddings.

    Args:
        test: Held-out embeddings [N, D]; each queries the N - 1 others.
        test_labels: Their labels [N].
        gallery: References [M, D] of the vote, usually the training images; None takes the other
            held-out embeddings, which is the only choice if the classes are new.
        gallery_labels: Labels [M] of the gallery.

    Returns:
        The four scores. Queries that are the only image of their class do not count in the first
        three.
    """
    recall_at_1, recall_at_5, map_at_r = retrieval_scores(test, test_labels)
    accuracy = knn_accuracy(test, test_labels, gallery, gallery_labels)
    return Scores(recall_at_1, recall_at_5, map_at_r, accuracy)


def retrieval_scores(
    embeddings: Tensor, labels: Tensor, *, tile_elements: int = _TILE_ELEMENTS
) -> tuple[float, float, float]:
    """Return Recall@1, Recall@5 and MAP@R of embeddings [N, D] that query each other."""
    classes, class_index = _classes(labels)
    relevant = torch.bincount(class_index, minlength=len(classes))[class_index] - 1
    if not bool((relevant > 0).any()):
        raise ValueError("labels: expected at least two images of some class")
    depth = min(max(int(relevant.max()), 5), len(labels) - 1)
    rank = torch.arange(1, depth + 1)
    totals = torch.zeros(3, dtype=torch.float64)
    for rows, neighbours in _nearest(embeddings, None, depth, tile_elements):
        counted = relevant[rows] > 0
        r = relevant[rows][counted].unsqueeze(1)
        hits = (labels[neighbours] == labels[rows].unsqueeze(1))[counted]
        precision = hits.cumsum(1, dtype=torch.float64) / rank
        average = (precision * (hits & (rank <= r))).sum(1, keepdim=True) / r
        totals += torch.stack([hits[:, 0].sum(), hits[:, :5].any(1).sum(), average.sum()])
    recall_at_1, recall_at_5, map_at_r = (totals / int((relevant > 0).sum())).tolist()
    return recall_at_1, recall_at_5, map_at_r


def knn_accuracy(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    k: int = 5,
    tile_elements: int = _TILE_ELEMENTS,
) -> float:
    """Return the share of queries [N, D] classified rightly by their k nearest references.

    Each of the k nearest has one vote; equal counts go to the class with the nearest member.
    Without a gallery the references are the other queries.
    """
    labels = query_labels if gallery_labels is None else gallery_labels
    classes, class_index = _classes(labels)
    k = min(k, len(labels) - (gallery is None))
    order = torch.arange(k)
    right = 0
    for rows, neighbours in _nearest(query, gallery, k, tile_elements):
        voters = class_index[neighbours]
        votes = torch.zeros(len(voters), len(classes), dtype=torch.long)
        votes.scatter_add_(1, voters, torch.ones_like(voters))
        winner = (votes.gather(1, voters) * k - order).argmax(1, keepdim=True)
        predicted = classes[voters.gather(1, winner).squeeze(1)]
        right += int((predicted == query_labels[rows]).sum())
    return right / len(query)


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels that occur, ascending, and the position of each label among them."""
    classes = torch.tensor(sorted(set(labels.tolist())), dtype=labels.dtype)
    return classes, torch.searchsorted(classes, labels)


def _nearest(
    query: Tensor, reference: Tensor | None, depth: int, tile_elements: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield query rows and the indices [rows, depth] of their nearest references, in order."""
    others = query if reference is None else reference
    squared_norm = others.square().sum(1)
    rows_per_tile = max(1, tile_elements // len(others))
    for start in range(0, len(query), rows_per_tile):
        rows = torch.arange(start, min(start + rows_per_tile, len(query)))
        # The squared norm of the query is the same for all of its references.
        distance = torch.addmm(squared_norm, query[rows], others.T, alpha=-2)
        if reference is None:
            distance[torch.arange(len(rows)), rows] = torch.inf
        yield rows, distance.topk(depth, largest=False).indices
