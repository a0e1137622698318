"""Class-conditional memories: alignment, attention, commitment, orthogonality, updates (specification 3.5, 4 and 5).

Two memories of n codes in S dimensions are one array [2, n, S]: row 0 is the memory of class 0, row 1 that of class 1.
Pure functions; nothing here knows a configuration.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_FLOOR = 1e-12
NEGATIVE, POSITIVE = 0, 1


def normalise(x: jax.Array) -> jax.Array:
    """`x / max(|x|, 1e-12)` along the last axis, with zero gradient where the norm is at most 1e-12."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    regular = square > _FLOOR**2
    return jnp.where(regular, x / jnp.sqrt(jnp.where(regular, square, 1.0)), jax.lax.stop_gradient(x / _FLOOR))


def soft_angle(f: jax.Array, codes: jax.Array, tau: float) -> jax.Array:
    """`phi(f, C) = log(sum_j exp(tau <f, c_j>)) / tau` with unit codes: a soft maximum of the similarity.

    Args:
      f: [..., S] unit vectors.
      codes: [n, S] raw codes.
      tau: sharpness.

    Returns:
      [...].
    """
    return jax.nn.logsumexp(tau * _product(f, normalise(codes)), axis=-1) / tau


def similarity_gap(f: jax.Array, codes: jax.Array, tau: float) -> jax.Array:
    """`Delta = phi(f, C+) - phi(f, C-)` of [S, d] vectors with memories [2, n, d]: [S]."""
    return soft_angle(f, codes[POSITIVE], tau) - soft_angle(f, codes[NEGATIVE], tau)


def margin_loss(gap: jax.Array, label: jax.Array, beta: jax.Array | float, margin: jax.Array | float) -> jax.Array:
    """`softplus(beta (margin - (2 y - 1) Delta))` of gaps and labels [S]: [S]."""
    sign = (2 * label - 1).astype(gap.dtype)
    return jax.nn.softplus(beta * (margin - sign * gap))


def align_loss(
    f: jax.Array, codes: jax.Array, label: jax.Array, *, beta: float = 20.0, margin: float = 0.3, tau: float = 5.0
) -> jax.Array:
    """Soft-angle alignment of vectors with the memory of their class (section 5).

    Args:
      f: [S, d] unit vectors.
      codes: [2, n, d] raw codes.
      label: [S] int32 in {0, 1}.
      beta: slope.
      margin: wanted gap.
      tau: sharpness of the soft maximum.

    Returns:
      [S].
    """
    return margin_loss(similarity_gap(f, codes, tau), label, beta, margin)


