"""Online distillation among peers that train together: DML, ONE, KDCL. Every target is constant."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, keep, require_same_shape
from histokd_jax.losses.classification import cross_entropy
from histokd_jax.losses.mutual import tempered_kl

NAIVE, LINEAR, MIN_LOGIT, GENERAL = "naive", "linear", "min_logit", "general"
TARGETS = (NAIVE, LINEAR, MIN_LOGIT, GENERAL)


def _stacked(name: str, peers: Sequence[jax.Array], where: jax.Array | None) -> jax.Array:
    if len(peers) < 2:
        raise ValueError(f"{name} needs at least two peers, got {len(peers)}")
    for peer in peers[1:]:
        require_same_shape(name, peers[0], peer)
    return jnp.stack([accumulate(peer, where) for peer in peers])


def dml_loss(
    peers: Sequence[jax.Array], *, temperature: float = 1.0, where: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Deep mutual learning (Zhang et al., arXiv 1706.00384): the mutual term of every peer, per example.

    Peer i gets `1 / (n - 1) sum_{j != i} T^2 KL(p_j || p_i)` with the other peers constant. Add its cross entropy.

    Args:
      peers: n >= 2 arrays [b, C] of float logits.
      temperature: T > 0; 1 in the paper.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      n arrays [b] float32 (float64 for float64 logits), nats.

    Raises:
      ValueError: fewer than two peers, or unequal shapes.
    """
    z = _stacked("dml_loss", peers, where)
    terms = []
    for i in range(len(peers)):
        others = [tempered_kl(z[i], z[j], temperature) for j in range(len(peers)) if j != i]
        terms.append(keep(sum(others) / len(others), where))
    return tuple(terms)


def gated_ensemble(heads: Sequence[jax.Array], gate: jax.Array) -> jax.Array:
    """[b, C] logits `sum_i g_i z_i` of m heads [b, C] under gates [b, m]."""
    z = jnp.stack([accumulate(head) for head in heads], axis=1)
    return jnp.sum(accumulate(gate)[:, :, None] * z, axis=1)


