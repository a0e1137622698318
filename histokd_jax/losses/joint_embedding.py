"""Losses that train all branches: VICReg, Barlow Twins, InfoNCE, split embedding (More From Less, part C)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, count, keep, matmul, safe_norm, unit, valid_rows

DIRECT, GRAM, AUTO = "direct", "gram", "auto"
COVARIANCES = (DIRECT, GRAM, AUTO)
BRANCH_SUM, PAIRWISE_ORIGINAL = "branch_sum", "pairwise_original"
CONSTANT_OUTSIDE, BATCH_NORM = "constant_outside", "batch_norm"
_NORM_FLOOR = 1e-6


def _checked(name: str, branches: Sequence[jax.Array], where: jax.Array | None, same_width: bool = True):
    shapes = [z.shape for z in branches]
    if len(shapes) < 2 or any(len(s) != 2 for s in shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(f"{name} needs two or more branches [b, d] of the same b examples, got shapes {shapes}")
    if same_width and len({s[1] for s in shapes}) > 1:
        raise ValueError(f"{name} needs branches of one width, got {[s[1] for s in shapes]}")
    if shapes[0][0] < 2:
        raise ValueError(f"{name} takes statistics over the batch and needs b >= 2, got b = {shapes[0][0]}")
    return [accumulate(z, where) for z in branches]


def _centred(z: jax.Array, valid: jax.Array) -> jax.Array:
    mean = jnp.sum(z, axis=0) / count(valid, z.dtype)
    return jnp.where(valid[:, None], z - mean[None, :], 0.0)


def _divisor(valid: jax.Array, ddof: int, dtype: jnp.dtype) -> jax.Array:
    return jnp.maximum(count(valid, dtype) - ddof, 1.0)


def _uses_gram(form: str, rows: int, columns: int) -> bool:
    if form not in COVARIANCES:
        raise ValueError(f"covariance form {form!r} is unknown; use one of {COVARIANCES}")
    return form == GRAM or (form == AUTO and rows < columns)


def variance_hinge(
    z: jax.Array,
    *,
    gamma: float = 1.0,
    eps: float = 1e-5,
    ddof: int = 0,
    where: jax.Array | None = None,
) -> jax.Array:
    """VICReg's variance term of one branch, `mean_d max(0, gamma - sqrt(Var_d + eps))`.

    Args:
      z: [b, D] float.
      gamma: target of the standard deviation.
      eps: inside the root, so that its gradient is finite where a dimension is constant.
      ddof: 0 divides by b, 1 by b - 1.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input).
    """
    valid = valid_rows(z, where)
    y = _centred(accumulate(z, where), valid)
    variance = jnp.sum(y * y, axis=0) / _divisor(valid, ddof, y.dtype)
    return jnp.mean(jnp.maximum(0.0, gamma - jnp.sqrt(variance + eps)))


def covariance_penalty(z: jax.Array, *, ddof: int = 0, form: str = AUTO, where: jax.Array | None = None) -> jax.Array:
    """VICReg's covariance term of one branch, `sum_{i != j} C_ij^2 / D`.

    `direct` forms the D x D covariance; `gram` uses, with Y the centred rows, the identity
    `sum_{i != j} C_ij^2 = (|Y Y^T|_F^2 - sum_d (sum_b Y_bd^2)^2) / b^2`, which needs a b x b matrix only. They agree to
    rounding, in value and gradient.

    Args:
      z: [b, D] float.
      ddof: 0 divides the covariance by b, 1 by b - 1.
      form: "direct", "gram", or "auto": gram where b < D.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input).

    Raises:
      ValueError: if the form is unknown.
    """
    valid = valid_rows(z, where)
    y = _centred(accumulate(z, where), valid)
    squares = jnp.sum(y * y, axis=0)
    product = matmul(y, y.T) if _uses_gram(form, *y.shape) else matmul(y.T, y)
    total = jnp.sum(product * product) - jnp.sum(squares * squares)
    return total / (_divisor(valid, ddof, y.dtype) ** 2 * y.shape[1])


def vicreg_terms(
    *branches: jax.Array,
    gamma: float = 1.0,
    eps: float = 1e-5,
    ddof: int = 0,
    form: str = AUTO,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three parts of the branch-sum VICReg (section C1), unweighted.

    Args:
      *branches: two or more [b, D] float.
      gamma: target of the standard deviation.
      eps: inside the root.
      ddof: of variance and covariance.
      form: of the covariance, see `covariance_penalty`.
      where: [b] bool, valid rows.

    Returns:
      (invariance [b]: sum over ordered pairs of the mean squared difference, so every pair counts twice; variance []
      and covariance [], summed over branches).

    Raises:
      ValueError: if there are fewer than two branches, b < 2 or the shapes disagree.
    """
    z = _checked("vicreg_loss", branches, where)
    invariance = 2.0 * sum(jnp.mean((a - b) ** 2, axis=-1) for a, b in itertools.combinations(z, 2))
    return invariance, *_spread_terms(z, gamma, eps, ddof, form, where)


