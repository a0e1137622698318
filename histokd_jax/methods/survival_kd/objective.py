"""The objective of survival distillation: the supervised loss of every network and three terms for the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from data_pipelines.schema import HAS_TEACHER, TEACHER_HAZARDS
from histokd_jax import losses
from histokd_jax.methods.settings import refuse_untraced
from histokd_jax.methods.supervised import objective as supervised
from histokd_jax.types import Batch, Metrics, Outputs

STUDENT, TEACHER = "student", "teacher"
ONLINE_STAGE, TEACHER_STAGE, STUDENT_STAGE = "online", TEACHER, STUDENT
TRAINED: Mapping[str, tuple[str, ...]] = {
    ONLINE_STAGE: (STUDENT, TEACHER),
    TEACHER_STAGE: (TEACHER,),
    STUDENT_STAGE: (STUDENT,),
}
"""Stage -> networks whose own loss is part of it."""

SMALLEST_HAZARD = 1e-6

TRACED: Mapping[str, str] = {
    "loss.lambda_hazard": "lambda_hazard",
    "loss.lambda_event": "lambda_event",
    "loss.lambda_order": "lambda_order",
    "distill.temperature": "temperature",
    "distill.order_temperature": "order_temperature",
}
"""Config key -> field of `ObjectiveSpec` that may be an array instead of a number."""
_L1, _TEACHER_L1 = "loss.l1", "loss.teacher_l1"


def traced_keys(cached: bool) -> tuple[str, ...]:
    """Config keys that `ObjectiveSpec.with_values` accepts; a cached teacher has no loss of its own."""
    return (*TRACED, *supervised.TRACED, *(() if cached else (_TEACHER_L1,)))


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Terms and weights. The numbers of `TRACED` and of both networks may be traced scalars (`with_values`).

    Attributes:
      student: the supervised loss of the student.
      teacher: that of the teacher; None if its hazards come with the batch.
      lambda_hazard: weight of the Bernoulli KL of the hazards.
      lambda_event: weight of the KL of the distributions of the time of death.
      lambda_order: weight of the pairwise order of risks.
      temperature: T > 0 of the hazard term.
      order_temperature: T > 0 of the order term, in units of the student's risk.
      at_risk: whether the hazard term leaves out the bins behind the end of follow-up.
    """

    student: supervised.ObjectiveSpec
    teacher: supervised.ObjectiveSpec | None
    lambda_hazard: float = 1.0
    lambda_event: float = 0.0
    lambda_order: float = 0.0
    temperature: float = 1.0
    order_temperature: float = 1.0
    at_risk: bool = True

    def weights(self) -> dict[str, float]:
        """Weight of every distillation term; a term whose weight is the number 0 is left out and not computed.

        A Cox head has no hazards, so only the order of its risks can be distilled.
        """
        weights = {"hazard": self.lambda_hazard, "event": self.lambda_event, "order": self.lambda_order}
        if self.student.survival == supervised.COX:
            weights = {"order": self.lambda_order}
        return {name: weight for name, weight in weights.items() if isinstance(weight, jax.Array) or weight}

    def with_values(self, values: Mapping[str, jax.Array]) -> ObjectiveSpec:
        """The same objective with some numbers replaced by data.

        Args:
          values: key of `traced_keys` -> [] float32.

        Raises:
          ValueError: for a key that cannot be data.
        """
        refuse_untraced(traced_keys(self.teacher is None), values)
        own = {TRACED[key]: value for key, value in values.items() if key in TRACED}
        student = {key: value for key, value in values.items() if key in supervised.TRACED}
        teacher = {key: value for key, value in student.items() if key != _L1}
        if _TEACHER_L1 in values:
            teacher[_L1] = values[_TEACHER_L1]
        return dataclasses.replace(
            self,
            **own,
            student=self.student.with_values(student),
            teacher=None if self.teacher is None else self.teacher.with_values(teacher),
        )


