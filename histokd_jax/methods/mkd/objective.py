"""The composition of the MKD objective from outputs of one step (specification section 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from histokd_jax import losses
from histokd_jax.losses.orthogonal import INNER_ABS_OF_MEAN
from histokd_jax.methods.settings import with_traced
from histokd_jax.types import Batch, Metrics, Outputs

ONLINE, TEACHERS_STAGE, STUDENT_STAGE = "online", "teachers", "student"
SP, RKD, PKT, FITNET, INFONCE, NONE = "sp", "rkd", "pkt", "fitnet", "infonce", "none"
INTER_LOSSES: Mapping[str, Callable[..., jax.Array]] = {
    SP: losses.sp_loss,
    RKD: losses.rkd_loss,
    PKT: losses.pkt_loss,
    FITNET: losses.fitnet_loss,
    INFONCE: losses.infonce_loss,
}
"""Losses between a student and a teacher embedding: (student [b, d], teacher [b, d], where=[b]) -> []."""


TRACED: Mapping[str, str] = {
    "loss.lambda_coral": "lambda_coral",
    "loss.lambda_or": "lambda_or",
    "loss.lambda_skd": "lambda_skd",
    "loss.lambda_clod": "lambda_clod",
    "mkd.alpha": "alpha",
    "clod.temperature": "temperature",
}
"""Config key -> field of `ObjectiveSpec` that may be an array instead of a number."""


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Weights and forms of the terms; defaults as in section 16 of the specification.

    The numbers in `TRACED` may be traced scalars (`with_values`): one program then serves several settings.

    Attributes:
      teachers: any of "M" and "G"; every term that names an absent teacher is dropped.
      lambda_coral: weight of the alignment term.
      lambda_or: weight of the orthogonality term.
      lambda_skd: weight of the inter-network distillation term.
      lambda_clod: weight of the mutual-learning term.
      alpha: factor inside the orthogonality term.
      or_form: form of the orthogonality term.
      inter_loss: name in `INTER_LOSSES`, or "none".
      skd_scale: "b" multiplies the SP loss by the number of slides, "1" does not; other inter losses are not scaled.
      stop_grad_teacher: stop the gradient of the inter loss into the teachers.
      temperature: of the mutual-learning term.
    """

    teachers: tuple[str, ...] = ("M", "G")
    lambda_coral: float = 1.0
    lambda_or: float = 1.0
    lambda_skd: float = 1.0
    lambda_clod: float = 1.0
    alpha: float = 1.0 / 6.0
    or_form: str = INNER_ABS_OF_MEAN
    inter_loss: str = SP
    skd_scale: str = "b"
    stop_grad_teacher: bool = False
    temperature: float = 4.0

    def weights(self) -> dict[str, float]:
        """Weight of each distillation term that takes part.

        A term whose weight is the number 0 is not computed at all; a traced weight is unknown, so its term is.
        """
        if not self.teachers:
            return {}
        weights = {"coral": self.lambda_coral, "or": self.lambda_or, "skd": self.lambda_skd, "clod": self.lambda_clod}
        if self.inter_loss == NONE:
            del weights["skd"]
        return {name: weight for name, weight in weights.items() if isinstance(weight, jax.Array) or weight}

    def with_values(self, values: Mapping[str, jax.Array]) -> ObjectiveSpec:
        """The same objective with some numbers replaced by data.

        Args:
          values: key of `TRACED` -> [] float32.

        Raises:
          ValueError: for a key that cannot be data.
        """
        return with_traced(self, TRACED, values)


def coral_term(spec: ObjectiveSpec, out: Outputs, where: jax.Array, student_only: bool) -> jax.Array:
    """L_CORAL over the unordered pairs of networks (section 5.2)."""
    total = sum(losses.coral_loss(out[t], out["P"], where=where) for t in spec.teachers)
    if len(spec.teachers) == 2 and not student_only:
        total = total + losses.coral_loss(out["G"], out["M"], where=where)
    return total


def or_term(spec: ObjectiveSpec, out: Outputs, where: jax.Array, student_only: bool) -> jax.Array:
    """L_OR over the unordered pairs of networks (section 5.2)."""
    options = dict(alpha=spec.alpha, form=spec.or_form, where=where)
    if student_only:
        return sum(losses.orth_loss(out["P"], out[t], **options) for t in spec.teachers)
    return losses.orth_loss(out["P"], *(out[t] for t in spec.teachers), **options)


def skd_term(spec: ObjectiveSpec, out: Outputs, where: jax.Array, student_only: bool) -> jax.Array:
    """L_SKD, or its replacement, over student-teacher pairs (section 5.3); there is no pair of teachers."""
    del student_only
    fn = INTER_LOSSES[spec.inter_loss]
    constant = jax.lax.stop_gradient if spec.stop_grad_teacher else lambda x: x
    total = sum(fn(out["P"], constant(out[t]), where=where) for t in spec.teachers)
    if spec.inter_loss == SP and spec.skd_scale == "b":
        total = total * jnp.sum(where).astype(total.dtype)
    return total


