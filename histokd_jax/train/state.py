"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from histokd_jax.types import Method


@flax.struct.dataclass
class TrainState:
    """Device state of one stage.

    Attributes:
      step: [] int32, steps taken in this stage.
      params: parameter groups.
      extra: state without gradient.
      opt_state: optimizer state.
      rng: typed key; the key of a step is fold_in(rng, step).
      best_params: parameters at the best monitor value so far.
      best_extra: extra state of that time, e.g. running statistics.
      totals: running (sum, count) of every metric since the start of the epoch.
    """

    step: jax.Array
    params: Any
    extra: Any
    opt_state: Any
    rng: jax.Array
    best_params: Any
    best_extra: Any
    totals: dict[str, tuple[jax.Array, jax.Array]]


def init_params(method: Method, seed: int) -> tuple[Any, Any, jax.Array]:
    """Parameters, extra state and the dropout key of a run, as pure functions of the seed."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    params, extra = jax.jit(method.init)(init_key)
    if method.load is not None:
        params, extra = method.load(params, extra)
    return params, extra, dropout_key


def start_stage(
    params: Any, extra: Any, rng: jax.Array, tx: optax.GradientTransformation, metric_names: list[str]
) -> TrainState:
    """State at step 0 of a stage: fresh optimizer, fresh counters."""
    zero = {name: (jnp.zeros(()), jnp.zeros(())) for name in metric_names}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        extra=extra,
        opt_state=tx.init(params),
        rng=rng,
        # A copy: the step donates `params`, and a donated buffer may not appear twice.
        best_params=jax.tree.map(jnp.copy, params),
        best_extra=jax.tree.map(jnp.copy, extra),
        totals=zero,
    )