def named(group: str, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Outputs or metrics of one network under names of the pair, e.g. "student_logits"."""
    return {f"{group}_{name}": value for name, value in values.items()}


def of_network(group: str, outputs: Outputs) -> dict[str, jax.Array]:
    """Inverse of `named`."""
    prefix = f"{group}_"
    return {name.removeprefix(prefix): value for name, value in outputs.items() if name.startswith(prefix)}


def hazard_logits(hazards: jax.Array) -> jax.Array:
    """Logits of hazards in [0, 1], which are first kept `SMALLEST_HAZARD` away from both ends.

    Args:
      hazards: [...] float.

    Returns:
      [...] finite.
    """
    inside = jnp.clip(hazards, SMALLEST_HAZARD, 1.0 - SMALLEST_HAZARD)
    return jnp.log(inside) - jnp.log1p(-inside)


def teacher_targets(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What the student is to reproduce, without gradient.

    Args:
      spec: terms and weights.
      outputs: "teacher_logits" [S, C] of a teacher that is a network.
      batch: "weight" [S], and "has_genes" [S] if patients lack genes; of a cached teacher "teacher_hazards" [S, C] and
        "has_teacher" [S].

    Returns:
      (logits [S, C], 0 where there is no teacher; [S] bool, slides with a teacher).
    """
    if spec.teacher is None:
        where, logits = (batch["weight"] > 0) & batch[HAS_TEACHER], hazard_logits(batch[TEACHER_HAZARDS])
    else:
        where, logits = supervised.used_slides(spec.teacher, batch), outputs["teacher_logits"]
    return jax.lax.stop_gradient(jnp.where(where[:, None], logits, 0.0)), where


def risk(spec: supervised.ObjectiveSpec | None, logits: jax.Array) -> jax.Array:
    """[S] risk: the log-risk of a Cox head, else minus the sum of the survival curve of hazard logits [S, C]."""
    return logits[:, 0] if spec is not None and spec.survival == supervised.COX else losses.risk_score(logits)


def distillation_terms(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Every unweighted distillation term whose weight is not 0.

    Args:
      spec: terms and weights.
      outputs: "student_logits" [S, C], and see `teacher_targets`.
      batch: "label" [S], and see `teacher_targets`.

    Returns:
      {"hazard", "event", "order"} -> [], means over the slides with a teacher (order: over their pairs).
    """
    target, where = teacher_targets(spec, outputs, batch)
    # Zeros before the risk: garbage in a masked slot must not reach the gradient.
    trained = jnp.where(where[:, None], outputs["student_logits"], 0.0)
    terms = {}
    for name in spec.weights():
        if name == "order":
            terms[name] = losses.risk_order_loss(
                risk(spec.student, trained),
                risk(spec.teacher, target),
                temperature=spec.order_temperature,
                where=where,
            )
        elif name == "event":
            terms[name] = supervised.mean_over(losses.event_distribution_kl(trained, target, where=where), where)
        else:
            bins = losses.at_risk_mask(batch["label"], trained.shape[-1]) if spec.at_risk else None
            each = losses.hazard_kl(trained, target, at_risk=bins, temperature=spec.temperature, where=where)
            terms[name] = supervised.mean_over(each, where)
    return terms


def objective(
    spec: ObjectiveSpec, outputs: Outputs, batch: Batch, step: jax.Array | int = 0, stage: str = ONLINE_STAGE
) -> tuple[jax.Array, Metrics]:
    """The total loss and its metrics.

    Args:
      spec: terms and weights.
      outputs: of every network of the stage, see `named` and `supervised.objective.loss_terms`.
      batch: "weight", "label", "time_months", "event" [S], and see `teacher_targets`.
      step: not used.
      stage: "online" (both networks learn), "teacher" (the teacher alone), "student" (the teacher is constant).

    Returns:
      (loss [], metrics): terms of a network are called "student_bag" and so on; "taught" is the share of slides that
      have a teacher.
    """
    total, metrics = jnp.zeros((), jnp.float32), {}
    for group in TRAINED[stage]:
        own, found = supervised.objective(getattr(spec, group), of_network(group, outputs), batch, step, stage)
        total, metrics = total + own, metrics | named(group, found)
    if stage != TEACHER_STAGE:
        terms, one = distillation_terms(spec, outputs, batch), jnp.ones((), jnp.float32)
        weights = spec.weights()
        total = total + sum(weights[name] * value for name, value in terms.items())
        metrics |= {name: (value, one) for name, value in terms.items()} | _coverage(spec, outputs, batch)
    return total, metrics | {"loss": (total, jnp.ones((), jnp.float32))}


def _coverage(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    _, where = teacher_targets(spec, outputs, batch)
    valid = jnp.sum(batch["weight"] > 0).astype(jnp.float32)
    return {"taught": (jnp.sum(where).astype(jnp.float32), valid)}
