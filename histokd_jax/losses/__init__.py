"""Distillation and task losses: pure functions of arrays that never see a config.

`where` is a [b] bool mask of valid rows; masking equals taking the subset, in value and in gradient. Everything
accumulates in float32 (float64 for float64 input). A loss that couples the batch says so and needs b >= 2.

Losses on logits hold their teacher constant; losses on features do not stop gradients, since some methods train both
sides: `histokd_jax.methods.terms` stops those of the teacher, unless the loss is made to train it. Maps are
[b, channels, positions ...]. `catalogue` lists every loss under the name that a configuration uses.
"""

from histokd_jax.losses.attention_maps import attention_map_distance, cosine_distance, logit_kl
from histokd_jax.losses.boundaries import ab_loss, doubling_weights, ofd_loss, ofd_margin
from histokd_jax.losses.catalogue import CATALOGUE, Entry
from histokd_jax.losses.classification import correct, cross_entropy
from histokd_jax.losses.congruence import cc_kernel_loss, cc_product_loss
from histokd_jax.losses.contrastive import infonce_loss
from histokd_jax.losses.factors import fsp_loss, fsp_matrix, ft_loss, hcl_loss, ickd_loss, nst_loss
from histokd_jax.losses.hints import (
    at_loss,
    attention_errors,
    cosine_loss,
    fitnet_loss,
    hint_errors,
    srd_loss,
    srrl_loss,
    vid_loss,
    vid_rho,
)
from histokd_jax.losses.joint_embedding import (
    barlow_loss,
    barlow_terms,
    covariance_penalty,
    embedding_std,
    infonce_pairs_loss,
    infonce_split_loss,
    split_embedding,
    variance_hinge,
    vicreg_loss,
    vicreg_pairwise_loss,
    vicreg_split_loss,
    vicreg_terms,
)
from histokd_jax.losses.kernels import cka, cka_loss, hsic, hsic_loss, mmd_loss
from histokd_jax.losses.logits import (
    dist_loss,
    dist_terms,
    dkd_loss,
    dkd_terms,
    generalised_distillation_loss,
    kd_loss,
    standardise_logits,
    standardised_kd_loss,
)
from histokd_jax.losses.memory import (
    CrdState,
    QueueState,
    crd_init,
    crd_loss,
    draw_contrast,
    momentum_update,
    queue_infonce,
    queue_init,
    queue_push,
)
from histokd_jax.losses.moments import classic_coral_loss, cmd_loss, coral_loss, mean_covariance
from histokd_jax.losses.mutual import mutual_kl, tempered_kl
from histokd_jax.losses.orthogonal import non_orthogonality, orth_loss
from histokd_jax.losses.peers import (
    dml_loss,
    gated_ensemble,
    kdcl_loss,
    kdcl_pair_loss,
    kdcl_target,
    mutual_loss,
    one_ramp,
    one_terms,
)
from histokd_jax.losses.relational import pkt_loss, rkd_loss
from histokd_jax.losses.similarity import sp_loss
from histokd_jax.losses.survival import ce_survival, cox_loss, log_survival, nll_survival, risk_score, survival_curve
from histokd_jax.losses.survival_distillation import at_risk_mask, event_distribution_kl, hazard_kl, risk_order_loss

__all__ = [
    "CATALOGUE",
    "CrdState",
    "Entry",
    "QueueState",
    "ab_loss",
    "at_loss",
    "at_risk_mask",
    "attention_errors",
    "barlow_loss",
    "barlow_terms",
    "cc_kernel_loss",
    "cc_product_loss",
    "attention_map_distance",
    "ce_survival",
    "cka",
    "cka_loss",
    "classic_coral_loss",
    "cmd_loss",
    "coral_loss",
    "correct",
    "cosine_loss",
    "covariance_penalty",
    "cosine_distance",
    "cox_loss",
    "crd_init",
    "crd_loss",
    "cross_entropy",
    "dist_loss",
    "dist_terms",
    "dkd_loss",
    "dkd_terms",
    "dml_loss",
    "doubling_weights",
    "draw_contrast",
    "embedding_std",
    "event_distribution_kl",
    "fitnet_loss",
    "fsp_loss",
    "fsp_matrix",
    "ft_loss",
    "gated_ensemble",
    "generalised_distillation_loss",
    "hazard_kl",
    "hcl_loss",
    "hint_errors",
    "hsic",
    "hsic_loss",
    "ickd_loss",
    "infonce_loss",
    "infonce_pairs_loss",
    "infonce_split_loss",
    "kd_loss",
    "kdcl_loss",
    "kdcl_pair_loss",
    "kdcl_target",
    "log_survival",
    "logit_kl",
    "mean_covariance",
    "mmd_loss",
    "momentum_update",
    "mutual_kl",
    "mutual_loss",
    "nll_survival",
    "non_orthogonality",
    "nst_loss",
    "ofd_loss",
    "ofd_margin",
    "one_ramp",
    "one_terms",
    "orth_loss",
    "pkt_loss",
    "queue_infonce",
    "queue_init",
    "queue_push",
    "risk_order_loss",
    "risk_score",
    "rkd_loss",
    "sp_loss",
    "split_embedding",
    "srd_loss",
    "srrl_loss",
    "standardise_logits",
    "standardised_kd_loss",
    "survival_curve",
    "tempered_kl",
    "variance_hinge",
    "vicreg_loss",
    "vicreg_pairwise_loss",
    "vicreg_split_loss",
    "vicreg_terms",
    "vid_loss",
    "vid_rho",
]