def _spread_terms(z: Sequence[jax.Array], gamma: float, eps: float, ddof: int, form: str, where: jax.Array | None):
    variance = sum(variance_hinge(x, gamma=gamma, eps=eps, ddof=ddof, where=where) for x in z)
    return variance, sum(covariance_penalty(x, ddof=ddof, form=form, where=where) for x in z)


def vicreg_loss(
    *branches: jax.Array,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-5,
    ddof: int = 0,
    form: str = AUTO,
    where: jax.Array | None = None,
) -> jax.Array:
    """VICReg in the branch-sum form of More From Less and TriDeNT (section C1).

    Its gradient summed over the batch is what the released code descends: b times that of the mean.

    Args:
      *branches: two or more [b, D] float.
      invariance: lambda.
      variance: mu.
      covariance: nu.
      gamma: target of the standard deviation.
      eps: inside the root.
      ddof: of variance and covariance; the original VICReg has 1, and eps 1e-4.
      form: of the covariance, see `covariance_penalty`.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input): per-example invariance plus the batch terms, so it couples the batch.

    Raises:
      ValueError: if there are fewer than two branches, b < 2 or the shapes disagree.
    """
    inv, var, cov = vicreg_terms(*branches, gamma=gamma, eps=eps, ddof=ddof, form=form, where=where)
    return keep(invariance * inv + variance * var + covariance * cov, where)


def vicreg_pairwise_loss(
    *branches: jax.Array,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    ddof: int = 1,
    form: str = AUTO,
    where: jax.Array | None = None,
) -> jax.Array:
    """Sum over unordered pairs of the original two-view VICReg (arXiv 2105.04906; section C2 `pairwise_original`).

    Per pair `lambda mse + mu (v_a + v_b) / 2 + nu (c_a + c_b)`. Args, Returns and Raises as in `vicreg_loss`; the
    defaults of `eps` and `ddof` are the original's.
    """
    z = _checked("vicreg_pairwise_loss", branches, where)
    inv = sum(jnp.mean((a - b) ** 2, axis=-1) for a, b in itertools.combinations(z, 2))
    var, cov = _spread_terms(z, gamma, eps, ddof, form, where)
    # Every branch takes part in n - 1 pairs.
    pairs = len(z) - 1
    return keep(invariance * inv + pairs * (0.5 * variance * var + covariance * cov), where)


def _normalised(z: jax.Array, form: str, valid: jax.Array) -> jax.Array:
    y, n = _centred(z, valid), count(valid, z.dtype)
    if form == BATCH_NORM:
        return y * jax.lax.rsqrt(jnp.sum(y * y, axis=0, keepdims=True) / n + 1e-5)
    return y / (safe_norm(y, axis=0) / jnp.sqrt(n) + 1e-4)


