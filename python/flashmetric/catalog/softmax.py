# SPDX-License-Identifier: Apache-2.0
"""Losses that are a softmax over pairs or classes."""

from flashmetric.catalog.entry import Entry

_LINEAR = "O((N + M) D)"
_TOWERS = f"G forward, 3 G backward; {_LINEAR}"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="NPairsLoss",
        rows="C4",
        title="N-pairs",
        formula="log(1 + Σ_{j≠i} exp(a_i·p_j - a_i·p_i)) + l2 (|a_i|² + |p_i|²), one pair per class",
        defaults=(
            "`l2` 0, `l2_power` 2, `distance` dot. Presets `paper` (`l2` 0.005), "
            "`tensorflow_addons` (0.0005), `rdml` (0.0025 on unsquared lengths), `pml` (none)"
        ),
        source="Sohn, NIPS 2016",
        statistic="log-sum-exp",
        reduction="pairs",
        complexity="with P pairs, P² D forward, 3 P² D backward; O(P D). P = N / 2 is reserved",
        disagreements=(
            "With labels the first two rows of each class are its pair, as in "
            "pytorch-metric-learning, whose default distance however normalises rows. "
            "TensorFlow Addons takes anchors and positives, which is the form without labels here, "
            "and shares the target among equal labels, which a proper batch does not have. The "
            "regulariser is of squared lengths in the paper, of lengths in RDML, absent in "
            "pytorch-metric-learning"
        ),
        listed=False,
    ),
    Entry(
        name="InfoNCELoss",
        rows="F9",
        title="InfoNCE",
        formula="-log(exp(s_ap / T) / (exp(s_ap / T) + Σ_n exp(s_an / T)))",
        defaults="`temperature` 0.07 (learned as a `LearnedTemperature`), `distance` cosine",
        source="van den Oord, Li, Vinyals, 2018",
        statistic="log-sum-exp",
        reduction="positive pairs",
        complexity=_TOWERS,
        disagreements=(
            "Several positives of an anchor do not compete with each other: each meets the "
            "negatives alone. In `SupConLoss` they do compete"
        ),
        call="towers",
    ),
    Entry(
        name="NTXentLoss",
        rows="F9",
        title="NT-Xent",
        formula="-log(exp(s_ap / T) / (exp(s_ap / T) + Σ_n exp(s_an / T)))",
        defaults="`temperature` 0.07 (learned as a `LearnedTemperature`), `distance` cosine",
        source="Chen et al., ICML 2020; labels as in pytorch-metric-learning",
        statistic="log-sum-exp",
        reduction="positive pairs",
        complexity=f"2 G forward, 5 G backward; {_LINEAR}, whatever the number of pairs",
        disagreements=(
            "SimCLR's loss is that of both views in one batch with equal labels, T 0.1 to 0.5. "
            "pytorch-metric-learning lists P x Q pairs, and adds the smallest number inside the "
            "logarithm, which bounds loss and gradient where exp(-s / T) underflows. A positive "
            "pair without negatives costs 0 and counts, there and here"
        ),
    ),
    Entry(
        name="SupConLoss",
        rows="K10",
        title="Supervised contrastive",
        formula="-(1/P) Σ_p log(exp(s_ap / T) / Σ_{k≠a} exp(s_ak / T))",
        defaults="`temperature` 0.1 (may be learned), `form` out, `distance` cosine",
        source="Khosla et al., NeurIPS 2020",
        statistic="log-sum-exp",
        reduction="anchors with a positive",
        complexity=f"G forward, 3 G backward, and a sweep over blocks that hold positives; {_LINEAR}",
        disagreements=(
            "The authors' code multiplies by T / 0.07. pytorch-metric-learning averages over losses "
            "above 0, which is the same, and returns 0 where no anchor has a negative"
        ),
    ),
    Entry(
        name="CircleLoss",
        rows="C3",
        title="Circle",
        formula="log(1 + Σ_n exp(γ [s_n + m]₊ (s_n - m)) Σ_p exp(γ [1 + m - s_p]₊ (1 - m - s_p)))",
        defaults="`m` 0.4, `gamma` 80; the paper has 0.25 and 256 (faces), 0.25 and 128 (persons)",
        source="Sun et al., CVPR 2020",
        statistic="log-sum-exp",
        reduction="anchors with a positive and a negative",
        complexity=f"G forward, 3 G backward; {_LINEAR}",
        disagreements=(
            "The factors [.]₊ are constants in the gradient, in the paper and in all codes: the "
            "gradient is not that of the value. pytorch-metric-learning averages over losses above "
            "0, which is the same (they cannot vanish)"
        ),
        holds_factors=True,
    ),
    Entry(
        name="ContrastiveImageTextLoss",
        rows="F9, H2",
        title="Images and texts (CLIP)",
        formula="half of -log softmax over texts of z_ii, half over images; z = min(e^t, 100) s",
        defaults=(
            "`temperature` 0.07, learned as `logit_scale` t, `max_scale` 100, `form` out, "
            "`distance` cosine"
        ),
        source="Radford et al., ICML 2021; labels as in UniCL, Yang et al., CVPR 2022",
        statistic="log-sum-exp",
        reduction="images with a text, and texts with an image",
        complexity=f"G forward for both directions, 3 G backward; {_LINEAR}",
        disagreements=(
            "With several positives UniCL averages their log shares (`form` out); averaging shares "
            "(`form` in) is the loss of MIL-NCE up to log P, and needs no further sweep"
        ),
        call="towers",
    ),
    Entry(
        name="AngularLoss",
        rows="D3",
        title="Angular",
        formula="log(1 + Σ_n exp(4 tan²α (a + p)·n - 2 (1 + tan²α) a·p))",
        defaults=(
            "`alpha` 45 (degrees), `n_pairs_lambda` None, `normalize` True, `max_positives` None, "
            "`form` log (or hinge). "
            "Presets `pml` (`alpha` 40), `rdml` (on top of N-pairs, times 2)"
        ),
        source="Wang et al., ICCV 2017",
        statistic="log-sum-exp",
        reduction="positive pairs whose anchor has a negative",
        complexity="with Q positive pairs, Q M D forward, 3 Q M D backward; O((N + M + Q) D)",
        disagreements=(
            "pytorch-metric-learning normalises anchors and positives but not negatives; all rows "
            "are normalised here, and both agree on unit rows. The slide's form, `hinge`, is one of "
            "|a - p|² - 4 tan²α |n - (a + p)/2|², of which this is the paper's smooth version. "
            "RDML draws one positive and one negative per class; here every pair meets all "
            "negatives"
        ),
        listed=False,
        one_graph=False,
    ),
    Entry(
        name="SoftTripletLoss",
        rows="F4, K12",
        title="SoftTriple",
        formula="cross-entropy of λ (S_c - δ [c = y]), S_c = Σ_k softmax_k(s_ck / γ) s_ck",
        defaults=(
            "`num_classes` and `embedding_size` required, `centers_per_class` 10, `la` 20, "
            "`gamma` 0.1, `margin` 0.01, `tau` 0.2. `SoftTripleLoss` is the same class"
        ),
        source="Qian et al., ICCV 2019, and the authors' code",
        statistic="products in slabs",
        reduction="rows, plus the regulariser",
        complexity="N C K D forward, 3 N C K D backward; O((N + C K) D)",
        disagreements=(
            "The regulariser sums the pairs t < s of a class but divides by K (K - 1), and has 1e-5 "
            "in its root, both as in the authors' code. pytorch-metric-learning has no regulariser "
            "by default, and weights rows by how often a miner names them"
        ),
        example=(("num_classes", 6), ("embedding_size", 6), ("centers_per_class", 3)),
        call="classes",
        listed=False,
    ),
)