def orth_codes(codes: jax.Array) -> jax.Array:
    """`sum_ij <c_i, c_j>^2 / n^2 - 1 / n` of the unit codes of [..., n, S]: [...]; 0 if they are orthonormal."""
    unit = normalise(codes)
    n = codes.shape[-2]
    gram = jnp.einsum("...is,...js->...ij", unit, unit, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(gram * gram, axis=(-2, -1)) / n**2 - 1.0 / n


def assign(q: jax.Array, codes: jax.Array) -> jax.Array:
    """[N] int32 the nearest raw code of each memory row of [N, S] vectors, the first of equals.

    Args:
      q: [N, S].
      codes: [n, S].
    """
    # |q - c|^2 without |q|^2, which is the same for every code.
    distance = jnp.sum(codes * codes, axis=-1)[None, :] - 2.0 * _product(q, codes)
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


def own_codes(q: jax.Array, codes: jax.Array, label: jax.Array) -> jax.Array:
    """[N] int32 row of the flattened memories [2 n, S]: the nearest code in the memory of each vector's class.

    Args:
      q: [N, S].
      codes: [2, n, S].
      label: [N] int32 in {0, 1}.
    """
    n = codes.shape[1]
    nearest = jnp.where(label == POSITIVE, assign(q, codes[POSITIVE]), assign(q, codes[NEGATIVE]))
    return label * n + nearest


def commit_loss(q: jax.Array, codes: jax.Array, label: jax.Array, move_codes: bool = False) -> jax.Array:
    """Mean over coordinates of `(q - sg[c_j])^2` with the assigned code of the own class.

    Args:
      q: [N, S].
      codes: [2, n, S] raw codes.
      label: [N] int32 in {0, 1}.
      move_codes: lets the gradient reach the codes as well.

    Returns:
      [N].
    """
    chosen = codes.reshape(-1, codes.shape[-1])[own_codes(q, codes, label)]
    chosen = chosen if move_codes else jax.lax.stop_gradient(chosen)
    return jnp.mean((q - chosen) ** 2, axis=-1)


def memory_scores(q: jax.Array, codes: jax.Array) -> jax.Array:
    """`max_j <q, c+_j> - max_j <q, c-_j>` with unit codes of [N, S] vectors: [N].

    The gradient goes to the first of the largest similarities.
    """
    unit = normalise(codes)
    return _largest(_product(q, unit[POSITIVE])) - _largest(_product(q, unit[NEGATIVE]))


def _largest(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, jnp.argmax(x, axis=-1)[:, None], axis=-1)[:, 0]


def segment_softmax(scores: jax.Array, segment_ids: jax.Array, num_slots: int) -> jax.Array:
    """Softmax over the patches of each slide.

    Args:
      scores: [N], finite on padding too.
      segment_ids: [N] int32; 0 = padding.
      num_slots: S.

    Returns:
      [N], exactly 0 on padding.
    """
    low = jnp.finfo(scores.dtype).min
    real = segment_ids > 0
    # A constant shift of the exponents, which has no gradient.
    fixed = jax.lax.stop_gradient(jnp.where(real, scores, low))
    shifted = scores - jax.ops.segment_max(fixed, segment_ids, num_slots + 1)[segment_ids]
    weight = jnp.where(real, jnp.exp(jnp.where(real, shifted, 0.0)), 0.0)
    total = jax.ops.segment_sum(weight, segment_ids, num_slots + 1)
    return weight / jnp.where(real, total[segment_ids], 1.0)


def memory_attention(
    q: jax.Array, codes: jax.Array, tau: jax.Array | float, segment_ids: jax.Array, num_slots: int
) -> jax.Array:
    """Attention weights of patches by their similarity to the two memories (section 3.5).

    Args:
      q: [N, S] unit vectors.
      codes: [2, n, S] raw codes.
      tau: temperature.
      segment_ids: [N] int32; 0 = padding.
      num_slots: S.

    Returns:
      [N], sums to 1 over the patches of a slide.
    """
    return segment_softmax(memory_scores(q, codes) / (tau + 1e-9), segment_ids, num_slots)


def temperature(log_tau: jax.Array) -> jax.Array:
    """`clip(exp(log_tau), 0.01, 2)`; no gradient outside."""
    return jnp.clip(jnp.exp(log_tau), 0.01, 2.0)


def moved(codes: jax.Array, q: jax.Array, label: jax.Array, where: jax.Array, momentum: float) -> jax.Array:
    """The moving average of section 4: codes after the patches of a step, without gradient.

    `c_j <- normalise(m c_j + (1 - m) mean of the q assigned to j)`; codes without patches stay as they are.

    Args:
      codes: [2, n, S].
      q: [N, S].
      label: [N] int32 class of the slide of each patch.
      where: [N] bool, real patches.
      momentum: m; 1 keeps the codes bit for bit.

    Returns:
      [2, n, S].
    """
    if momentum == 1.0:
        return codes
    codes, q = jax.lax.stop_gradient((codes, q))
    flat = codes.reshape(-1, codes.shape[-1])
    # Padding is counted behind the last code.
    row = jnp.where(where, own_codes(q, codes, label), len(flat))
    total = jax.ops.segment_sum(jnp.where(where[:, None], q, 0.0), row, len(flat) + 1)[:-1]
    count = jax.ops.segment_sum(where.astype(q.dtype), row, len(flat) + 1)[:-1, None]
    new = normalise(momentum * flat + (1.0 - momentum) * total / jnp.maximum(count, 1.0))
    return jnp.where(count > 0, new, flat).reshape(codes.shape)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
