"""The objective of the supervised baselines (survival_baselines, sections 1, 7 and 8b)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from histokd_jax import losses
from histokd_jax.losses import survival
from histokd_jax.methods.settings import with_traced
from histokd_jax.types import SURVIVAL, Batch, Metrics, Outputs

CE, BCE = "ce", "bce"
NLL, COX = "nll", "cox"
CLASSIFICATION_LOSSES, SURVIVAL_LOSSES = (CE, BCE), (NLL, CE, COX)
SMOOTH_SVM = "smooth_svm"
INSTANCE_LOSSES = (CE, SMOOTH_SVM)
UNCENSORED, ALL = "uncensored", "all"
PER_BAG, PER_UPDATE = "per_bag", "per_update"

L1, INSTANCE_LOGITS, INSTANCE_VALID, MAX_LOGITS = "l1", "instance_logits", "instance_valid", "max_logits"

TRACED: Mapping[str, str] = {
    "loss.alpha": "alpha",
    "loss.l1": "l1",
    "loss.instance_weight": "instance_weight",
    "loss.max_weight": "max_weight",
}
"""Config key -> field of `ObjectiveSpec` that may be an array instead of a number."""


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Terms and weights. The numbers in `TRACED` may be traced scalars (`with_values`).

    Attributes:
      task: "classification" or "survival".
      classification: "ce", or "bce": one-hot binary cross entropy averaged over the classes.
      survival: "nll", "ce" (both on time bins) or "cox".
      alpha: how much less censored patients count ("nll"), or weight of the likelihood ("ce").
      clamp: of the survival cross entropy, see `losses.survival.ce_survival`.
      ties: of the Cox loss, see `losses.survival.cox_loss`.
      l1: weight of the sum of absolute parameters.
      l1_scaling: "per_bag" adds the term once per slide of the step, as the published code does; "per_update" once.
      instance_weight: of the instance loss, if the network has instance heads; the bag loss gets the rest.
      instance_loss: "ce" or "smooth_svm".
      instance_on: which slides of a survival task train the instance heads: "uncensored" or "all".
      subtyping: whether the top patches are negatives of the other classes.
      max_weight: of the loss on per-class maxima, if the network has them; the bag loss gets the rest.
      needs_genes: slides without genes are left out.
    """

    task: str = SURVIVAL
    classification: str = CE
    survival: str = NLL
    alpha: float = 0.0
    clamp: str = "both"
    ties: str = "breslow"
    l1: float = 0.0
    l1_scaling: str = PER_BAG
    instance_weight: float = 0.3
    instance_loss: str = CE
    instance_on: str = UNCENSORED
    subtyping: bool = True
    max_weight: float = 0.5
    needs_genes: bool = False

    def with_values(self, values: Mapping[str, jax.Array]) -> ObjectiveSpec:
        """The same objective with some numbers replaced by data.

        Args:
          values: key of `TRACED` -> [] float32.

        Raises:
          ValueError: for a key that cannot be data.
        """
        return with_traced(self, TRACED, values)


