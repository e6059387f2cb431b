# SPDX-License-Identifier: Apache-2.0
"""Losses on statistics of each anchor's pairs."""

from flashmetric.catalog.entry import Entry

_LSE = "G forward, 3 G backward; O((N + M) D)"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="MultiSimilarityLoss",
        rows="C1, C2, C3, A11",
        title="Multi-similarity, also with its miner",
        formula=(
            "log(1 + Σ_p exp(-alpha (s_p - base))) / alpha + "
            "log(1 + Σ_n exp(beta (s_n - base))) / beta; with `mining` over the positives with "
            "s_p - epsilon < max s_n and the negatives with s_n + epsilon > min s_p"
        ),
        defaults=(
            "`alpha` 2, `beta` 50, `base` 0.5, `mining` off, `epsilon` 0.1, `distance` cosine. "
            "Presets `official` (`beta` 40, `mining`), `pml`"
        ),
        source="Wang et al., CVPR 2019; defaults of the paper and of pytorch-metric-learning",
        statistic="log-sum-exp",
        reduction="all anchors of the batch",
        complexity="G forward (3 G with `mining`), 3 G backward; O((N + M) D)",
        disagreements=(
            "The authors' configuration has beta 40, the paper 50. The authors' code always mines, "
            "and skips anchors without mined pairs but divides by all; so does `mining` here, and "
            "pytorch-metric-learning with its miner. The authors' code drops positives with a "
            "similarity above 1 - 1e-5 to get rid of the row itself; duplicates count here. "
            "General pair weighting is `pair_weights`, for every loss"
        ),
    ),
    Entry(
        name="LiftedStructureLoss",
        rows="C5",
        title="Lifted structure",
        formula=(
            "J_ij² / 2 of J_ij = (log(Σ_N(i) exp(m- - d_ik) + Σ_N(j) exp(m- - d_jk)) + d_ij - m+)₊"
        ),
        defaults=(
            "`neg_margin` 1, `pos_margin` 0, `max_positives` all, `distance` euclidean, `l2` 0 "
            "(RDML: 0.005, with `l2_power` 1). Preset "
            "`pml` (`normalize`)"
        ),
        source="Oh Song et al., CVPR 2016, and the authors' Caffe layer",
        statistic="log-sum-exp",
        reduction="positive pairs",
        complexity="2 G forward, 3 G backward; O((N + M) D + N K) for K positives per anchor",
        disagreements=(
            "Rows are not normalised by the authors, and are by pytorch-metric-learning. With "
            "references only the anchor has negatives here; pytorch-metric-learning mistakes "
            "numbers of references for numbers of anchors. A positive pair without negatives does "
            "not count here and is squared alone there. The authors' layer divides by zero for "
            "duplicates"
        ),
        one_graph=False,
    ),
    Entry(
        name="GeneralizedLiftedStructureLoss",
        rows="C6",
        title="Generalised lifted structure",
        formula="(log Σ_p exp(d_p - m+) + log Σ_n exp(m- - d_n))₊",
        defaults=(
            "`neg_margin` 1, `pos_margin` 0, `distance` euclidean. Preset `pml` (`normalize`)"
        ),
        source="Hermans, Beyer, Leibe, arXiv:1703.07737",
        statistic="log-sum-exp",
        reduction="anchors with a positive and a negative",
        complexity=_LSE,
        disagreements=(
            "pytorch-metric-learning takes a log-sum-exp of nothing for 0: its loss is not 0 for "
            "one class or for unique labels"
        ),
    ),
    Entry(
        name="AdaptiveWeightedTripletLoss",
        rows="C9",
        title="Adaptive weighted triplet",
        formula="(m + Σ_p w_p d_p - Σ_n w_n d_n)₊, w_p ∝ exp(d_p), w_n ∝ exp(-d_n) constant",
        defaults="`margin` 1, `smooth` off, `distance` euclidean",
        source="Ristani, Tomasi, CVPR 2018 (abstract and secondary sources)",
        statistic="log-sum-exp",
        reduction="anchors with a positive and a negative",
        complexity=_LSE,
        disagreements=(
            "Whether the weights count as constants is not said in what was read; they do here. "
            "Its gradient is then that of the generalised lifted structure loss"
        ),
        holds_factors=True,
    ),
    Entry(
        name="RankedListLoss",
        rows="C7",
        title="Ranked list (RLL)",
        formula=(
            "(1 - λ) Σ_p w_p (d_p - (alpha - m)) over d_p > alpha - m, plus "
            "λ Σ_n w_n (alpha - d_n) over d_n < alpha; w_p ∝ exp(T+ d_p), w_n ∝ exp(-T- d_n) "
            "constant, with sum 1"
        ),
        defaults=(
            "`margin` 0.4, `alpha` 1 + margin / 2, `neg_temperature` 10, `pos_temperature` 0, "
            "`imbalance` 0.5, `distance` euclidean, `normalize` on"
        ),
        source="Wang et al., CVPR 2019, and the authors' README",
        statistic="log-sum-exp",
        reduction="anchors with a positive and a negative",
        complexity="2 G forward, up to 6 G backward; O((N + M) D)",
        disagreements=(
            "pytorch-metric-learning adds 1e-5 per row of the batch to every divisor, drops "
            "negatives that coincide with the anchor, differentiates the weights, warns of "
            "temperatures above 5 and divides by all anchors. Gradients through the weights are "
            "not offered: they need a second moment per anchor. RLL-(L,M,H) is this loss on three "
            "embeddings"
        ),
        holds_factors=True,
    ),
    Entry(
        name="NCALoss",
        rows="C8, F9",
        title="Neighbourhood components analysis",
        formula="-log p or -p, p = Σ_p exp(-s d_p) / (Σ_p exp(-s d_p) + Σ_n exp(-s d_n))",
        defaults=(
            "`softmax_scale` 1, `form` log, `distance` sqeuclidean. Preset `pml` (`normalize`)"
        ),
        source="Goldberger et al., NIPS 2004; pytorch-metric-learning for the logarithm",
        statistic="log-sum-exp",
        reduction="anchors with a positive",
        complexity=_LSE,
        disagreements=(
            "The paper maximises Σ p (`form` probability), pytorch-metric-learning Σ log p. There "
            "an anchor whose probability underflows is dropped; nothing underflows here. There "
            "`indices_tuple` weighs the anchors; here it lists the neighbours"
        ),
    ),
    Entry(
        name="FastAPLoss",
        rows="E1, E2",
        title="FastAP",
        formula=(
            "1 - Σ_l h+_l H+_l / H_l / N+, soft histograms h of squared distances of unit rows and "
            "their cumulative sums H"
        ),
        defaults="`bins` 10",
        source="Cakir et al., CVPR 2019, and the authors' PyTorch code",
        statistic="histograms",
        reduction="anchors with a positive",
        complexity="2 G forward, 6 G backward, and O(N M) per bin at most; O((N + M) D + N bins)",
        disagreements=(
            "The backward pass that the authors write by hand is N / 2 times the gradient and "
            "ignores what comes from above: divide their learning rates accordingly. "
            "pytorch-metric-learning takes no references, and `indices_tuple` as weights"
        ),
    ),
    Entry(
        name="QuadrupletLoss",
        rows="T13, D6",
        title="Quadruplet",
        formula=(
            "(max d_p - min d_n + m1)₊ + (max d_p - min d_lk + m2)₊ over pairs l, k of two classes "
            "that are not the anchor's"
        ),
        defaults=(
            "`margin` 0.2, `pair_margin` 0.2, `class_size` counted, `distance` sqeuclidean. Preset "
            "`rdml` (euclidean, `normalize`)"
        ),
        source="Chen et al., CVPR 2017; margins of Revisiting Deep Metric Learning",
        statistic="hardest pairs",
        reduction="anchors that have the pairs, either term on its own",
        complexity="2 G forward; O((N + M) D + N K) for classes of K rows",
        disagreements=(
            "The paper sums squares of a learned distance over all quadruplets that an adaptive "
            "margin finds hard; here it is the hardest quadruplet of each anchor, with fixed "
            "margins. Revisiting Deep Metric Learning has plain Euclidean distances and a random "
            "fourth row, which may be of the anchor's class. multi_hot labels that match any class "
            "are not supported"
        ),
        one_graph=False,
    ),
)
