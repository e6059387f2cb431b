# SPDX-License-Identifier: Apache-2.0
"""Entries of the triplet losses."""

from flashmetric.catalog.entry import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="TripletMarginLoss",
        rows="T1-T6, T9-T12, T17, T18, A2-A6, D1, D4",
        title="Triplet margin loss",
        formula=(
            "scale * max(v, 0), v = d(a, p) - d(a, n) + margin; softplus(v) if `smooth`, "
            "v without `hinge`; over the triplets of `mining`"
        ),
        defaults=(
            "margin 0.2, distance euclidean, mining batch_hard (or batch_all, semi_hard, "
            "semi_hard_anchor, easy_positive, easy_positive_semi_hard), scale 1, anchor_scale 1; "
            "given triplets may have a margin each (function only), batch_all one per class of anchor "
            "and negative, a tensor [C, C] (T12, D4: the hierarchy that yields it is the user's). "
            "Presets: pml (all triplets), pml_batch_hard, sentence_transformers, "
            "tensorflow_addons; tubui (T1), tubui_scaled_anchor (T6, k = 2), facenet (T2), deep_ranking (T4), sqrt_cosine (T5), "
            "wang_gupta, in_defense (T3), in_defense_soft (T9), in_defense_none (T10), "
            "cosine_softplus (T11), snr (T17), l1 (T18)"
        ),
        source=(
            "Schroff et al., CVPR 2015; Hermans et al., arXiv:1703.07737; Wang et al., CVPR 2014; "
            "Bui et al., CVIU 2017; Xuan et al., WACV 2020"
        ),
        statistic="hardest pairs",
        reduction="mean over anchors or triplets; mean_nonzero, sum, none",
        complexity="G/2 without references, else G; batch_all G and a binary search per pair "
        "(per class pair margins: 2 G, one sweep a class), memory O(N P)",
        disagreements=(
            "Factor 1/2 in one slide deck only, which cites FaceNet for it: FaceNet has none. "
            'Anchors without a positive or negative: skipped here; `empty="keep"` counts them as '
            "tensorflow-addons and sentence-transformers do. Batch-all is averaged over all "
            "triplets by default, by the peers over those with a loss (`mean_nonzero`). "
            "Semi-hard: per positive with the farthest negative as fallback in tensorflow-addons "
            "and sentence-transformers, all triplets within the margin in "
            'pytorch-metric-learning\'s TripletMarginMiner (`type_of_triplets="semihard"`), per '
            "anchor in its BatchEasyHardMiner (`semi_hard_anchor`). The root of 1 - cosine cancels "
            "in the squared form; Wang and Gupta have 1 - cosine, margin 0.5, no 1/2. The margin "
            "of the ranking hinge is 1 here; the slides leave it open. The SNR preset is "
            "without the regulariser of RDML: add 0.005 times "
            "`normalize_rows(x).sum(1).abs().mean()`. pytorch-metric-learning takes all triplets "
            "unless a miner chooses some, as the preset pml does."
        ),
    ),
    Entry(
        name="TripletRatioLoss",
        rows="T8, D2",
        title="Triplet network (softmax ratio)",
        formula="const * d+^2, d+ = e^d(a, p) / (e^d(a, p) + e^d(a, n))",
        defaults="const 1, distance euclidean, mining batch_all",
        source="Hoffer and Ailon, arXiv:1412.6622; TripletNet code",
        statistic="batch-all triplets",
        reduction="mean over triplets; sum, none",
        complexity="G and a logistic function per triplet, memory O(N P)",
        disagreements=(
            "The printed norm |(d+, d- - 1)|^2 is 2 d+^2, the authors' code has d+^2 (const 1). "
            "The slides say it vanishes with the ratio of the distances: it depends on their "
            "difference. The paper samples triplets; batch_all takes every one."
        ),
        one_graph=False,
    ),
    Entry(
        name="TripletQuotientLoss",
        rows="T7",
        title="Triplet quotient loss",
        formula="scale * max(0, 1 - d(a, n) / (margin + d(a, p)))",
        defaults="margin 1, scale 1/2, distance sqeuclidean, mining batch_hard",
        source="Bui et al., Triplet_Loss_SBIR (TripletLossLayer2)",
        statistic="hardest pairs",
        reduction="mean over anchors or triplets; sum, none",
        complexity="2 G, memory O(N)",
        disagreements="The backward pass of the authors' layer is not the derivative; here it is.",
    ),
    Entry(
        name="LMNNLoss",
        rows="T16",
        title="Large margin nearest neighbours",
        formula=(
            "pull_weight * sum d(a, p) + push_weight * sum max(margin + d(a, p) - d(a, n), 0) over "
            "target neighbours p and all negatives n"
        ),
        defaults=(
            "n_neighbors 3, margin 1, both weights 1/2, distance sqeuclidean; target neighbours "
            "of the batch unless `target_neighbors` fixes them"
        ),
        source="Weinberger and Saul, JMLR 2009; metric-learn",
        statistic="batch-all triplets",
        reduction="sum; mean over anchors, none",
        complexity="2 G, memory O(N k)",
        disagreements=(
            "The slides print the distance with a root, LMNN has it squared. Slides: pull + lambda "
            "push; metric-learn: reg pull + (1 - reg) push, reg 1/2."
        ),
    ),
)
