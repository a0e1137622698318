"""The objectives of both stages of HM-KD (specification, sections 8 and 9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from histokd_jax import losses
from histokd_jax.nn.paired.spec import LEVELS
from histokd_jax.types import Batch, Metrics, Outputs

STUDENT, TEACHER = "student", "teacher"
MAPS = ("a", "b")
COS_FEATURES = ("f3", "feat")
REDUCTIONS = ("sum", "mean")


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Weights and forms of the terms; defaults as released.

    Attributes:
      temperature: T of the KL term.
      kd_weight: weight of the KL term.
      at_weight: b, weight of each attention-map term.
      at_maps: teacher maps that the student's is compared with, "a" and perhaps "b" (D17).
      cos_weight: a, weight of the cosine term.
      cos_reduction: "sum" over the batch (as released, D15) or "mean".
      cos_feature: "f3" or "feat" (D16).
      class_weights: of the cross entropy by class, a weighted mean; () for none (D23).
    """

    temperature: float = 5.0
    kd_weight: float = 1.0
    at_weight: float = 1.0
    at_maps: tuple[str, ...] = ("a",)
    cos_weight: float = 1.0
    cos_reduction: str = "sum"
    cos_feature: str = "f3"
    class_weights: tuple[float, ...] = ()

    def weights(self) -> dict[str, float]:
        """Weight of every distillation term; one whose weight is 0 is not computed."""
        maps = {f"at_{level}": self.at_weight for level in range(LEVELS)}
        weights = {"kl": self.kd_weight, **maps, "cos": self.cos_weight}
        return {name: weight for name, weight in weights.items() if weight}

    def teacher_outputs(self) -> tuple[str, ...]:
        """Outputs of the teacher that the weighted terms compare."""
        weights, names = self.weights(), []
        if "kl" in weights:
            names.append("logits")
        names += [f"map_{side}{level}" for side in self.at_maps for level in range(LEVELS) if f"at_{level}" in weights]
        return (*names, self.cos_feature) if "cos" in weights else tuple(names)


def named(group: str, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Outputs of one network under names of the pair, e.g. "student_logits"."""
    return {f"{group}_{name}": value for name, value in values.items()}


def labelled(batch: Batch, stage: str) -> jax.Array:
    """[B] bool: examples whose label counts; the teacher also needs both stains."""
    where = (batch["weight"] > 0) & batch["has_label"]
    return where & batch["has_partner"] if stage == TEACHER else where


def paired(batch: Batch) -> jax.Array:
    """[B] bool: examples on which a teacher can be asked; a label is not needed."""
    return (batch["weight"] > 0) & batch["has_partner"]


def cross_entropy_term(spec: ObjectiveSpec, logits: jax.Array, label: jax.Array, where: jax.Array) -> jax.Array:
    """CE: mean over labelled examples, weighted by class if the spec says so.

    Args:
      spec: weights of the classes.
      logits: [B, C].
      label: [B] int32.
      where: [B] bool.

    Returns:
      [], 0 without any labelled example.

    Raises:
      ValueError: another number of class weights than outputs.
    """
    each = losses.cross_entropy(logits, label, where=where)
    weight = where.astype(each.dtype)
    if spec.class_weights:
        if len(spec.class_weights) != logits.shape[-1]:
            raise ValueError(
                f"loss.class_counts names {len(spec.class_weights)} classes, the networks have {logits.shape[-1]}"
            )
        weight = weight * jnp.asarray(spec.class_weights, each.dtype)[jnp.where(where, label, 0)]
        return jnp.sum(weight * each) / jnp.where(jnp.any(where), jnp.sum(weight), 1.0)
    return jnp.sum(each) / jnp.maximum(jnp.sum(weight), 1.0)


def distillation_terms(spec: ObjectiveSpec, outputs: Outputs, where: jax.Array) -> dict[str, jax.Array]:
    """Every unweighted distillation term whose weight is not 0.

    Args:
      spec: forms and weights.
      outputs: "student_logits", "student_map_a0", ..., and those of `ObjectiveSpec.teacher_outputs` with "teacher_".
      where: [B] bool, examples with a teacher.

    Returns:
      {"kl", "at_0", "at_1", "at_2", "cos"} -> [].
    """

    def pair(name: str, other: str | None = None) -> tuple[jax.Array, jax.Array]:
        return outputs[f"student_{name}"], outputs[f"teacher_{other or name}"]

    def mean(each: jax.Array) -> jax.Array:
        return jnp.sum(each) / jnp.maximum(jnp.sum(where), 1).astype(each.dtype)

    terms = {}
    for name in spec.weights():
        if name == "kl":
            terms[name] = mean(losses.logit_kl(*pair("logits"), spec.temperature, where=where))
        elif name == "cos":
            each = losses.cosine_distance(*pair(spec.cos_feature), where=where)
            terms[name] = jnp.sum(each) if spec.cos_reduction == "sum" else mean(each)
        else:
            level = name.removeprefix("at_")
            maps = [pair(f"map_a{level}", f"map_{side}{level}") for side in spec.at_maps]
            terms[name] = sum(mean(losses.attention_map_distance(s, t, where=where)) for s, t in maps)
    return terms


def objective(
    spec: ObjectiveSpec, outputs: Outputs, batch: Batch, step: jax.Array | int = 0, stage: str = STUDENT
) -> tuple[jax.Array, Metrics]:
    """The loss of a stage and its metrics.

    Args:
      spec: forms and weights.
      outputs: see `distillation_terms`; in the stage "teacher" only "teacher_logits". Without any output of a teacher
        the student is trained alone.
      batch: "weight", "label", "has_label", "has_partner" [B].
      step: not used.
      stage: "teacher" or "student".

    Returns:
      (loss [], metrics); terms count 1 per step, accuracies sum over labelled examples.
    """
    del step
    logits, where = outputs[f"{stage}_logits"], labelled(batch, stage)
    terms = {"ce": cross_entropy_term(spec, logits, batch["label"], where)}
    if stage == STUDENT and any(name.startswith("teacher_") for name in outputs):
        terms |= distillation_terms(spec, outputs, paired(batch))
    weights = {"ce": 1.0, **spec.weights()}
    total = sum(weights[name] * value for name, value in terms.items())
    one = jnp.ones((), jnp.float32)
    metrics = {name: (value, one) for name, value in {"loss": total, **terms}.items()}
    right = jnp.sum(jnp.where(where, losses.correct(logits, batch["label"]), 0.0))
    return total, metrics | {f"acc_{stage}": (right, jnp.sum(where).astype(jnp.float32))}
