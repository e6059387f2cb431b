# SPDX-License-Identifier: Apache-2.0
"""The losses as functions: what they compute, checked and differentiable."""

from flashmetric.functional.adaptive_triplet import adaptive_weighted_triplet_loss
from flashmetric.functional.angular import angular_loss
from flashmetric.functional.circle import circle_loss
from flashmetric.functional.contrastive import contrastive_loss
from flashmetric.functional.cosine_pairs import (
    cosine_contrastive_loss,
    cosine_embedding_loss,
    cosine_target_loss,
)
from flashmetric.functional.deviance import binomial_deviance_loss
from flashmetric.functional.distance_pairs import (
    exponential_contrastive_loss,
    logistic_distance_loss,
)
from flashmetric.functional.fast_ap import fast_ap_loss
from flashmetric.functional.image_text import image_text_loss
from flashmetric.functional.info_nce import info_nce_loss, ntxent_loss
from flashmetric.functional.labelled_pairs import labelled_pairs
from flashmetric.functional.lifted_structure import (
    generalized_lifted_structure_loss,
    lifted_structure_loss,
)
from flashmetric.functional.lmnn import lmnn_loss
from flashmetric.functional.margin import margin_loss
from flashmetric.functional.multi_similarity import multi_similarity_loss
from flashmetric.functional.n_pairs import n_pairs_loss
from flashmetric.functional.nca import nca_loss
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.pair_hinge import pair_hinge_loss
from flashmetric.functional.pair_loss import pair_loss
from flashmetric.functional.pair_weights import pair_weights
from flashmetric.functional.pairs import Logit, Pairs, Term
from flashmetric.functional.quadruplet import quadruplet_loss
from flashmetric.functional.ranked_list import ranked_list_loss
from flashmetric.functional.siglip import siglip_loss
from flashmetric.functional.snr import snr_contrastive_loss
from flashmetric.functional.soft_triple import soft_triple_loss
from flashmetric.functional.sup_con import sup_con_loss
from flashmetric.functional.triplet import triplet_margin_loss
from flashmetric.functional.triplet_ratio import triplet_quotient_loss, triplet_ratio_loss
from flashmetric.functional.verification import sigmoid_verification_loss, verification_loss

__all__ = [
    "Logit",
    "Pairs",
    "Term",
    "adaptive_weighted_triplet_loss",
    "angular_loss",
    "binomial_deviance_loss",
    "circle_loss",
    "contrastive_loss",
    "cosine_contrastive_loss",
    "cosine_embedding_loss",
    "cosine_target_loss",
    "exponential_contrastive_loss",
    "fast_ap_loss",
    "generalized_lifted_structure_loss",
    "image_text_loss",
    "info_nce_loss",
    "labelled_pairs",
    "lifted_structure_loss",
    "lmnn_loss",
    "logistic_distance_loss",
    "margin_loss",
    "multi_similarity_loss",
    "n_pairs_loss",
    "nca_loss",
    "normalize_rows",
    "ntxent_loss",
    "pair_hinge_loss",
    "pair_loss",
    "pair_weights",
    "quadruplet_loss",
    "ranked_list_loss",
    "siglip_loss",
    "sigmoid_verification_loss",
    "snr_contrastive_loss",
    "soft_triple_loss",
    "sup_con_loss",
    "triplet_margin_loss",
    "triplet_quotient_loss",
    "triplet_ratio_loss",
    "verification_loss",
]