def barlow_terms(
    a: jax.Array,
    b: jax.Array,
    *,
    normalisation: str = CONSTANT_OUTSIDE,
    form: str = AUTO,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Diagonal and off-diagonal part of Barlow Twins (section C3), unweighted.

    Args:
      a: [b, D] float.
      b: [b, D] float.
      normalisation: "constant_outside", `(z - mean) / (std + 1e-4)`, or "batch_norm", 1e-5 inside the root.
      form: "direct" forms the D x D correlation; "gram" uses `|U_a^T U_b|_F^2 = <U_a U_a^T, U_b U_b^T>`; "auto": gram
        where b < D.
      where: [b] bool, valid rows.

    Returns:
      (sum_i (C_ii - 1)^2 [], sum_{i != j} C_ij^2 []).

    Raises:
      ValueError: if b < 2, the shapes disagree, or a name is unknown.
    """
    if normalisation not in (CONSTANT_OUTSIDE, BATCH_NORM):
        raise ValueError(f"normalisation {normalisation!r} is unknown; use {CONSTANT_OUTSIDE!r} or {BATCH_NORM!r}")
    za, zb = _checked("barlow_loss", (a, b), where)
    valid = valid_rows(a, where)
    ua, ub = (_normalised(z, normalisation, valid) for z in (za, zb))
    n = count(valid, ua.dtype)
    diagonal = jnp.sum(ua * ub, axis=0) / n
    if _uses_gram(form, *ua.shape):
        total = jnp.sum(matmul(ua, ua.T) * matmul(ub, ub.T))
    else:
        total = jnp.sum(matmul(ua.T, ub) ** 2)
    return jnp.sum((diagonal - 1.0) ** 2), total / n**2 - jnp.sum(diagonal**2)


def barlow_loss(
    a: jax.Array,
    b: jax.Array,
    *,
    off_diagonal: float = 0.0051,
    normalisation: str = CONSTANT_OUTSIDE,
    form: str = AUTO,
    where: jax.Array | None = None,
) -> jax.Array:
    """Barlow Twins (arXiv 2103.03230), `diagonal + off_diagonal * rest` of `barlow_terms`; Args and Raises as there.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch; invariant to affine maps of positive slope of
      every dimension, up to the constant.
    """
    diagonal, rest = barlow_terms(a, b, normalisation=normalisation, form=form, where=where)
    return diagonal + off_diagonal * rest


def _cross_entropies(a: jax.Array, b: jax.Array, temperature: float, valid: jax.Array) -> jax.Array:
    """[b] mean of both directions; masked rows are neither positives nor negatives."""
    logits = matmul(unit(a, floor=_NORM_FLOOR), unit(b, floor=_NORM_FLOOR).T) / temperature
    pairs = (valid[:, None] & valid[None, :]) | jnp.eye(len(valid), dtype=bool)
    logits = jnp.where(pairs, logits, jnp.finfo(logits.dtype).min)
    forward, backward = (jnp.diagonal(jax.nn.log_softmax(logits, axis=axis)) for axis in (1, 0))
    return -0.5 * (forward + backward)


def infonce_pairs_loss(*branches: jax.Array, temperature: float = 0.5, where: jax.Array | None = None) -> jax.Array:
    """InfoNCE summed over unordered pairs of branches (section C4), per example.

    Negatives come from the other view only. Equals `log b` per pair when all embeddings coincide; invariant to the
    positive scale of every row.

    Args:
      *branches: two or more [b, D] float.
      temperature: > 0.
      where: [b] bool, valid rows; others return exactly 0 and are no negatives.

    Returns:
      [b] float32 (float64 for float64 input), nats, coupling the whole batch.

    Raises:
      ValueError: if there are fewer than two branches, b < 2 or the shapes disagree.
    """
    z = _checked("infonce_pairs_loss", branches, where)
    valid = valid_rows(branches[0], where)
    return keep(sum(_cross_entropies(a, b, temperature, valid) for a, b in itertools.combinations(z, 2)), where)


def split_embedding(wide: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """Consecutive chunks [b, m_t] of an embedding [b, sum of widths] (section C5).

    Raises:
      ValueError: if the widths do not sum to that of the embedding.
    """
    if sum(widths) != wide.shape[-1] or min(widths, default=0) < 1:
        raise ValueError(
            f"a split embedding of width {wide.shape[-1]} cannot be divided into chunks of {tuple(widths)}, which sum "
            f"to {sum(widths)}: let the first projector end in that width"
        )
    ends = list(itertools.accumulate(widths))
    return [wide[..., end - width : end] for end, width in zip(ends, widths)]


def vicreg_split_loss(
    wide: jax.Array,
    *branches: jax.Array,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-5,
    ddof: int = 0,
    form: str = AUTO,
    where: jax.Array | None = None,
) -> jax.Array:
    """Branch-sum VICReg with a split first embedding (section C5): chunk t is aligned to branch t only.

    The invariance of every pair (wide chunk, branch) counts once; variance and covariance use every full embedding.

    Args:
      wide: [b, sum of the widths of the others] float.
      *branches: one or more [b, m_t] float.

    Other arguments, Returns: see `vicreg_loss`.

    Raises:
      ValueError: if b < 2 or the widths do not sum to that of `wide`.
    """
    z = _checked("vicreg_split_loss", (wide, *branches), where, same_width=False)
    chunks = split_embedding(z[0], [b.shape[1] for b in branches])
    inv = sum(jnp.mean((a - b) ** 2, axis=-1) for a, b in zip(chunks, z[1:]))
    var, cov = _spread_terms(z, gamma, eps, ddof, form, where)
    return keep(invariance * inv + variance * var + covariance * cov, where)


def infonce_split_loss(
    wide: jax.Array, *branches: jax.Array, temperature: float = 0.5, where: jax.Array | None = None
) -> jax.Array:
    """`infonce_pairs_loss` over (chunk t of the first embedding, branch t); shapes as in `vicreg_split_loss`."""
    z = _checked("infonce_split_loss", (wide, *branches), where, same_width=False)
    valid = valid_rows(wide, where)
    chunks = split_embedding(z[0], [b.shape[1] for b in branches])
    return keep(sum(_cross_entropies(a, b, temperature, valid) for a, b in zip(chunks, z[1:])), where)


def embedding_std(z: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """[] mean over dimensions of the standard deviation over the batch: near 0 means collapse (F4, check 4)."""
    valid = valid_rows(z, where)
    y = _centred(accumulate(z, where), valid)
    return jnp.mean(safe_norm(y, axis=0)) / jnp.sqrt(count(valid, y.dtype))
