"""Pure training and evaluation steps; nothing in them knows about files, epochs or methods."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from data_pipelines import schema
from histokd_jax.train import gradients
from histokd_jax.train.rectified import settle
from histokd_jax.train.state import TrainState
from histokd_jax.types import Batch, Method

BATCHING = ("packed", "padded", "grad_cache")
NONFINITE_STEPS = "nonfinite_steps"
"""Metric: share of the steps whose loss or gradients were not finite, of runs that go on then."""


NOTHING_FROZEN: Mapping[str, Any] = {}


def loss_and_gradients(
    method: Method,
    stage: str,
    params: Any,
    extra: Any,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
    frozen: Any = NOTHING_FROZEN,
) -> tuple[jax.Array, Mapping, Any, Any]:
    """One gradient of the objective on the whole step.

    Returns:
      (loss, metrics, new extra state, gradients).
    """

    def objective(params):
        outputs, new_extra = method.forward(params, frozen, extra, batch, key, True, stage=stage)
        loss, metrics = method.objective(outputs, batch, step, stage)
        return loss, (metrics, new_extra)

    (loss, (metrics, new_extra)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return loss, metrics, new_extra, grads


def cached_loss_and_gradients(
    method: Method,
    stage: str,
    params: Any,
    extra: Any,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
    frozen: Any = NOTHING_FROZEN,
) -> tuple[jax.Array, Mapping, Any, Any]:
    """The same gradient with one bag in memory at a time (MKD specification, section 6, "grad_cache").

    Pass 1 computes the slot outputs bag by bag; the objective gives their cotangents; pass 2 pulls these back bag by
    bag with the same dropout masks. Needs one slide per row (padded layout). Extra state is left as it was.
    """
    row_fields = {k: v for k, v in batch.items() if k in schema.ROW_FIELDS}

    def bag(params, row):
        one = {**batch, **{k: v[row][None] for k, v in row_fields.items()}}
        outputs, _ = method.forward(params, frozen, extra, one, key, True, stage=stage)
        return jax.tree.map(lambda o: o[row], outputs)

    rows = jnp.arange(batch[schema.SEGMENT_IDS].shape[0])
    outputs = jax.lax.map(lambda row: bag(params, row), rows)
    (loss, metrics), cotangents = jax.value_and_grad(
        lambda outputs: method.objective(outputs, batch, step, stage), has_aux=True
    )(outputs)

    def pull(total, row):
        _, vjp = jax.vjp(lambda params: bag(params, row), params)
        (grads,) = vjp(jax.tree.map(lambda c: c[row], cotangents))
        return jax.tree.map(jnp.add, total, grads), None

    grads, _ = jax.lax.scan(pull, jax.tree.map(jnp.zeros_like, params), rows)
    return loss, metrics, extra, grads


def make_train_step(
    method: Method,
    tx: optax.GradientTransformation,
    stage: str,
    batching: str = "packed",
    *,
    gather: Callable[[Any], Any] = lambda params: params,
    scatter: Callable[[Any], Any] = lambda grads: grads,
    nonfinite: str = gradients.RAISE,
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """The pure training step (state, batch, lr, values=None, frozen={}) -> (state, loss).

    Metrics are added to `state.totals`, so that no step waits for the host. `values` makes numbers of the objective
    data, see `Method.objective`. `frozen` holds networks that are not trained, see `Method.forward`.

    Args:
      method: what to train.
      tx: optimizer.
      stage: name of the stage, handed to the objective.
      batching: "packed" and "padded" share one graph; "grad_cache" holds one bag at a time.
      gather: makes sharded parameters whole before the forward pass.
      scatter: divides gradients as the optimizer state is divided.
      nonfinite: one of `gradients.NONFINITE`; with "skip" a step that is not finite leaves all but its number as it
        was. With "skip" and "fill" its metrics are left out, and it counts in `NONFINITE_STEPS`.

    Raises:
      ValueError: unknown batching.
    """
    if batching not in BATCHING:
        raise ValueError(f"train.batching={batching!r}: expected one of {', '.join(BATCHING)}")
    differentiate = cached_loss_and_gradients if batching == "grad_cache" else loss_and_gradients

    def train_step(
        state: TrainState,
        batch: Batch,
        lr: jax.Array,
        values: Mapping[str, jax.Array] | None = None,
        frozen: Any = NOTHING_FROZEN,
    ) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(state.rng, state.step)
        params, chosen = gather(state.params), with_values(method, values)
        loss, metrics, extra, grads = differentiate(chosen, stage, params, state.extra, batch, key, state.step, frozen)
        grads = scatter(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: -lr.astype(u.dtype) * u, updates)
        params, opt_state = settle(tx, optax.apply_updates(state.params, updates), opt_state)
        params = params if method.after_update is None else method.after_update(params)
        one = jnp.ones(())
        metrics = {**metrics, "loss": (loss, one), "grad_norm": (optax.tree.norm(grads), one)}
        moved = params, extra, opt_state
        if nonfinite != gradients.RAISE:
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"][0])
            metrics = _chosen(finite, metrics, jax.tree.map(jnp.zeros_like, metrics))
            metrics[NONFINITE_STEPS] = 1.0 - finite.astype(jnp.float32), one
            if nonfinite == gradients.SKIP:
                moved = _chosen(finite, moved, (state.params, state.extra, state.opt_state))
        params, extra, opt_state = moved
        totals = {
            name: (total + metrics[name][0], count + metrics[name][1]) for name, (total, count) in state.totals.items()
        }
        state = state.replace(step=state.step + 1, params=params, extra=extra, opt_state=opt_state, totals=totals)
        return state, loss

    return train_step


def _chosen(condition: jax.Array, new: Any, old: Any) -> Any:
    """Selected, not multiplied: 0 times NaN is NaN."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def with_values(method: Method, values: Mapping[str, jax.Array] | None) -> Method:
    """The method with numbers of its objective given as data; None or no values leave it as it is."""
    if not values:
        return method
    return dataclasses.replace(method, objective=functools.partial(method.objective, values=values))


def metric_names(
    method: Method, stage: str, params: Any, extra: Any, batch: Any, frozen: Any = NOTHING_FROZEN
) -> list[str]:
    """Names of the metrics a training step reports, found by tracing the objective without running it."""

    def metrics(params, frozen, extra, batch, key):
        outputs, _ = method.forward(params, frozen, extra, batch, key, True, stage=stage)
        return method.objective(outputs, batch, jnp.zeros((), jnp.int32), stage)[1]

    return sorted([*jax.eval_shape(metrics, params, frozen, extra, batch, jax.random.key(0)), "loss", "grad_norm"])


def make_predict_step(method: Method, modes: tuple[str, ...]) -> Callable[..., dict[str, Mapping[str, jax.Array]]]:
    """A pure function (params, extra, batch, key) -> {mode: predictions}; `key` turns on dropout in the teachers."""

    def predict(params, extra, batch, key=None):
        return {mode: method.predict(params, {}, extra, batch, mode, key) for mode in modes}

    return predict


def chosen_outputs(values: Mapping[str, jax.Array], outputs: Sequence[str]) -> dict[str, jax.Array]:
    """Some outputs of `Method.predict`.

    Raises:
      ValueError: the method predicts no such output.
    """
    absent = [name for name in outputs if name not in values]
    if absent:
        raise ValueError(
            f"the method predicts {sorted(values)}, the task needs {list(outputs)}: it does not know this task_kind"
        )
    return {name: values[name] for name in outputs}
