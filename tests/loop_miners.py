# SPDX-License-Identifier: Apache-2.0
"""What miners choose, as loops over floats: sets of triplets, or of positive and negative pairs."""

import math

import torch

from loop_triplets import loop_all_triplets, loop_distances, loop_kinds, loop_mined, of_kind


class LoopBatch:
    """Distances and kinds of all pairs."""

    def __init__(self, x, labels, ref_emb=None, ref_labels=None, **options):
        with torch.no_grad():
            d = loop_distances(x, ref_emb, **options)
        self.d = [[float(value) for value in row] for row in d]
        self.kinds = loop_kinds(labels, ref_labels)
        self.n = len(self.kinds)

    def of(self, a, kind):
        return of_kind(self.kinds, a, kind)

    def pairs(self, kind):
        return [(a, j) for a in range(self.n) for j in self.of(a, kind)]

    def hard(self, mining):
        return {t for t in loop_mined(self.d, self.kinds, mining) if None not in t}

    def semi_hard(self, per, fallback):
        """Triplets of :class:`SemiHardMiner`."""
        found = set()
        for a, p in self.pairs(0):
            if per == "anchor" and p != self.extreme(a, 0, True):
                continue
            n = self.extreme(a, 1, False, low=self.d[a][p], strict=True)
            if n is None and fallback:
                n = self.extreme(a, 1, True)
            if n is not None:
                found.add((a, p, n))
        return found

    def extreme(self, a, kind, farthest, low=-math.inf, high=math.inf, strict=False):
        """The nearest (farthest) pair of a kind within limits, at the lowest number."""
        best = None
        for j in self.of(a, kind):
            d = self.d[a][j]
            inside = low < d < high if strict else low <= d <= high
            if inside and (best is None or (d > best[0] if farthest else d < best[0])):
                best = d, j
        return None if best is None else best[1]

    def easy_hard(self, pos, neg, ranges):
        """Sets of positive and of negative pairs of :class:`BatchEasyHardMiner`."""
        limits = [(-math.inf, math.inf) if r is None else r for r in ranges]
        if "all" in (pos, neg):
            return (
                set(self.pairs(0)) if pos == "all" else self._every(0, pos == "hard", limits[0]),
                set(self.pairs(1)) if neg == "all" else self._every(1, neg == "easy", limits[1]),
            )
        found = set(), set()
        for a in range(self.n):
            chosen = [None, None]
            for kind in (1, 0) if pos == "semihard" else (0, 1):
                strategy, other = (pos, neg)[kind], chosen[1 - kind]
                rows = [j for j in self.of(a, kind) if limits[kind][0] <= self.d[a][j]]
                rows = [j for j in rows if self.d[a][j] <= limits[kind][1]]
                if strategy == "semihard":
                    bound = math.nan if other is None else self.d[a][other]
                    sign = 1 if kind else -1
                    rows = [j for j in rows if sign * (self.d[a][j] - bound) > 0]
                farthest = strategy == "easy" if kind else strategy in ("hard", "semihard")
                order = sorted((-self.d[a][j] if farthest else self.d[a][j], j) for j in rows)
                chosen[kind] = order[0][1] if order else None
            if None not in chosen:
                found[0].add((a, chosen[0]))
                found[1].add((a, chosen[1]))
        return found

    def _every(self, kind, farthest, limits):
        found = ((a, self.extreme(a, kind, farthest, *limits)) for a in range(self.n))
        return {(a, j) for a, j in found if j is not None}

    def multi_similarity(self, epsilon):
        """Sets of positive and of negative pairs of :class:`MultiSimilarityMiner`."""
        found = set(), set()
        for a in range(self.n):
            sides = [[self.d[a][j] for j in self.of(a, kind)] for kind in (0, 1)]
            if not (sides[0] and sides[1]):
                continue
            found[0].update((a, j) for j in self.of(a, 0) if self.d[a][j] + epsilon > min(sides[1]))
            found[1].update((a, j) for j in self.of(a, 1) if self.d[a][j] - epsilon < max(sides[0]))
        return found

    def violating(self, violation, margin):
        """Triplets that :class:`MarginViolationMiner` may draw, all that there are."""
        keep = {
            "violating": lambda v: v < margin,
            "absolute": lambda v: abs(v) <= margin,
            "all": lambda v: v <= margin,
            "hard": lambda v: v <= 0 and v <= margin,
            "semihard": lambda v: 0 < v <= margin,
            "easy": lambda v: v > margin,
        }[violation]
        triplets = loop_all_triplets(self.kinds)
        return {(a, p, n) for a, p, n in triplets if keep(self.d[a][n] - self.d[a][p])}

    def top_ratio(self, kind, ratio):
        """Pairs of a kind of :class:`TopRatioMiner`, hardest first."""
        sign = 1 if kind else -1
        order = sorted(self.pairs(kind), key=lambda pair: (sign * self.d[pair[0]][pair[1]], pair))
        return order[: math.ceil(ratio * len(order))]

    def cluster_negatives(self, k, clusters):
        """Negative pairs of :class:`ClusterNegativeMiner`."""
        found = set()
        for a in range(self.n):
            seen = set()
            for j in sorted(self.of(a, 1), key=lambda j, a=a: (self.d[a][j], j)):
                if clusters[j] not in seen and len(seen) < k:
                    seen.add(clusters[j])
                    found.add((a, j))
        return found

    def weights(self, a, features, cutoff, last):
        """Probabilities of the negatives of an anchor for :class:`DistanceWeightedMiner`."""
        logs = {}
        for j in self.of(a, 1):
            d = max(self.d[a][j], cutoff)
            if self.d[a][j] < last:
                cap = math.log(1 - d * d / 4)
                logs[j] = (2 - features) * math.log(d) - (features - 3) / 2 * cap
        if not logs:
            logs = dict.fromkeys(self.of(a, 1), 0.0)
        top = max(logs.values(), default=0.0)
        weights = {j: math.exp(value - top) for j, value in logs.items()}
        return {j: weight / sum(weights.values()) for j, weight in weights.items()}
