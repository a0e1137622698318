"""The joint-embedding loss of a step of several branches, some of whose views may be missing (specification, part C).

Terms of a pair of branches are means over the examples that have both views, terms of a branch statistics over those
that have its view. With all views present the losses are those of `histokd_jax.losses`, example by example.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from histokd_jax import losses
from histokd_jax.methods.ssl.health import health_metrics
from histokd_jax.ops.gradient_scale import scale_gradient
from histokd_jax.types import Batch, Metrics, Outputs

VICREG, BARLOW, INFONCE = "vicreg", "barlow", "infonce"
NAMES = (VICREG, BARLOW, INFONCE)
BRANCH_SUM, PAIRWISE_ORIGINAL = "branch_sum", "pairwise_original"
SUM, MEAN = "sum", "mean"
ALL_PAIRS, TWO_ONLY = "all_pairs", "two_only"

Pair = tuple[jax.Array, jax.Array, jax.Array]
"""(embedding [B, D], embedding [B, D], [B] bool of the examples that have both views)."""


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Which loss, and its numbers; defaults as released.

    Attributes:
      name: one of `NAMES`.
      assembly: of VICReg over branches: "branch_sum" (C1) or "pairwise_original" (C2).
      invariance, variance, covariance: lambda, mu and nu of VICReg.
      gamma: target of the deviation.
      eps: inside its root.
      ddof: 0 divides by the number of examples, 1 by one less.
      form: of covariance and correlation: "direct", "gram", or "auto".
      temperature: of InfoNCE.
      off_diagonal: lambda of Barlow Twins (C3).
      normalisation: of Barlow Twins, see `losses.barlow_terms`.
      barlow_branches: "all_pairs", or "two_only": the released form, which knows two branches (deviation 5).
      split: widths of the chunks of the first embedding, one per further branch (C5); empty: no split.
      reduction: "sum": gradients are those of the sum over the examples, B times as large (deviation 1); "mean".
      shards: consecutive parts of the batch with a loss of their own (deviation 30); 1: the loss is global.
    """

    name: str = VICREG
    assembly: str = BRANCH_SUM
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-5
    ddof: int = 0
    form: str = "auto"
    temperature: float = 0.5
    off_diagonal: float = 0.005
    normalisation: str = "constant_outside"
    barlow_branches: str = ALL_PAIRS
    split: tuple[int, ...] = ()
    reduction: str = SUM
    shards: int = 1


def pairs_of(spec: ObjectiveSpec, z: Sequence[jax.Array], valid: Sequence[jax.Array]) -> list[Pair]:
    """The pairs that are aligned: all unordered ones, or each chunk of the first embedding with its branch.

    Raises:
      ValueError: widths that do not fit.
    """
    if spec.split:
        chunks = losses.split_embedding(z[0], spec.split)
        return [(chunk, other, valid[0] & has) for chunk, other, has in zip(chunks, z[1:], valid[1:], strict=True)]
    return [(z[i], z[j], valid[i] & valid[j]) for i, j in itertools.combinations(range(len(z)), 2)]


