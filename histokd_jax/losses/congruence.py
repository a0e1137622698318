"""Correlation congruence (Peng et al., arXiv 1904.01802): the product form of RepDistiller and the kernel forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, count, matmul, require_batch, safe_norm, unit, valid_rows

KERNEL_MSE, KERNEL_FRO, BILINEAR = "kernel_mse", "kernel_fro", "bilinear"
KERNELS = (KERNEL_MSE, KERNEL_FRO, BILINEAR)


def cc_product_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Product form: with `delta = |e_s - e_t|`, mean over consecutive examples of `sum_d delta[b] delta[b + 1]`.

    Depends on the order of the batch. If both embeddings are trained it can be met by collapse, hence the customary
    weight 0.02; with a frozen teacher embedding it cannot.

    Args:
      student: [b, d] float embeddings.
      teacher: [b, d] float embeddings of the same width.
      where: [b] bool, valid rows; the neighbour of a row is the next valid one.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch and its order; 0 for one valid row.

    Raises:
      ValueError: if b < 2 or the shapes disagree.
    """
    require_batch("cc_product_loss", student, teacher, same_width=True)
    valid = valid_rows(student, where)
    difference = accumulate(student, where) - accumulate(teacher, where)
    delta = difference * jax.lax.stop_gradient(jnp.sign(difference))
    # Valid rows first, in order; what follows them is zero and adds nothing.
    delta = delta[jnp.argsort(~valid, stable=True)]
    pairs = jnp.maximum(count(valid, delta.dtype) - 1.0, 1.0)
    return jnp.sum(delta[:-1] * delta[1:]) / pairs


def _taylor_kernel(x: jax.Array, gamma: float, degree: int) -> jax.Array:
    """`exp(-2 g) sum_p (2 g)^p / p! (x_i . x_j)^p`, the expansion of a Gaussian kernel of unit rows."""
    inner = matmul(x, x.T)
    terms = [(2.0 * gamma) ** p / math.factorial(p) * inner**p for p in range(1, degree + 1)]
    return math.exp(-2.0 * gamma) * (1.0 + sum(terms))


def cc_kernel_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    form: str = KERNEL_MSE,
    gamma: float = 0.4,
    degree: int = 2,
    where: jax.Array | None = None,
) -> jax.Array:
    """Kernel forms: how far the kernel matrices of the two batches are apart.

    `kernel_mse`: mean squared difference of the Taylor kernels of unit rows. `kernel_fro`: Frobenius norm of the
    difference over b^2, rows not normalised here. `bilinear`: the same of plain Gram matrices.

    Args:
      student: [b, d_s] float.
      teacher: [b, d_t] float.
      form: one of `KERNELS`.
      gamma: g of the expansion.
      degree: its last power.
      where: [b] bool, valid rows; b counts these only.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch; invariant to a rotation of either side.

    Raises:
      ValueError: if the form is unknown, b < 2 or the batch sizes differ.
    """
    require_batch("cc_kernel_loss", student, teacher)
    if form not in KERNELS:
        raise ValueError(f"form {form!r} of correlation congruence is unknown; use one of {KERNELS}")
    valid = valid_rows(student, where)
    s, t = accumulate(student, where), accumulate(teacher, where)
    if form == KERNEL_MSE:
        s, t = unit(s), unit(t)
    k_s, k_t = (matmul(x, x.T) if form == BILINEAR else _taylor_kernel(x, gamma, degree) for x in (s, t))
    difference = jnp.where(valid[:, None] & valid[None, :], k_s - k_t, 0.0)
    n = count(valid, s.dtype)
    if form == KERNEL_MSE:
        return jnp.sum(difference**2) / n**2
    return safe_norm(difference.reshape(-1))[0] / n**2
