"""Schedules of the weight of one distillation term over the steps of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

CONSTANT, LINEAR, COSINE, STEP, GAUSSIAN = "constant", "linear", "cosine", "step", "gaussian"
SCHEDULES = (CONSTANT, LINEAR, COSINE, STEP, GAUSSIAN)
_KEYS = ("schedule", "steps", "start", "factor", "boundaries", "final")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The share of its weight that a term has at a step.

    Attributes:
      kind: "constant": 1. "linear": warm-up `(step - start + 1) / steps` from `start` on, at most 1; counting from 1 as
        the ramps of DKD and ReviewKD do. "cosine": from 1 down to `final` over `steps`. "step": times `factor` at each
        of `boundaries`. "gaussian": `exp(-5 (1 - step / steps)^2)`, then 1, the ramp of ONE.
      steps: length in optimizer steps.
      start: first step with any weight, of "linear".
      factor: of "step".
      boundaries: increasing steps, of "step".
      final: of "cosine".
    """

    kind: str = CONSTANT
    steps: int = 0
    start: int = 0
    factor: float = 0.1
    boundaries: tuple[int, ...] = ()
    final: float = 0.0

    def share(self, step: jax.Array | float) -> jax.Array:
        """[] float32 share at a step, which may be traced and need not be whole."""
        at = jnp.asarray(step, jnp.float32)
        if self.kind == CONSTANT:
            return jnp.ones((), jnp.float32)
        if self.kind == STEP:
            passed = sum(jnp.where(at >= boundary, 1.0, 0.0) for boundary in self.boundaries)
            return jnp.asarray(self.factor, jnp.float32) ** passed
        if self.kind == LINEAR:
            return jnp.where(at < self.start, 0.0, jnp.clip((at - self.start + 1.0) / self.steps, 0.0, 1.0))
        done = jnp.clip(at / self.steps, 0.0, 1.0)
        if self.kind == GAUSSIAN:
            return jnp.exp(-5.0 * (1.0 - done) ** 2)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def parse_schedule(name: str, given: Mapping[str, Any]) -> Schedule:
    """The schedule in the settings of a term.

    Args:
      name: of the term, for messages.
      given: settings; those of other concerns are ignored.

    Raises:
      ValueError: naming the term, the key, its value and what is expected.
    """
    kind = str(given.get("schedule", CONSTANT))
    if kind not in SCHEDULES:
        raise ValueError(f"terms.{name}.schedule = {kind!r} is unknown; use one of {SCHEDULES}")
    boundaries = tuple(int(b) for b in given.get("boundaries", ()))
    schedule = Schedule(
        kind,
        int(given.get("steps", 0)),
        int(given.get("start", 0)),
        float(given.get("factor", 0.1)),
        boundaries,
        float(given.get("final", 0.0)),
    )
    if kind in (LINEAR, COSINE, GAUSSIAN) and schedule.steps < 1:
        raise ValueError(f"terms.{name}.steps = {schedule.steps}: the schedule {kind!r} needs its length in steps >= 1")
    if kind == STEP and (not boundaries or list(boundaries) != sorted(set(boundaries))):
        raise ValueError(f"terms.{name}.boundaries = {boundaries}: the schedule 'step' needs increasing steps")
    return schedule


def schedule_keys() -> tuple[str, ...]:
    """Settings of a term that belong to its schedule."""
    return _KEYS
