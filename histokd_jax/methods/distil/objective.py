"""The objective of distillation with named terms: each network's supervised loss, and the terms for the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from histokd_jax.methods import terms as compositions
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
LINK = "link/"
_SHARED = ("/rho",)


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Terms and weights; the numbers of `traced_keys` may be traced scalars (`with_values`).

    Attributes:
      student: the supervised loss of the student.
      teacher: that of the teacher.
      terms: what the student learns from the teacher.
      own_weight: weight of the student's supervised loss.
      lambda_terms: weight of the sum of the terms.
    """

    student: supervised.ObjectiveSpec
    teacher: supervised.ObjectiveSpec
    terms: tuple[compositions.Term, ...] = ()
    own_weight: float | jax.Array = 1.0
    lambda_terms: float | jax.Array = 1.0

    def traced_keys(self) -> tuple[str, ...]:
        """Config keys that `with_values` accepts."""
        return ("loss.own_weight", "loss.lambda_terms", *(f"terms.{term.name}.weight" for term in self.terms))

    def with_values(self, values: Mapping[str, jax.Array]) -> ObjectiveSpec:
        """The same objective with some numbers replaced by data.

        Args:
          values: key of `traced_keys` -> [] float32.

        Raises:
          ValueError: for a key that cannot be data.
        """
        refuse_untraced(self.traced_keys(), values)
        weights = {term.name: values[key] for term in self.terms if (key := f"terms.{term.name}.weight") in values}
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("loss.")}
        return dataclasses.replace(self, terms=compositions.with_weights(self.terms, weights), **own)


def named(group: str, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Outputs or metrics of one network under names of the pair, e.g. "student_logits"."""
    return {f"{group}_{name}": value for name, value in values.items()}


def of_network(group: str, outputs: Outputs) -> dict[str, jax.Array]:
    """Inverse of `named`."""
    prefix = f"{group}_"
    return {name.removeprefix(prefix): value for name, value in outputs.items() if name.startswith(prefix)}


def packed_links(links: Mapping[str, jax.Array], slots: int) -> dict[str, jax.Array]:
    """Links as outputs of a step, slot-major: what belongs to no slide is repeated for every slot."""
    return {
        LINK + name: jnp.broadcast_to(x[None], (slots, *x.shape)) if name.endswith(_SHARED) else x
        for name, x in links.items()
    }


def unpacked_links(outputs: Outputs) -> dict[str, jax.Array]:
    """Inverse of `packed_links`."""
    links = {name.removeprefix(LINK): x for name, x in outputs.items() if name.startswith(LINK)}
    return {name: x[0] if name.endswith(_SHARED) else x for name, x in links.items()}


def taught(spec: ObjectiveSpec, batch: Batch) -> jax.Array:
    """[S] bool: slides with everything that the teacher reads."""
    return supervised.used_slides(spec.teacher, batch)


def objective(
    spec: ObjectiveSpec, outputs: Outputs, batch: Batch, step: jax.Array | int = 0, stage: str = ONLINE_STAGE
) -> tuple[jax.Array, Metrics]:
    """The total loss and its metrics.

    Args:
      spec: terms and weights.
      outputs: of every network of the stage (`named`), and the links of the terms.
      batch: "weight", "label" [S] and what the supervised losses read.
      step: optimizer step, for the schedules of the terms.
      stage: "online" (both networks learn), "teacher" (the teacher alone), "student" (the teacher is constant).

    Returns:
      (loss [], metrics): terms of a network are called "student_bag" and so on, distillation terms by their names and,
      as they enter the loss, "weighted_NAME"; "taught" is the share of slides that have a teacher.
    """
    total, metrics = jnp.zeros((), jnp.float32), {}
    for group in TRAINED[stage]:
        own, found = supervised.objective(getattr(spec, group), of_network(group, outputs), batch, step, stage)
        total = total + (spec.own_weight * own if group == STUDENT else own)
        metrics |= named(group, found)
    one = jnp.ones((), jnp.float32)
    if stage != TEACHER_STAGE and spec.terms:
        where = taught(spec, batch)
        found, _ = compositions.values(spec.terms, unpacked_links(outputs), label=batch["label"], where=where)
        value, log = compositions.total(spec.terms, found, step)
        total = total + spec.lambda_terms * value
        metrics |= {name: (x, one) for name, x in log.items()}
        valid = jnp.sum(batch["weight"] > 0).astype(jnp.float32)
        metrics["taught"] = (jnp.sum(where).astype(jnp.float32), valid)
    return total, metrics | {"loss": (total, one)}
