"""Rectified Adam and Lookahead: what the authors of SurvPath and TransMIL train with.

The library's RAdam adds eps to the bias-corrected root of the second moment, PyTorch's to the uncorrected one, and in
float32 its rectification loses three digits in the first steps; hence one of our own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

EPS = 1e-8
RECTIFIED_FROM = 5.0
"""Length of the simple moving average above which the second moment is used."""
SYNC_PERIOD, SLOW_STEP = 6, 0.5
"""Lookahead of TransMIL (survival_baselines, section 8)."""


class Lookahead(NamedTuple):
    """An `optax.GradientTransformation` that also has the last word on the new parameters (see `lookahead`).

    Attributes:
      init: params -> `LookaheadState`.
      update: as of the fast optimizer.
      settle: (params after the step, state) -> (params, state).
    """

    init: Any
    update: Any
    settle: Any


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
      count: [] int32, steps taken.
      slow: the slow weights, shaped as the parameters.
      fast: state of the fast optimizer.
    """

    count: jax.Array
    slow: Any
    fast: Any


def scale_by_radam(b1: float = 0.9, b2: float = 0.999, eps: float = EPS) -> optax.GradientTransformation:
    """Adam with a rectified variance (Liu et al., ICLR 2020), with the conventions of PyTorch.

    With the bias-corrected first moment m and the uncorrected second moment v after t gradients, the update is
    `m r sqrt(1 - b2^t) / (sqrt(v) + eps)` where the moving average is longer than `RECTIFIED_FROM`, and m before.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: of the second, in (0, 1).
      eps: added to the root of the second moment.

    Raises:
      ValueError: b2 = 0, for which there is no second moment to rectify.
    """
    if b2 <= 0.0:
        raise ValueError(f"train.betas=({b1}, {b2}): RAdam needs a second rate above 0, e.g. 0.999")

    def init(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zero, jax.tree.map(jnp.copy, zero))

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, grads, state.nu)
        first, root = _bias(count, b1), jnp.sqrt(_bias(count, b2))
        length = moving_average_length(count, b2)
        rectified, factor = length > RECTIFIED_FROM, rectification(length, b2)

        def one(m, v):
            m = m / first.astype(m.dtype)
            scale = (factor * root).astype(m.dtype)
            return jnp.where(rectified, m * scale / (jnp.sqrt(v) + eps), m)

        return jax.tree.map(one, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def moving_average_length(count: jax.Array, b2: float) -> jax.Array:
    """Length of the simple moving average that the second moment stands for: `r - 2 t b2^t / (1 - b2^t)`.

    The definition subtracts two numbers near r = 2 / (1 - b2) - 1; in float32 the result would be wrong in the second
    digit. Written with `x = t l`, `l = -log b2`, it is `c + (2 / l) (1 - x / (e^x - 1))` with the small constant
    `c = r - 2 / l`, and for small x the series of the bracket gives `c + t - x^2 / (6 l) + ...`.

    Args:
      count: [] int32, t >= 1.
      b2: in (0, 1).

    Returns:
      [] float32.
    """
    rate = -math.log(b2)
    constant = _longest(b2) - 2.0 / rate
    t = count.astype(jnp.float32)
    x = rate * t
    square = x * x
    # Bernoulli numbers: 1 - x / (e^x - 1) = x/2 - x^2/12 + x^4/720 - x^6/30240 + x^8/1209600 - ...
    tail = square * (1 / 12 - square * (1 / 720 - square * (1 / 30240 - square / 1209600)))
    near = constant + t - 2.0 / rate * tail
    # Kept away from the branch not taken, where e^x may overflow harmlessly.
    far = constant + 2.0 / rate * (1.0 - x / jnp.expm1(x))
    return jnp.where(x < 1.0, near, far)


def rectification(length: jax.Array, b2: float) -> jax.Array:
    """The factor r of `scale_by_radam`; 0 where the average is too short for one.

    Args:
      length: [] float, from `moving_average_length`.
      b2: in (0, 1).
    """
    longest = _longest(b2)
    if longest <= RECTIFIED_FROM:
        return jnp.zeros_like(length)
    ratio = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
    return jnp.sqrt(jnp.maximum(ratio, 0.0))


def lookahead(
    fast: optax.GradientTransformation, *, period: int = SYNC_PERIOD, slow_step: float = SLOW_STEP
) -> Lookahead:
    """Lookahead (Zhang et al., NeurIPS 2019) around an optimizer.

    After every `period` steps the slow weights, which begin at the initial parameters, move by `slow_step` towards the
    fast ones, and the fast ones continue from there. The moments of the fast optimizer are kept.

    Args:
      fast: the optimizer of the steps between.
      period: steps between two moves, >= 1.
      slow_step: in (0, 1].

    Returns:
      The optimizer. Its `settle` must follow every step, after the rate has been applied: the move depends on where the
      parameters are, not on the gradient.
    """

    def init(params):
        # A copy: the training step donates both.
        return LookaheadState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), fast.init(params))

    def update(grads, state, params=None):
        updates, inner = fast.update(grads, state.fast, params)
        return updates, state._replace(fast=inner)

    def settle(params, state):
        count = optax.safe_increment(state.count)
        moves = count % period == 0
        slow = jax.tree.map(lambda s, p: jnp.where(moves, s + slow_step * (p - s), s), state.slow, params)
        params = jax.tree.map(lambda s, p: jnp.where(moves, s, p), slow, params)
        return params, state._replace(count=count, slow=slow)

    return Lookahead(init, update, settle)


def settle(tx: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
    """(parameters, optimizer state) after a step; unchanged by an optimizer without a last word."""
    return tx.settle(params, opt_state) if isinstance(tx, Lookahead) else (params, opt_state)


def _longest(b2: float) -> float:
    return 2.0 / (1.0 - b2) - 1.0


def _bias(count: jax.Array, decay: float) -> jax.Array:
    """1 - decay^count, without cancellation."""
    if decay == 0.0:
        return jnp.ones((), jnp.float32)
    return -jnp.expm1(math.log(decay) * count.astype(jnp.float32))
