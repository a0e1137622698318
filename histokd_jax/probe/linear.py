"""Linear probe: multinomial logistic regression with an L2 penalty, solved to convergence, many subsets at once.

The objective is scikit-learn's with C = 1 / l2, `sum_i w_i CE_i + l2 / 2 ||W||^2`, biases not penalised; two classes
have one weight vector, as there. It is solved by Newton's method with conjugate gradients, whose products with the
Hessian are two matrix products with the features; features are shared by all subsets, which are masks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = -1e9
"""Logit of a class without labels: its probability is 0."""
MAX_NEWTON, MAX_CG = 60, 200
TOLERANCE = 1e-5
"""Of the gradient's norm, relative to that at the start."""
_STEPS = 0.5 ** np.arange(12)
_MOST_LOGITS = 1 << 26


class LinearProbe(NamedTuple):
    """Fitted probes of S subsets.

    Attributes:
      weights: [S, D, C] float32 on the features as they were given.
      bias: [S, C] float32; `ABSENT` for classes without labels.
      probs: [S, N, C] float32 of all rows.
      converged: [S] bool.
    """

    weights: np.ndarray
    bias: np.ndarray
    probs: np.ndarray
    converged: np.ndarray


def fit_linear(x: np.ndarray, label: np.ndarray, masks: np.ndarray, num_classes: int, l2: float = 1.0) -> LinearProbe:
    """Fits one probe per subset of the rows.

    Args:
      x: [N, D] float32 features; centred and scaled ones converge fastest.
      label: [N] int.
      masks: [S, N] bool or weights >= 0, the rows that each probe learns from.
      num_classes: C.
      l2: strength of the penalty, 1 / C of scikit-learn.

    Returns:
      The probes.

    Raises:
      ValueError: l2 is not positive, or a subset holds fewer than two classes.
    """
    masks = np.asarray(masks, np.float32)
    if l2 <= 0:
        raise ValueError(f"--l2 {l2}: expected a positive number (the solution need not exist without a penalty)")
    present = np.stack([np.bincount(label, row, num_classes) > 0 for row in masks])
    if (present.sum(axis=1) < 2).any():
        raise ValueError(f"subset {int(np.argmax(present.sum(axis=1) < 2))} holds labels of fewer than two classes")
    at_once = max(1, min(len(masks), _MOST_LOGITS // max(1, x.shape[0] * num_classes)))
    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(label, jnp.int32), jnp.asarray(masks), jnp.asarray(present))
    found = _solve(*arrays, l2=float(l2), at_once=at_once)
    return LinearProbe(*(np.asarray(part) for part in found))


@functools.partial(jax.jit, static_argnames=("l2", "at_once"))
def _solve(x, label, masks, present, *, l2: float, at_once: int):
    one = functools.partial(_fit_one, x, label, l2)
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda cell: one(*cell), (masks, present), batch_size=at_once)


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    """One subset's objective while it is being traced; parameters are (w [D, K], b [K]), K = 1 for two classes."""

    x: jax.Array
    label: jax.Array
    weight: jax.Array
    hidden: jax.Array
    l2: float

    @property
    def columns(self) -> int:
        return 1 if self.hidden.shape[1] == 2 else self.hidden.shape[1]

    def scores(self, params) -> jax.Array:
        return self.x @ params[0] + params[1][None]

    def logits(self, scores: jax.Array) -> jax.Array:
        """[N, C]; classes without labels are as good as absent."""
        full = jnp.concatenate([jnp.zeros_like(scores), scores], axis=1) if self.columns == 1 else scores
        return full + self.hidden

    def value(self, scores: jax.Array, w: jax.Array) -> jax.Array:
        """The objective over the number of labels, so that tolerances mean the same for all subsets."""
        likely = jnp.take_along_axis(jax.nn.log_softmax(self.logits(scores)), self.label[:, None], axis=1)[:, 0]
        return (0.5 * self.l2 * jnp.sum(w * w) - jnp.sum(self.weight * likely)) / jnp.sum(self.weight)

    def objective(self, params) -> jax.Array:
        w, b = params
        # Equal shifts of all biases change nothing, and conjugate gradients would drift along them. Their sum stays 0,
        # so that this term, which only gives that direction some curvature, is 0 at every step.
        drift = jnp.sum(b * (self.hidden[0] == 0)) if self.columns > 1 else 0.0
        return self.value(self.scores(params), w) + 0.5 * drift * drift

    def step_size(self, params, move) -> jax.Array:
        """The whole step, unless a shorter one is clearly better: along a line scores are linear, so this is cheap."""
        here, ahead = self.scores(params), self.scores(move)
        steps = jnp.asarray(_STEPS, jnp.float32)
        values = jax.lax.map(lambda t: self.value(here + t * ahead, params[0] + t * move[0]), steps)
        best = jnp.nanargmin(values)
        whole = values[0] <= values[best] + 1e-6 * jnp.abs(values[best])
        return jnp.where(whole, 1.0, steps[best])


class _Progress(NamedTuple):
    """State of Newton's method: parameters, norm of the gradient now and at the start, steps."""

    params: tuple[jax.Array, jax.Array]
    size: jax.Array
    first: jax.Array
    count: jax.Array


def _newton_step(problem: _Problem, state: _Progress) -> _Progress:
    gradient, hessian = jax.linearize(jax.grad(problem.objective), state.params)
    size = jnp.sqrt(sum(jnp.sum(part * part) for part in gradient))
    first = jnp.where(state.count == 0, size, state.first)
    # Inexact at first: far from the solution a precise step is wasted.
    accuracy = jnp.clip(jnp.sqrt(size / first), 1e-3, 0.1)
    downhill = jax.tree.map(jnp.negative, gradient)
    move, _ = jax.scipy.sparse.linalg.cg(hessian, downhill, tol=accuracy, maxiter=MAX_CG)
    t = problem.step_size(state.params, move)
    return _Progress(jax.tree.map(lambda p, d: p + t * d, state.params, move), size, first, state.count + 1)


def _fit_one(x, label, l2, weight, present):
    """Weights [D, C], bias [C], probabilities [N, C], whether the gradient vanished."""
    problem = _Problem(x, label, weight, jnp.where(present, 0.0, ABSENT)[None], l2)
    params = (jnp.zeros((x.shape[1], problem.columns)), jnp.zeros(problem.columns))
    start = _Progress(params, jnp.float32(jnp.inf), jnp.float32(1.0), jnp.int32(0))
    done = jax.lax.while_loop(
        lambda s: (s.count < MAX_NEWTON) & (s.size > TOLERANCE * s.first),
        functools.partial(_newton_step, problem),
        start,
    )
    w, b = done.params
    probs = jax.nn.softmax(problem.logits(problem.scores(done.params)))
    if problem.columns == 1:
        w, b = jnp.concatenate([jnp.zeros_like(w), w], axis=1), jnp.concatenate([jnp.zeros_like(b), b])
    return w, b + problem.hidden[0], probs, done.size <= 100 * TOLERANCE * done.first
