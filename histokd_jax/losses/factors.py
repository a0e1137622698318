"""Losses on whole feature maps: FT, NST, FSP, ICKD and the hierarchical context loss of ReviewKD."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import (
    absolute,
    accumulate,
    count,
    keep,
    matmul,
    per_example_mean,
    require_maps,
    require_same_shape,
    safe_norm,
    unit,
    valid_rows,
)
from histokd_jax.losses.maps import adaptive_average_pool, adaptive_max_pool, flat, matched

ENERGY, FACTOR = "energy", "factor"
MEAN_SQUARE, COLUMN_NORMS = "mean_square", "column_norms"


def ft_loss(student: jax.Array, teacher: jax.Array, *, form: str = ENERGY, where: jax.Array | None = None) -> jax.Array:
    """Factor transfer (Kim et al., arXiv 1802.04977) between translated and paraphrased maps, per example.

    Mean absolute difference of unit vectors: `energy` (RepDistiller) of the channel mean of squares, `factor`
    (torchdistill) of the flattened factor itself. Invariant to the scale of an example.

    Args:
      student: [b, C_s, ...] float factor; the larger map is average-pooled to the smaller.
      teacher: [b, C_t, ...] float factor; `factor` needs C_s = C_t.
      form: "energy" or "factor".
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the axes disagree, or the form is unknown.
    """
    if form not in (ENERGY, FACTOR):
        raise ValueError(f"form {form!r} of factor transfer is unknown; use {ENERGY!r} or {FACTOR!r}")
    require_maps("ft_loss", student, teacher, same_channels=form == FACTOR)
    s, t = matched(accumulate(student, where), accumulate(teacher, where))

    def direction(x: jax.Array) -> jax.Array:
        return unit(jnp.mean(flat(x) ** 2, axis=1) if form == ENERGY else x.reshape(x.shape[0], -1))

    return jnp.mean(absolute(direction(s) - direction(t)), axis=-1)


def nst_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Neuron selectivity transfer (Huang and Wang, arXiv 1707.01219) of one layer, per example.

    Squared MMD between the sets of unit channel maps with kernel `(a . b)^2`; channel numbers may differ. Uses batched
    products, b C_s C_t numbers.

    Args:
      student: [b, C_s, ...] float; the larger map is average-pooled to the smaller.
      teacher: [b, C_t, ...] float.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input), >= 0 up to rounding.

    Raises:
      ValueError: if the axes disagree.
    """
    require_maps("nst_loss", student, teacher)
    s, t = (unit(flat(x)) for x in matched(accumulate(student, where), accumulate(teacher, where)))

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        return per_example_mean(matmul(a, jnp.swapaxes(b, 1, 2)) ** 2)

    return keep(kernel(t, t) + kernel(s, s) - 2.0 * kernel(s, t), where)


def fsp_matrix(lower: jax.Array, upper: jax.Array, pool=adaptive_average_pool) -> jax.Array:
    """[b, C_up, C_low] mean over positions of the products of two maps of one network, the larger one pooled."""
    lower, upper = (flat(x) for x in matched(accumulate(lower), accumulate(upper), pool))
    return matmul(upper, jnp.swapaxes(lower, 1, 2)) / lower.shape[-1]


def fsp_loss(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    *,
    form: str = MEAN_SQUARE,
    where: jax.Array | None = None,
) -> jax.Array:
    """Flow of solution procedure (Yim et al., CVPR 2017) for one pair of consecutive maps, per example.

    Args:
      student: (lower [b, C_low, ...], upper [b, C_up, ...]) float.
      teacher: the same of the teacher, with equal channels.
      form: "mean_square" (RepDistiller, average pooling) or "column_norms" (torchdistill, maximum pooling, sum of the
        L2 norms over the lower channels).
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the channels of student and teacher differ, or the form is unknown.
    """
    if form not in (MEAN_SQUARE, COLUMN_NORMS):
        raise ValueError(f"form {form!r} of fsp_loss is unknown; use {MEAN_SQUARE!r} or {COLUMN_NORMS!r}")
    for s, t in zip(student, teacher):
        require_maps("fsp_loss", s, t, same_channels=True)
    pool = adaptive_average_pool if form == MEAN_SQUARE else adaptive_max_pool
    s, t = (fsp_matrix(*(accumulate(x, where) for x in pair), pool) for pair in (student, teacher))
    if form == MEAN_SQUARE:
        return per_example_mean((s - t) ** 2)
    return jnp.sum(safe_norm(s - t, axis=2)[:, :, 0], axis=-1)


def ickd_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Inter-channel correlation (Liu et al., ICCV 2021): unit rows of the channel Gram matrix of every example.

    The squared difference is summed and divided by `C b^2`, so the value falls with the batch size; weight 500.

    Args:
      student: [b, C, ...] float behind the connector.
      teacher: [b, C, ...] float; positions may differ in number.
      where: [b] bool, valid rows; b counts these only.

    Returns:
      [] float32 (float64 for float64 input).

    Raises:
      ValueError: if the channels or the axes differ.
    """
    require_maps("ickd_loss", student, teacher, same_channels=True)

    def correlation(x: jax.Array) -> jax.Array:
        x = flat(accumulate(x, where))
        return unit(matmul(x, jnp.swapaxes(x, 1, 2)))

    difference = correlation(student) - correlation(teacher)
    n = count(valid_rows(student, where), difference.dtype)
    return jnp.sum(difference**2) / (student.shape[1] * n**2)


def hcl_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Hierarchical context loss of ReviewKD (Chen et al., arXiv 2104.09044) of one level, per example.

    Mean squared differences of the maps and of their averages over 4 x 4, 2 x 2 and 1 x 1 bins (as far as smaller than
    the map), weighted 1, 1/2, 1/4, ... and divided by the sum of the weights. Equals `hint_errors` for 1 x 1 maps.

    Args:
      student: [b, C, H, ...] float, fused and resized.
      teacher: [b, C, H, ...] float of the same shape.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ.
    """
    require_same_shape("hcl_loss", student, teacher)
    difference = accumulate(student, where) - accumulate(teacher, where)
    total, weight, weights = per_example_mean(difference**2), 1.0, 1.0
    sizes = difference.shape[2:]
    for level in (4, 2, 1):
        if sizes and level < sizes[0]:
            weight /= 2.0
            pooled = adaptive_average_pool(difference, tuple(min(level, n) for n in sizes))
            total, weights = total + weight * per_example_mean(pooled**2), weights + weight
    return total / weights