def clod_term(spec: ObjectiveSpec, out: Outputs, where: jax.Array, student_only: bool) -> jax.Array:
    """L_CLOD (section 5.4): each direction trains exactly one network, and teachers do not exchange."""
    total = jnp.zeros((), out["z_P"].dtype)
    for t in spec.teachers:
        total += losses.mutual_kl(out["z_P"], out[f"z_{t}"], spec.temperature, where=where)
        if not student_only:
            total += losses.mutual_kl(out[f"z_{t}"], out["z_P"], spec.temperature, where=where)
    return total


_TERMS = {"coral": coral_term, "or": or_term, "skd": skd_term, "clod": clod_term}


def _masks(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(slots that hold a slide, those that also have genes), both [S] bool."""
    valid = batch["weight"] > 0
    return valid, (valid & batch["has_genes"]) if "has_genes" in batch else valid


def _trained(spec: ObjectiveSpec, stage: str) -> tuple[str, ...]:
    """Networks whose cross entropy is part of `stage`."""
    return {ONLINE: ("P", *spec.teachers), TEACHERS_STAGE: spec.teachers, STUDENT_STAGE: ("P",)}[stage]


def _frozen_teachers(spec: ObjectiveSpec, out: Outputs) -> Outputs:
    names = {n for t in spec.teachers for n in (t, f"z_{t}")}
    return {k: jax.lax.stop_gradient(v) if k in names else v for k, v in out.items()}


def loss_terms(spec: ObjectiveSpec, outputs: Outputs, batch: Batch, stage: str = ONLINE) -> dict[str, jax.Array]:
    """Every unweighted term of the objective.

    Args:
      spec: weights and forms.
      outputs: embeddings "P", "M", "G" [S, H] and logits "z_P", "z_M", "z_G" [S, C] of the networks of the run.
      batch: "weight" [S], "label" [S] and, if some slides lack genes, "has_genes" [S]. Means run over slots of positive
        weight; terms that name a teacher leave out slides without genes.
      stage: "online" (everything), "teachers" (their cross entropies only) or "student" (its cross entropy and the
        terms that train it, teachers constant).

    Returns:
      {"ce_p", "ce_m", "ce_g", "coral", "or", "skd", "clod"} -> [] float32 (float64 for float64 outputs), without the
      terms that are absent from the stage or have weight 0.

    Raises:
      ValueError: if a term couples the batch and the step has fewer than 2 slots.
    """
    valid, paired = _masks(batch)
    terms = {}
    for n in _trained(spec, stage):
        mask = valid if n == "P" else paired
        per_slide = losses.cross_entropy(outputs[f"z_{n}"], batch["label"], where=mask)
        terms[f"ce_{n.lower()}"] = jnp.sum(per_slide) / jnp.maximum(jnp.sum(mask), 1).astype(per_slide.dtype)
    if stage == TEACHERS_STAGE:
        return terms
    student_only = stage == STUDENT_STAGE
    out = _frozen_teachers(spec, outputs) if student_only else outputs
    return terms | {name: _TERMS[name](spec, out, paired, student_only) for name in spec.weights()}


def objective(
    spec: ObjectiveSpec, outputs: Outputs, batch: Batch, step: jax.Array | int = 0, stage: str = ONLINE
) -> tuple[jax.Array, Metrics]:
    """The total objective `L = L_CE + sum_k lambda_k L_k` (section 5.5) and its metrics.

    Args:
      spec: weights and forms.
      outputs: see `loss_terms`.
      batch: see `loss_terms`.
      step: not used; the weights are constant.
      stage: see `loss_terms`.

    Returns:
      (loss [], metrics). Batch-level values count 1 per step; accuracies and embedding norms sum over slides.
    """
    del step
    terms = loss_terms(spec, outputs, batch, stage)
    weights = spec.weights()
    total = sum(weights.get(name, 1.0) * value for name, value in terms.items())
    one = jnp.ones((), jnp.float32)
    metrics = {name: (value, one) for name, value in {"loss": total, **terms}.items()}
    return total, metrics | _slide_metrics(spec, outputs, batch)


def _slide_metrics(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    valid, paired = _masks(batch)
    metrics = {}
    for n in ("P", *spec.teachers):
        mask = valid if n == "P" else paired
        number = jnp.sum(mask).astype(jnp.float32)
        norm = jnp.linalg.norm(jax.lax.stop_gradient(outputs[n]).astype(jnp.float32), axis=-1)
        right = losses.correct(outputs[f"z_{n}"], batch["label"])
        metrics[f"norm_{n.lower()}"] = (jnp.sum(jnp.where(mask, norm, 0.0)), number)
        metrics[f"acc_{n.lower()}"] = (jnp.sum(jnp.where(mask, right, 0.0)), number)
    return metrics
