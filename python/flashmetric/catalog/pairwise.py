# SPDX-License-Identifier: Apache-2.0
"""Losses that add up a function of each pair."""

from flashmetric.catalog.entry import Entry

_SWEEP = "G forward, 2 G for the gradient in the same sweep; O((N + M) D)"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="ContrastiveLoss",
        rows="B1, B2, B3, B5, B6, B7, B9, B10, B13, B22",
        title="Contrastive",
        formula="+: scale (d - m+)₊^power; -: scale (m- - d)₊^power",
        defaults=(
            "`pos_margin` 0, `neg_margin` 1, `power` 1, `scale` 1, `distance` euclidean; weights of "
            "positive pairs (B5) as `loss(x, labels, pos_weight=...)`. Presets "
            "`pml`, `sentence_transformers`, `tensorflow_addons`, `hadsell`, `caffe_legacy`, "
            "`tum`, `carlevaris`, `fracking`, `hoffer`, `deepid2`, `deepid2_l1`, `radenovic`"
        ),
        source="Hadsell, Chopra, LeCun, CVPR 2006; defaults of pytorch-metric-learning",
        statistic="pair sums",
        reduction="positives with a loss above 0, plus negatives with one",
        complexity=_SWEEP,
        disagreements=(
            "Labels: 0 is similar for Hadsell and Chopra, 1 for Caffe, TUM and Hoffer. A factor of "
            "1/2 in Hadsell's and DeepID2's form only. Five hinges: (m - d)², m - d², m² - d², "
            "1 - d² and m - d. Caffe's legacy form is credited to Chopra in slides on sketch "
            "retrieval; Chopra's is `ExponentialContrastiveLoss`. The weights s of "
            "Carlevaris-Bianco are undefined on the slide: `reduction=none` on labelled pairs "
            "leaves them to the caller. The L1 form of DeepID2 and the margin 4 of Fracking are "
            "unverified. Caffe, TuBui and cirtorch add 1e-4 or 1e-6 to distances; nothing is added "
            "here. pytorch-metric-learning returns 0 for one positive and one negative pair"
        ),
    ),
    Entry(
        name="ExponentialContrastiveLoss",
        rows="B4",
        title="Contrastive with exponential repulsion",
        formula="+: (2/q) d²; -: 2 q exp(-2.77 d / q)",
        defaults="`q` required, `distance` cityblock",
        source="Chopra, Hadsell, LeCun, CVPR 2005",
        statistic="pair sums",
        reduction="sum over pairs",
        complexity=_SWEEP + "; no matrix product for the L1 distance",
        disagreements=(
            "Slides print the energy with bare bars; the paper's is the L1 norm, with q its upper "
            "bound (both unverified). The Euclidean distance is the other reading"
        ),
        example=(("q", 2.0),),
    ),
    Entry(
        name="LogisticDistanceLoss",
        rows="B8",
        title="Logistic on squared distances (DDML)",
        formula="log(1 + exp(beta (1 - l (tau - d²)))) / (2 beta), l = ±1",
        defaults="`tau` 3, `beta` 1, `distance` sqeuclidean",
        source="Hu, Lu, Tan, CVPR 2014",
        statistic="pair sums",
        reduction="sum over pairs",
        complexity=_SWEEP,
        disagreements=(
            "tau is unverified, and the sharpness beta has no published default here: 1 is the "
            "plain logistic function. The weight decay of the paper belongs to the optimiser"
        ),
    ),
    Entry(
        name="SigmoidVerificationLoss",
        rows="B11",
        title="Squared error of a logistic decision on the cosine (DeepID2)",
        formula="(y - sigmoid(w s + b))² / 2, y = 0 or 1",
        defaults="`weight` 1 and `bias` 0 at first, both learned; `distance` cosine",
        source="Sun et al., NIPS 2014",
        statistic="pair sums",
        reduction="all pairs",
        complexity=_SWEEP,
        disagreements=(
            "The slide keeps y = ±1 of the line above; with a sigmoid it must be 0 or 1. Where the "
            "decision begins is not published"
        ),
    ),
    Entry(
        name="CosineTargetLoss",
        rows="B12",
        title="Cosine to a target",
        formula="(s - t)² / 2",
        defaults="`pos_target` 1, `neg_target` -1",
        source="Bromley et al., NIPS 1993",
        statistic="pair sums",
        reduction="all pairs",
        complexity=_SWEEP,
        disagreements=(
            "The slide names the targets and no formula; the squared error is ours. More than two "
            "classes cannot be opposite to each other: set `neg_target` to 0"
        ),
    ),
    Entry(
        name="CosineEmbeddingLoss",
        rows="B14",
        title="Cosine embedding",
        formula="+: 1 - s; -: (s - m)₊",
        defaults="`margin` 0",
        source="torch.nn.CosineEmbeddingLoss",
        statistic="pair sums",
        reduction="all pairs",
        complexity=_SWEEP,
        disagreements="torch adds 1e-12 to squared norms; a zero row has cosine 0 in both",
    ),
    Entry(
        name="CosineContrastiveLoss",
        rows="B15",
        title="Contrastive on cosines (HORDE, ABE)",
        formula="+: (1 - s)² / 2; -: (s - m)₊ / 2",
        defaults="`margin` 0.5",
        source="Jacob et al., ICCV 2019, code",
        statistic="pair sums",
        reduction="positives with a loss above 0, plus negatives with one",
        complexity=_SWEEP,
        disagreements=(
            "HORDE's code takes the mean over all positives, the same unless some coincide, and "
            "needs batches sorted by class"
        ),
    ),
    Entry(
        name="BinomialDevianceLoss",
        rows="B16",
        title="Binomial deviance",
        formula="+: log(1 + exp(-alpha (s - beta))); -: log(1 + exp(alpha C (s - beta)))",
        defaults="`alpha` 2, `beta` 0.5, `cost` C 25, `distance` cosine",
        source="Ustinova, Lempitsky, NIPS 2016; BIER, ICCV 2017",
        statistic="pair sums",
        reduction="all positives, plus all negatives",
        complexity=_SWEEP + "; a second sweep for `bier` and `horde`",
        disagreements=(
            "BIER's code divides the positives by their number plus N (and all by the number of "
            "learners, which is left to the caller); HORDE's adds up means per anchor, and "
            "overflows in float16: reductions `bier` and `horde`"
        ),
    ),
    Entry(
        name="MarginLoss",
        rows="B17",
        title="Margin",
        formula="(alpha + y (d - beta))₊, y = ±1",
        defaults=(
            "`margin` alpha 0.2, `beta` 1.2, `nu` 0, `learn_beta` False, `num_classes` None, rows "
            "of unit length"
        ),
        source="Wu, Manmatha, Smola, Krähenbühl, ICCV 2017",
        statistic="pair sums",
        reduction="pairs with a loss above 0, of both kinds jointly",
        complexity=_SWEEP + "; a second sweep with `nu`",
        disagreements=(
            "pytorch-metric-learning averages over all triplets, which counts pairs repeatedly: "
            "pass them as `indices_tuple` for its value. The code of Roth et al. divides by the "
            "triplets in which either side is active, and adds nu times the sum of beta over "
            "triplets; here it is the mean over anchors, the same as pytorch-metric-learning's for "
            "one beta"
        ),
    ),
    Entry(
        name="SNRContrastiveLoss",
        rows="B18",
        title="Signal-to-noise ratio, contrastive",
        formula=(
            "+: (d - m+)₊; -: (m- - d)₊, d = var(x - r) / var(x); + lambda mean |sum of features|"
        ),
        defaults=(
            "`pos_margin` 0, `neg_margin` 1, `regularization` 0.005, rows of unit length. Preset "
            "`pml`"
        ),
        source="Yuan et al., CVPR 2019; lambda of Roth et al., ICML 2020",
        statistic="pair sums",
        reduction="positives with a loss above 0, plus negatives with one",
        complexity="2 G forward and 3 G backward; 3 G in all without the regulariser",
        disagreements=(
            "pytorch-metric-learning has no regulariser, and an infinite loss for a constant row, "
            "which is at distance 0 here. Roth et al. take triplets, margin 0.2"
        ),
    ),
    Entry(
        name="PairHingeLoss",
        rows="B23",
        title="Hinge on the scores of pairs",
        formula="(1 - y o)₊, y = ±1",
        defaults="`label_convention` required, `margin` 1",
        source="Zagoruyko, Komodakis, CVPR 2015",
        statistic="listed pairs",
        reduction="all pairs",
        complexity="O(pairs)",
        disagreements="None known: the scores are the caller's",
        example=(("label_convention", "similar=1"),),
        call="scores",
        listed=False,
    ),
    Entry(
        name="VerificationLoss",
        rows="B24",
        title="Logistic regression on differences",
        formula="cross-entropy of sigmoid(b - sum w |x - r|), or of (x - r)² / (x + r)",
        defaults="`weight` 1/D and `bias` 0 at first, both learned; `distance` cityblock or chi2",
        source="Taigman et al., CVPR 2014; Koch et al., 2015",
        statistic="pair sums",
        reduction="all pairs",
        complexity="no matrix product: N M D differences forward, and again backward; O((N + M) D)",
        disagreements=(
            "Slides lost the minus sign of the differences. Weights of any sign for listed pairs; "
            "over labelled pairs negative ones count as 0. How the weights begin is not published"
        ),
        example=(("features", 6),),
    ),
    Entry(
        name="SigLIPLoss",
        rows="SigLIP",
        title="Sigmoid loss of two towers",
        formula="log(1 + exp(-y (t s + b))), t = exp(t'), y = ±1",
        defaults="`scale` t 10 and `bias` -10 at first, t' and b learned; positives by position, "
        "M >= N",
        source="Zhai et al., ICCV 2023; open_clip",
        statistic="pair sums",
        reduction="anchors (the sum over all pairs, over N)",
        complexity=_SWEEP,
        disagreements="None known. open_clip expects rows of unit length; here they are scaled",
        call="towers",
    ),
)
