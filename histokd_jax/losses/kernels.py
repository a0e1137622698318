"""Kernel comparisons of two sets of embeddings: MMD, HSIC, CKA."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, count, matmul, require_batch, valid_rows

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
LINEAR, RBF = "linear", "rbf"


def _square_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    square = jnp.sum(a * a, axis=-1)[:, None] + jnp.sum(b * b, axis=-1)[None, :]
    return jnp.maximum(square - 2.0 * matmul(a, b.T), 0.0)


def _masked_median(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Median of the entries of `mask`, 0 if there are none; constant under differentiation."""
    flat = jnp.sort(jnp.where(mask, jax.lax.stop_gradient(values), jnp.inf).reshape(-1))
    n = jnp.sum(mask)
    low, high = flat[jnp.maximum((n - 1) // 2, 0)], flat[n // 2 - (n == 0)]
    return jnp.where(n > 0, 0.5 * (low + high), 0.0)


def median_bandwidths(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None, multiples: Sequence[float] = MULTIPLES
) -> jax.Array:
    """[m] squared bandwidths: multiples of the median squared distance of distinct rows of both sets together.

    Args:
      student: [b, d] float.
      teacher: [b, d] float.
      where: [b] bool, valid rows.
      multiples: m factors.

    Returns:
      [m] constant under differentiation, at least 1e-12.
    """
    both = jnp.concatenate([accumulate(student, where), accumulate(teacher, where)])
    valid = jnp.tile(valid_rows(student, where), 2)
    pairs = valid[:, None] & valid[None, :] & ~jnp.eye(len(both), dtype=bool)
    median = _masked_median(_square_distances(both, both), pairs)
    return jnp.maximum(median * jnp.asarray(multiples, both.dtype), 1e-12)


def mmd_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    bandwidths: Sequence[float] | jax.Array | None = None,
    unbiased: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    """Squared maximum mean discrepancy with a sum of Gaussian kernels (Gretton 2012; arXiv 1502.02791).

    `mean k(s, s') + mean k(t, t') - 2 mean k(s, t)`; the biased form counts all entries, the unbiased one leaves out
    the diagonals of the first two.

    Args:
      student: [b, d] float.
      teacher: [b, d] float.
      bandwidths: sigma^2 of `exp(-d^2 / (2 sigma^2))`; None: `median_bandwidths`.
      unbiased: see above; it may be negative.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch.

    Raises:
      ValueError: if b < 2 or the shapes disagree.
    """
    require_batch("mmd_loss", student, teacher, same_width=True)
    s, t = accumulate(student, where), accumulate(teacher, where)
    valid = valid_rows(student, where)
    if bandwidths is None:
        bandwidths = median_bandwidths(student, teacher, where=where)
    sigma2 = jnp.asarray(bandwidths, s.dtype)[:, None, None]
    pairs = valid[:, None] & valid[None, :]
    distinct = pairs & ~jnp.eye(len(s), dtype=bool) if unbiased else pairs

    def mean_kernel(a: jax.Array, b: jax.Array, mask: jax.Array) -> jax.Array:
        kernel = jnp.sum(jnp.exp(-_square_distances(a, b)[None] / (2.0 * sigma2)), axis=0)
        return jnp.sum(jnp.where(mask, kernel, 0.0)) / count(mask, kernel.dtype)

    return mean_kernel(s, s, distinct) + mean_kernel(t, t, distinct) - 2.0 * mean_kernel(s, t, pairs)


def _kernel(x: jax.Array, kind: str, bandwidth: float | None, pairs: jax.Array) -> jax.Array:
    if kind == LINEAR:
        return matmul(x, x.T)
    distances = _square_distances(x, x)
    if bandwidth is None:
        distinct = pairs & ~jnp.eye(len(x), dtype=bool)
        bandwidth = jnp.maximum(_masked_median(distances, distinct), 1e-12)
    return jnp.where(pairs, jnp.exp(-distances / (2.0 * bandwidth)), 0.0)


def _biased_hsic(k: jax.Array, l: jax.Array, valid: jax.Array) -> jax.Array:
    n = count(valid, k.dtype)
    mask = valid.astype(k.dtype)
    centre = jnp.diag(mask) - mask[:, None] * mask[None, :] / n
    return jnp.sum(matmul(centre, matmul(k, centre)) * l) / jnp.maximum(n - 1.0, 1.0) ** 2


def _unbiased_hsic(k: jax.Array, l: jax.Array, valid: jax.Array) -> jax.Array:
    n = count(valid, k.dtype, at_least=4)
    off = ~jnp.eye(len(k), dtype=bool)
    k, l = jnp.where(off, k, 0.0), jnp.where(off, l, 0.0)
    rows_k, rows_l = jnp.sum(k, axis=1), jnp.sum(l, axis=1)
    ends = jnp.sum(rows_k) * jnp.sum(rows_l) / ((n - 1.0) * (n - 2.0))
    return (jnp.sum(k * l) + ends - 2.0 / (n - 2.0) * jnp.sum(rows_k * rows_l)) / (n * (n - 3.0))


def _prepared(name: str, student: jax.Array, teacher: jax.Array, unbiased: bool, where: jax.Array | None):
    require_batch(name, student, teacher)
    if unbiased and student.shape[0] < 4:
        raise ValueError(f"the unbiased {name} needs b >= 4, got b = {student.shape[0]}")
    return accumulate(student, where), accumulate(teacher, where), valid_rows(student, where)


def hsic(
    student: jax.Array,
    teacher: jax.Array,
    *,
    kernel: str = LINEAR,
    bandwidth: float | None = None,
    unbiased: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    """Hilbert-Schmidt independence criterion (Gretton 2005), a measure of dependence: maximise it.

    Args:
      student: [b, d_s] float.
      teacher: [b, d_t] float.
      kernel: "linear" or "rbf".
      bandwidth: sigma^2 of both "rbf" kernels; None: the median squared distance of each side.
      unbiased: the estimator of b >= 4 rows with zero diagonals, which may be negative; else `tr(K H L H) / (b - 1)^2`.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch.

    Raises:
      ValueError: if the kernel is unknown, b is too small or the batch sizes differ.
    """
    s, t, valid = _prepared("hsic", student, teacher, unbiased, where)
    estimate = _unbiased_hsic if unbiased else _biased_hsic
    return estimate(*(_gram(x, kernel, bandwidth, valid) for x in (s, t)), valid)


def _gram(x: jax.Array, kernel: str, bandwidth: float | None, valid: jax.Array) -> jax.Array:
    if kernel not in (LINEAR, RBF):
        raise ValueError(f"kernel {kernel!r} is unknown; use {LINEAR!r} or {RBF!r}")
    if kernel == LINEAR:
        # Centring first changes neither estimator and saves digits where the mean is large.
        n = count(valid, x.dtype)
        x = jnp.where(valid[:, None], x - (jnp.sum(x, axis=0) / n)[None, :], 0.0)
    return _kernel(x, kernel, bandwidth, valid[:, None] & valid[None, :])


def cka(
    student: jax.Array,
    teacher: jax.Array,
    *,
    kernel: str = LINEAR,
    bandwidth: float | None = None,
    unbiased: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    """Centred kernel alignment `HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` (arXiv 1905.00414).

    The biased form is large for small b whatever the data. Constant embeddings have alignment 0 and no gradient.

    Args, Raises: see `hsic`.

    Returns:
      [] float32 (float64 for float64 input); biased in [0, 1], 1 under rotation and isotropic scale.
    """
    s, t, valid = _prepared("cka", student, teacher, unbiased, where)
    estimate = _unbiased_hsic if unbiased else _biased_hsic
    k, l = (_gram(x, kernel, bandwidth, valid) for x in (s, t))
    # Of unit scale, so that the guard below means the same for any units of the embeddings.
    k, l = (x / jnp.maximum(jax.lax.stop_gradient(jnp.max(jnp.abs(x))), 1e-12) for x in (k, l))
    product = estimate(k, k, valid) * estimate(l, l, valid)
    regular = product > 1e-20
    return jnp.where(regular, estimate(k, l, valid) / jnp.sqrt(jnp.where(regular, product, 1.0)), 0.0)


def cka_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    kernel: str = LINEAR,
    bandwidth: float | None = None,
    unbiased: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    """`1 - cka`; Args and Raises as there."""
    return 1.0 - cka(student, teacher, kernel=kernel, bandwidth=bandwidth, unbiased=unbiased, where=where)


def hsic_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    kernel: str = LINEAR,
    bandwidth: float | None = None,
    unbiased: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    """`-hsic`, to be minimised; Args and Raises as there. Unbounded below with a linear kernel."""
    return -hsic(student, teacher, kernel=kernel, bandwidth=bandwidth, unbiased=unbiased, where=where)