def one_terms(
    heads: Sequence[jax.Array],
    gate: jax.Array,
    label: jax.Array,
    *,
    temperature: float = 3.0,
    eps: float = 0.0,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Both terms of the on-the-fly native ensemble (Lan et al., arXiv 1806.04606), per example.

    Args:
      heads: m arrays [b, C] of float logits on a shared trunk.
      gate: [b, m] float, non-negative with rows summing to 1.
      label: [b] int32.
      temperature: T > 0 of the distillation from the ensemble, which is constant there.
      eps: added to the target inside its logarithm; the released code has 1e-7, the golden value of the specification
        none.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      (cross entropies of the heads and of the ensemble, summed [b]; `T^2 KL(ensemble || head)`, summed over heads [b]);
      the total is their sum, the second weighted by `one_ramp`.

    Raises:
      ValueError: fewer than two heads, unequal shapes, or a gate of another width.
    """
    z = _stacked("one_terms", heads, where)
    if gate.shape != (z.shape[1], z.shape[0]):
        raise ValueError(f"the gate of {len(heads)} heads must be [{z.shape[1]}, {len(heads)}], got {gate.shape}")
    ensemble = gated_ensemble(tuple(z), accumulate(gate, where))
    ce = sum(cross_entropy(head, label, where=where) for head in (*z, ensemble))
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(ensemble) / temperature, axis=-1)
    target = jnp.exp(log_p)
    log_target = jnp.log(target + eps) if eps else log_p
    log_q = jax.nn.log_softmax(z / temperature, axis=-1)
    kl = temperature**2 * jnp.sum(target[None] * (log_target[None] - log_q), axis=(0, 2))
    return ce, keep(kl, where)


def one_ramp(epoch: jax.Array | float, length: float = 80.0) -> jax.Array:
    """[] weight `exp(-5 (1 - epoch / length)^2)` of the second term of `one_terms`, 1 from `length` on."""
    left = 1.0 - jnp.minimum(jnp.asarray(epoch, jnp.float32) / length, 1.0)
    return jnp.exp(-5.0 * left**2)


def kdcl_target(
    peers: Sequence[jax.Array],
    label: jax.Array,
    *,
    kind: str = MIN_LOGIT,
    weights: jax.Array | None = None,
    iterations: int = 200,
    where: jax.Array | None = None,
) -> jax.Array:
    """Soft target of collaborative learning, built from the logits of all peers (Guo et al., CVPR 2020), constant.

    `naive`: the peer with the lowest cross entropy on the example. `min_logit`: per class the minimum over peers of
    `z_c - z_y`. `linear`: the convex combination of an example's logits of lowest cross entropy, by exponentiated
    gradient. `general`: the combination with `weights`, fitted by the caller on held-out data.

    Args:
      peers: n >= 2 arrays [b, C] of float logits.
      label: [b] int32.
      kind: one of `TARGETS`.
      weights: [n] float, of "general" only.
      iterations: steps of "linear".
      where: [b] bool, valid rows; the target of others is 0.

    Returns:
      [b, C] logits.

    Raises:
      ValueError: an unknown kind, weights that do not belong to it, fewer than two peers, or unequal shapes.
    """
    z = jax.lax.stop_gradient(_stacked("kdcl_target", peers, where))
    if kind not in TARGETS:
        raise ValueError(f"kdcl target {kind!r} is unknown; use one of {TARGETS}")
    if (kind == GENERAL) != (weights is not None):
        raise ValueError(f"kdcl target {kind!r}: weights are given exactly for {GENERAL!r}")
    label = label if where is None else jnp.where(where, label, 0)
    own = jnp.take_along_axis(z, jnp.broadcast_to(label[None, :, None], (*z.shape[:2], 1)), axis=-1)
    if kind == MIN_LOGIT:
        return jnp.min(z - own, axis=0)
    if kind == GENERAL:
        return jnp.tensordot(accumulate(weights), z, 1)
    if kind == LINEAR:
        return jnp.sum(_convex_weights(z - own, iterations)[:, :, None] * z, axis=0)
    ce = jax.nn.logsumexp(z - own, axis=-1)
    best = jnp.argmin(ce, axis=0)
    return jnp.take_along_axis(z, best[None, :, None], axis=0)[0]


def _convex_weights(margins: jax.Array, iterations: int) -> jax.Array:
    """[n, b] weights on the simplex that minimise the cross entropy of the combined margins [n, b, C]."""
    largest = jnp.maximum(jnp.max(jnp.abs(margins), axis=(0, 2)), 1.0)[None]

    def step(log_w: jax.Array, _) -> tuple[jax.Array, None]:
        prob = jax.nn.softmax(jnp.sum(jax.nn.softmax(log_w, axis=0)[:, :, None] * margins, axis=0), axis=-1)
        return log_w - jnp.sum(prob[None] * margins, axis=-1) / largest, None

    return jax.nn.softmax(jax.lax.scan(step, jnp.zeros(margins.shape[:2], margins.dtype), None, iterations)[0], axis=0)


def kdcl_loss(
    student: jax.Array, target: jax.Array, *, temperature: float = 2.0, where: jax.Array | None = None
) -> jax.Array:
    """`T^2 KL(target || peer)` per example, of one peer [b, C] against `kdcl_target`. T and weight are our choice."""
    require_same_shape("kdcl_loss", student, target)
    return keep(tempered_kl(accumulate(student, where), accumulate(target, where), temperature), where)


def mutual_loss(
    student: jax.Array, teacher: jax.Array, *, temperature: float = 1.0, where: jax.Array | None = None
) -> jax.Array:
    """`dml_loss` of a pair, both directions summed, per example: trains student and teacher alike. Args as there.

    Returns:
      [b] float32 (float64 for float64 logits), nats.
    """
    own, other = dml_loss((student, teacher), temperature=temperature, where=where)
    return own + other


def kdcl_pair_loss(
    student: jax.Array,
    teacher: jax.Array,
    label: jax.Array,
    *,
    kind: str = MIN_LOGIT,
    temperature: float = 2.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """`kdcl_loss` of both networks of a pair against their common `kdcl_target`, summed, per example.

    Args:
      student: [b, C] float logits.
      teacher: [b, C] float logits, trained too.
      label: [b] int32.
      kind: of the target, not "general".
      temperature: T > 0.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 logits), nats.
    """
    target = kdcl_target((student, teacher), label, kind=kind, where=where)
    return sum(kdcl_loss(z, target, temperature=temperature, where=where) for z in (student, teacher))
