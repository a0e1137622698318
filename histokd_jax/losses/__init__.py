"""Distillation and task losses: pure functions of arrays that never see a config.

`where` is a [b] bool mask of valid rows; masking equals taking the subset, in value and in gradient. Everything
accumulates in float32 (float64 for float64 input). A loss that couples the batch says so and needs b >= 2.
"""

from histokd_jax.losses.attention_maps import attention_map_distance, cosine_distance, logit_kl
from histokd_jax.losses.classification import correct, cross_entropy
from histokd_jax.losses.contrastive import infonce_loss
from histokd_jax.losses.hints import at_loss, fitnet_loss
from histokd_jax.losses.moments import coral_loss, mean_covariance
from histokd_jax.losses.mutual import mutual_kl, tempered_kl
from histokd_jax.losses.orthogonal import non_orthogonality, orth_loss
from histokd_jax.losses.relational import pkt_loss, rkd_loss
from histokd_jax.losses.similarity import sp_loss
from histokd_jax.losses.survival import ce_survival, cox_loss, log_survival, nll_survival, risk_score, survival_curve
from histokd_jax.losses.survival_distillation import (
    at_risk_mask,
    event_distribution_kl,
    hazard_kl,
    risk_order_loss,
)

__all__ = [
    "at_loss",
    "at_risk_mask",
    "attention_map_distance",
    "ce_survival",
    "coral_loss",
    "correct",
    "cosine_distance",
    "cox_loss",
    "cross_entropy",
    "event_distribution_kl",
    "fitnet_loss",
    "hazard_kl",
    "infonce_loss",
    "log_survival",
    "logit_kl",
    "mean_covariance",
    "mutual_kl",
    "nll_survival",
    "non_orthogonality",
    "orth_loss",
    "pkt_loss",
    "risk_order_loss",
    "risk_score",
    "rkd_loss",
    "sp_loss",
    "survival_curve",
    "tempered_kl",
]
