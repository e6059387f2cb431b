# SPDX-License-Identifier: Apache-2.0
"""Triplets, triplet losses and what miners choose, as loops over single pairs.

Distances are 0-d float64 tensors, so that autograd differentiates the loops.
"""

import math

import torch
from torch import Tensor

from flashmetric.labels import Labels
from row_oracle import UNIT, loop_kind

MINING = [
    "batch_hard",
    "batch_all",
    "semi_hard",
    "semi_hard_anchor",
    "easy_positive",
    "easy_positive_semi_hard",
]
TYPES = ["all", "hard", "semihard", "easy"]
FORMS = [{}, {"smooth": True}, {"hinge": False}]


def batch(n: int = 13, d: int = 4, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.arange(n) % classes


def loop_kinds(labels, ref_labels=None):
    """0 for positives, 1 for negatives, None for neither, of every pair."""
    words, rule = _words(labels)
    alone = ref_labels is None
    others = words if alone else _words(ref_labels)[0]
    return [
        [
            None if ref_labels is None and i == j else loop_kind(a, b, rule)
            for j, b in enumerate(others)
        ]
        for i, a in enumerate(words)
    ]


def _words(labels):
    words, rule = labels if isinstance(labels, Labels) else (labels, "equal")
    return [row if isinstance(row, list) else [row] for row in words.tolist()], rule


def pair(x: Tensor, r: Tensor, distance: str) -> Tensor:
    """The distance of two rows; unit rows for the distances of such."""
    if distance == "dot":
        return -(x * r).sum()
    if distance == "cityblock":
        return (x - r).abs().sum()
    if distance == "chi2":
        return ((x - r) ** 2 / (x + r)).sum()
    u = ((x - r) ** 2).sum()
    if distance in UNIT and not (x.any() and r.any()):
        u = u.detach() * 0 + 2
    if distance == "euclidean":
        return u.sqrt() if u > 0 else u * 0
    if distance == "sqrt_cosine":
        return (u / 2).sqrt() if u > 0 else u * 0
    return {"sqeuclidean": u, "cosine": u / 2}[distance]


def unit(x: Tensor) -> Tensor:
    return torch.stack([row / row.norm() if row.any() else row * 0 for row in x]) if len(x) else x


def loop_distances(x, r=None, distance="euclidean", normalize=False, anchor_scale=1.0):
    """All distances, [N][M]."""
    r = x if r is None else r
    if normalize or distance in UNIT:
        x, r = unit(x), unit(r)
    return [[pair(anchor_scale * a, b, distance) for b in r] for a in x]


def of_kind(kinds, a, kind):
    return [j for j, k in enumerate(kinds[a]) if k == kind]


def loop_all_triplets(kinds):
    return [
        (a, p, n)
        for a in range(len(kinds))
        for p in of_kind(kinds, a, 0)
        for n in of_kind(kinds, a, 1)
    ]


def loop_mined(d, kinds, mining):
    """Triplets (a, p, n) of each anchor; None where there is none."""
    found = []
    d = [[v.item() if isinstance(v, Tensor) else v for v in row] for row in d]
    for a in range(len(kinds)):
        positives, negatives = of_kind(kinds, a, 0), of_kind(kinds, a, 1)

        def nearest(rows, beyond=-math.inf, a=a):
            rows = [j for j in rows if d[a][j] > beyond]
            return min(rows, key=lambda j: (d[a][j], j), default=None)

        def farthest(rows, a=a):
            return min(rows, key=lambda j: (-d[a][j], j), default=None)

        if mining == "semi_hard":
            for p in positives:
                n = nearest(negatives, d[a][p])
                found.append((a, p, farthest(negatives) if n is None else n))
            continue
        p = (
            farthest(positives)
            if mining in ("batch_hard", "semi_hard_anchor")
            else nearest(positives)
        )
        semi = "semi_hard" in mining and p is not None
        n = nearest(negatives, d[a][p] if semi else -math.inf)
        found.append((a, p, None if "semi_hard" in mining and p is None else n))
    return found


def type_of(d, a, p, n, margin):
    v = (d[a][n] - d[a][p]).item()
    return "easy" if v > margin else "hard" if v <= 0 else "semihard"


def loop_triplet_margin(
    x,
    labels=None,
    *,
    margin=0.2,
    distance="euclidean",
    mining="batch_hard",
    type_of_triplets="all",
    smooth=False,
    hinge=True,
    swap=False,
    scale=1.0,
    anchor_scale=1.0,
    reduction="mean",
    empty="skip",
    normalize=False,
    ref_emb=None,
    ref_labels=None,
):
    """The triplet margin loss, one triplet after the other."""
    d = loop_distances(x, ref_emb, distance, normalize, anchor_scale)
    refs = x if ref_emb is None else ref_emb
    refs = unit(refs) if normalize or distance in UNIT else refs
    kinds = loop_kinds(labels, ref_labels)
    triplets = loop_all_triplets(kinds) if mining == "batch_all" else loop_mined(d, kinds, mining)
    if type_of_triplets != "all":
        triplets = [t for t in triplets if type_of(d, *t, margin) == type_of_triplets]
    losses = []
    for a, p, n in triplets:
        if empty == "skip" and (p is None or n is None):
            continue
        d_ap = x.new_zeros(()) if p is None else d[a][p]
        d_an = d[a][n] if n is not None else d_ap if mining != "semi_hard" else x.new_zeros(())
        if swap and p is not None and n is not None:
            d_pn = pair(refs[p], refs[n], distance)
            d_an = d_pn if d_pn < d_an else d_an
        losses.append((a, scale * form(d_ap - d_an + margin, smooth, hinge)))
    return reduced(losses, reduction, len(x), x)


def form(v, smooth, hinge):
    if smooth:
        return torch.log1p((-v.abs()).exp()) + (v if v > 0 else v * 0)
    return v if v > 0 or not hinge else v * 0


def reduced(losses, reduction, anchors, x):
    """Losses (anchor, value) to a number, or one per anchor."""
    zero = x.sum() * 0
    if reduction == "none":
        rows = [zero] * anchors
        for a, loss in losses:
            rows[a] = rows[a] + loss
        return torch.stack(rows) if rows else x.new_zeros(0)
    values = [loss for _, loss in losses]
    if reduction == "mean_nonzero":
        values = [loss for loss in values if loss > 0]
    total = sum(values, zero)
    return total if reduction == "sum" else total / max(1, len(values))


def loop_ratio(x, labels, *, const=1.0, distance="euclidean", reduction="mean", **where):
    """The squared softmax of the distances of all triplets."""
    ref_emb, ref_labels = where.get("ref_emb"), where.get("ref_labels")
    d, losses = loop_distances(x, ref_emb, distance), []
    for a, p, n in loop_all_triplets(loop_kinds(labels, ref_labels)):
        plus = torch.stack((d[a][p], d[a][n])).softmax(0)
        losses.append((a, const / 2 * (plus[0] ** 2 + (plus[1] - 1) ** 2)))
    return reduced(losses, reduction, len(x), x)


def loop_quotient(x, labels, *, margin=1.0, mining="batch_hard", reduction="mean", **where):
    """Half the hinge on the quotient of squared distances."""
    ref_emb, ref_labels = where.get("ref_emb"), where.get("ref_labels")
    d, losses = loop_distances(x, ref_emb, "sqeuclidean"), []
    for a, p, n in loop_mined(d, loop_kinds(labels, ref_labels), mining):
        if p is not None and n is not None:
            losses.append((a, 0.5 * form(1 - d[a][n] / (margin + d[a][p]), False, True)))
    return reduced(losses, reduction, len(x), x)


def loop_lmnn(x, labels, targets, *, margin=1.0, weights=(0.5, 0.5), **where):
    """Pull of the target neighbours, and push of every impostor from each."""
    d = loop_distances(x, where.get("ref_emb"), "sqeuclidean")
    kinds = loop_kinds(labels, where.get("ref_labels"))
    total = x.sum() * 0
    for a, p in ((a, p) for a, row in enumerate(targets) for p in row if p >= 0):
        total = total + weights[0] * d[a][p]
        for n in of_kind(kinds, a, 1):
            total = total + weights[1] * form(margin + d[a][p] - d[a][n], False, True)
    return total
