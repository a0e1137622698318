"""Per-sample orthogonality of embeddings of different networks."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, masked_mean, require_batch, unit

INNER_ABS_OF_MEAN = "inner_abs_of_mean"
COSINE_ABS_OF_MEAN = "cosine_abs_of_mean"
INNER_MEAN_OF_ABS = "inner_mean_of_abs"
FORMS = (INNER_ABS_OF_MEAN, COSINE_ABS_OF_MEAN, INNER_MEAN_OF_ABS)


def _abs(x: jax.Array) -> jax.Array:
    # jnp.abs has gradient 1 at 0; the specification asks for the sub-gradient 0.
    return x * jax.lax.stop_gradient(jnp.sign(x))


def non_orthogonality(
    a: jax.Array, b: jax.Array, *, form: str = INNER_ABS_OF_MEAN, where: jax.Array | None = None
) -> jax.Array:
    """How far the paired rows of two sets are from orthogonal.

    `inner_abs_of_mean`: `|mean_i <a_i, b_i>|`; `inner_mean_of_abs`: `mean_i |<a_i, b_i>|`; `cosine_abs_of_mean`: the
    first form on unit rows. The sub-gradient of the absolute value at 0 is 0.

    Args:
      a: [b, d] float.
      b: [b, d] float.
      form: one of `FORMS`.
      where: [b] bool, valid rows; the mean runs over these.

    Returns:
      [] float32 (float64 for float64 input).

    Raises:
      ValueError: if the form is unknown, b < 2 or the shapes disagree.
    """
    if form not in FORMS:
        raise ValueError(f"orthogonality form {form!r} is unknown; use one of {FORMS}")
    require_batch("orth_loss", a, b, same_width=True)
    a, b = accumulate(a, where), accumulate(b, where)
    if form == COSINE_ABS_OF_MEAN:
        a, b = unit(a), unit(b)
    inner = jnp.sum(a * b, axis=-1)
    if form == INNER_MEAN_OF_ABS:
        return masked_mean(_abs(inner), where)
    return _abs(masked_mean(inner, where))


def orth_loss(
    *embeddings: jax.Array, alpha: float = 1.0 / 6.0, form: str = INNER_ABS_OF_MEAN, where: jax.Array | None = None
) -> jax.Array:
    """Orthogonal decomposition loss of MKD (section 5.2): alpha times the sum over all unordered pairs.

    Args:
      *embeddings: two or three [b, d] float arrays (student, multimodal teacher, genomic teacher, in any order).
      alpha: weight of the sum. The disabled cosine form of the authors' code used 6.
      form: one of `FORMS`.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input).
    """
    pairs = itertools.combinations(embeddings, 2)
    return alpha * sum(non_orthogonality(a, b, form=form, where=where) for a, b in pairs)