def mean_over(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of [S] over `where` [S] bool; 0 if there are none."""
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1).astype(values.dtype)


def binary_cross_entropy(logits: jax.Array, label: jax.Array, where: jax.Array) -> jax.Array:
    """Binary cross entropy of every output with the one-hot label, averaged over the outputs (section 8b).

    Args:
      logits: [S, C] float.
      label: [S] int32.
      where: [S] bool; other rows return 0.

    Returns:
      [S].
    """
    logits = jnp.where(where[:, None], logits, 0.0)
    positive = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
    return jnp.where(where, jnp.mean(jax.nn.softplus(logits) - positive * logits, axis=-1), 0.0)


def bag_loss(spec: ObjectiveSpec, logits: jax.Array, batch: Batch, where: jax.Array) -> jax.Array:
    """The supervised loss of one set of logits.

    Args:
      spec: terms and weights.
      logits: [S, C] float: classes, hazards, or one log-risk.
      batch: "label" [S], and "event", "time_months" [S] of a survival task.
      where: [S] bool, slides that count.

    Returns:
      [] mean over the slides.
    """
    label = batch["label"]
    if spec.task != SURVIVAL:
        fn = binary_cross_entropy if spec.classification == BCE else None
        each = fn(logits, label, where) if fn else losses.cross_entropy(logits, label, where=where)
        return mean_over(each, where)
    if spec.survival == COX:
        return survival.cox_loss(logits[:, 0], batch["time_months"], batch["event"], ties=spec.ties, where=where)
    options = dict(alpha=spec.alpha, where=where)
    if spec.survival == CE:
        each = survival.ce_survival(logits, label, batch["event"], clamp=spec.clamp, **options)
    else:
        each = survival.nll_survival(logits, label, batch["event"], **options)
    return mean_over(each, where)


def instance_costs(logits: jax.Array, target: jax.Array, form: str) -> jax.Array:
    """Two-way loss of instances.

    Args:
      logits: [..., 2] float.
      target: [...] int32, 0 or 1, broadcastable.
      form: "ce", or "smooth_svm": log sum_j exp(s_j + [j != target]) - s_target, the smooth top-1 SVM with margin and
        temperature 1.

    Returns:
      [...].
    """
    own = jax.nn.one_hot(jnp.broadcast_to(target, logits.shape[:-1]), 2, dtype=logits.dtype)
    margin = (1.0 - own) if form == SMOOTH_SVM else 0.0
    return jax.nn.logsumexp(logits + margin, axis=-1) - jnp.sum(own * logits, axis=-1)


def instance_loss(spec: ObjectiveSpec, outputs: Outputs, label: jax.Array) -> jax.Array:
    """The instance loss of every slide (section 7).

    Args:
      spec: terms and weights.
      outputs: "instance_logits" [S, C, 2 B, 2]: the B highest-attention patches, then the B lowest, before the head of
        every class; "instance_valid" [S, 2 B], 0 where a bag has fewer.
      label: [S] int32.

    Returns:
      [S]; 0 for a bag of one patch, which has no instances.
    """
    logits, valid = outputs[INSTANCE_LOGITS], outputs[INSTANCE_VALID] > 0
    classes, half = logits.shape[1], logits.shape[2] // 2
    is_top = (jnp.arange(2 * half) < half)[None, None, :]
    true = (label[:, None] == jnp.arange(classes)[None, :])[:, :, None]
    costs = instance_costs(logits, (is_top & true).astype(jnp.int32), spec.instance_loss)
    # Of the other classes only the top patches count, and only with subtyping.
    counted = valid[:, None, :] & (true | (is_top & spec.subtyping))
    number = jnp.maximum(jnp.sum(counted, axis=-1), 1).astype(costs.dtype)
    per_class = jnp.sum(jnp.where(counted, costs, 0.0), axis=-1) / number
    return jnp.sum(per_class, axis=-1) / (classes if spec.subtyping else 1)


def _cleared(outputs: Outputs, where: jax.Array) -> dict[str, jax.Array]:
    """The instances with zeros in masked slots: garbage there must not reach the gradient."""
    logits = jnp.where(where[:, None, None, None], outputs[INSTANCE_LOGITS], 0.0)
    return {INSTANCE_LOGITS: logits, INSTANCE_VALID: jnp.where(where[:, None], outputs[INSTANCE_VALID], 0.0)}


def used_slides(spec: ObjectiveSpec, batch: Batch) -> jax.Array:
    """[S] bool: slots with a slide, and with genes if the network reads them."""
    valid = batch["weight"] > 0
    return valid & batch["has_genes"] if spec.needs_genes and "has_genes" in batch else valid


def loss_terms(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Every unweighted term that the network's outputs allow.

    Args:
      spec: terms and weights.
      outputs: "logits" [S, C]; "instance_logits" and "instance_valid", "max_logits" [S, C] if the network has them;
        "l1" [S], the sum of absolute parameters in every slot.
      batch: see `bag_loss`; "weight" [S].

    Returns:
      {"bag", "instance", "max", "l1"} -> [].
    """
    where = used_slides(spec, batch)
    terms = {"bag": bag_loss(spec, outputs["logits"], batch, where)}
    if INSTANCE_LOGITS in outputs:
        counted = where
        if spec.task == SURVIVAL and spec.instance_on == UNCENSORED:
            counted = where & (batch["event"] > 0)
        each = jnp.where(counted, instance_loss(spec, _cleared(outputs, counted), batch["label"]), 0.0)
        # A censored bag has no instance term but still counts: the mean of what every bag contributes.
        terms["instance"] = mean_over(each, where)
    if MAX_LOGITS in outputs:
        terms["max"] = bag_loss(spec, outputs[MAX_LOGITS], batch, where)
    if isinstance(spec.l1, jax.Array) or spec.l1:
        each = jnp.where(where, outputs[L1], 0.0)
        terms["l1"] = jnp.sum(each) if spec.l1_scaling == PER_BAG else mean_over(each, where)
    return terms


def objective(
    spec: ObjectiveSpec, outputs: Outputs, batch: Batch, step: jax.Array | int = 0, stage: str = ""
) -> tuple[jax.Array, Metrics]:
    """The total loss and its metrics.

    Args:
      spec: terms and weights.
      outputs: see `loss_terms`, and "embedding" [S, H].
      batch: see `loss_terms`.
      step: not used.
      stage: not used; there is one.

    Returns:
      (loss [], metrics). Batch-level values count 1 per step; accuracies and embedding norms sum over slides.
    """
    del step, stage
    terms = loss_terms(spec, outputs, batch)
    weights = {"instance": spec.instance_weight, "max": spec.max_weight}
    weights = {name: weight for name, weight in weights.items() if name in terms}
    weights = {"bag": 1.0 - sum(weights.values()), "l1": spec.l1, **weights}
    total = sum(weights[name] * value for name, value in terms.items())
    one = jnp.ones((), jnp.float32)
    metrics = {name: (value, one) for name, value in {"loss": total, **terms}.items()}
    return total, metrics | _slide_metrics(spec, outputs, batch)


def _slide_metrics(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    where = used_slides(spec, batch)
    number = jnp.sum(where).astype(jnp.float32)
    norm = jnp.linalg.norm(jax.lax.stop_gradient(outputs["embedding"]).astype(jnp.float32), axis=-1)
    metrics = {"norm": (jnp.sum(jnp.where(where, norm, 0.0)), number)}
    if spec.task != SURVIVAL:
        right = losses.correct(outputs["logits"], batch["label"])
        metrics["acc"] = (jnp.sum(jnp.where(where, right, 0.0)), number)
    return metrics