def example_losses(
    spec: ObjectiveSpec, z: Sequence[jax.Array], valid: Sequence[jax.Array], real: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What every example adds to the loss.

    Args:
      spec: the loss.
      z: embedding of every branch [B, D].
      valid: [B] bool of every branch: examples that have its view.
      real: [B] bool, examples that are no fillers.

    Returns:
      ([B] float32, whose mean over `real` is the loss and which is 0 elsewhere; unweighted terms [], batch means).

    Raises:
      ValueError: fewer than two branches or examples, or widths that do not fit.
    """
    z = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in z]
    if len(z) < 2 or z[0].shape[0] < 2:
        raise ValueError(f"a joint-embedding loss needs at least 2 branches and 2 examples, got {[x.shape for x in z]}")
    pairs = pairs_of(spec, z, valid)
    widths = [(a.shape[1], b.shape[1]) for a, b, _ in pairs]
    if any(a != b for a, b in widths):
        raise ValueError(f"branches are compared that have embeddings of different widths: {widths}")
    found, terms = {VICREG: _vicreg, BARLOW: _barlow, INFONCE: _infonce}[spec.name](spec, pairs, z, valid, real)
    return jnp.where(real, found, 0.0), terms


def _vicreg(spec, pairs, z, valid, real) -> tuple[jax.Array, dict[str, jax.Array]]:
    inv = sum(_shared(jnp.mean(jnp.square(a - b), axis=-1), where, real) for a, b, where in pairs)
    options = {"ddof": spec.ddof}
    var = sum(
        _if_any(losses.variance_hinge(x, gamma=spec.gamma, eps=spec.eps, where=v, **options), v)
        for x, v in zip(z, valid)
    )
    cov = sum(_if_any(losses.covariance_penalty(x, form=spec.form, where=v, **options), v) for x, v in zip(z, valid))
    if spec.assembly == PAIRWISE_ORIGINAL:
        # Every branch takes part in n - 1 pairs, each of which halves its two variance terms.
        var, cov = 0.5 * (len(z) - 1) * var, (len(z) - 1) * cov
    elif not spec.split:
        # Ordered pairs: each counts twice (C1).
        inv = 2.0 * inv
    total = spec.invariance * inv + spec.variance * var + spec.covariance * cov
    return total, {"invariance": _mean(inv, real), "variance": var, "covariance": cov}


def _barlow(spec, pairs, z, valid, real) -> tuple[jax.Array, dict[str, jax.Array]]:
    del z, valid
    options = {"normalisation": spec.normalisation, "form": spec.form}
    found = [(losses.barlow_terms(a, b, where=where, **options), where) for a, b, where in pairs]
    diagonal, rest = (sum(_if_any(terms[i], where) for terms, where in found) for i in range(2))
    total = diagonal + spec.off_diagonal * rest
    return jnp.broadcast_to(total, real.shape), {"diagonal": diagonal, "off_diagonal": rest}


def _infonce(spec, pairs, z, valid, real) -> tuple[jax.Array, dict[str, jax.Array]]:
    del z, valid
    each = [losses.infonce_pairs_loss(a, b, temperature=spec.temperature, where=where) for a, b, where in pairs]
    total = sum(_shared(values, where, real) for values, (_, _, where) in zip(each, pairs))
    return total, {"infonce": _mean(total, real)}


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1).astype(values.dtype)


def _shared(values: jax.Array, where: jax.Array, real: jax.Array) -> jax.Array:
    """[B] values whose mean over `real` is the mean of the given ones over `where`."""
    scale = jnp.sum(real).astype(values.dtype) / jnp.maximum(jnp.sum(where), 1).astype(values.dtype)
    return jnp.where(where, values * scale, 0.0)


def _if_any(value: jax.Array, where: jax.Array) -> jax.Array:
    """0 for statistics over fewer than two examples."""
    return jnp.where(jnp.sum(where) >= 2, value, 0.0)


def sharded_losses(
    spec: ObjectiveSpec, z: Sequence[jax.Array], valid: Sequence[jax.Array], real: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`example_losses` of consecutive parts of the batch (spec.shards), each with statistics of its own."""
    if spec.shards == 1:
        return example_losses(spec, z, valid, real)
    cut = lambda tree: jax.tree.map(lambda a: a.reshape(spec.shards, -1, *a.shape[1:]), tree)  # noqa: E731
    each, terms = jax.vmap(lambda z, valid, real: example_losses(spec, z, valid, real))(*map(cut, (z, valid, real)))
    return each.reshape(-1), jax.tree.map(jnp.mean, terms)


def branch_outputs(outputs: Outputs) -> tuple[list[jax.Array], list[jax.Array]]:
    """(embeddings, whether the view is real) of all branches, from "z_0", "valid_0", ..."""
    numbers = range(sum(name.startswith("z_") for name in outputs))
    return [outputs[f"z_{k}"] for k in numbers], [outputs[f"valid_{k}"] for k in numbers]


def objective(
    spec: ObjectiveSpec,
    fields: Sequence[str],
    outputs: Outputs,
    batch: Batch,
    step: jax.Array | int = 0,
    stage: str = "",
) -> tuple[jax.Array, Metrics]:
    """The loss of a step and its metrics.

    Args:
      spec: the loss.
      fields: the views that the branches read.
      outputs: "z_K" [B, D] and "valid_K" [B] of every branch K.
      batch: the step.
      step, stage: not used.

    Returns:
      (mean over the examples [], whose gradient is that of `spec.reduction`; metrics).
    """
    del step, stage
    z, valid = branch_outputs(outputs)
    real = batch["weight"] > 0
    each, terms = sharded_losses(spec, z, valid, real)
    loss = _mean(each, real)
    if spec.reduction == SUM and spec.name != BARLOW:
        loss = scale_gradient(loss, float(len(real)))
    one = jnp.ones((), jnp.float32)
    metrics = {name: (jax.lax.stop_gradient(value), one) for name, value in terms.items()}
    metrics |= health_metrics(z, valid, batch, fields)
    if "partner" in fields:
        has = jnp.sum((real & batch["has_partner"]).astype(jnp.float32))
        metrics["partners"] = has, jnp.sum(real).astype(jnp.float32)
    return loss, metrics
