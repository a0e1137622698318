"""Structure-preserving normalisation after Vahadane et al. (2016): stains by sparse non-negative factorisation.

Densities X [N, 3] of the tissue are factored as amounts C [N, 2] >= 0 times stains S [2, 3] >= 0 with unit rows,

    minimise  1/2 ||X - C S||^2 + sparsity * sum(C).

Amounts are solved exactly (two variables), stains by one exact block step each, alternately, from Macenko's stains: the
objective never rises and nothing is random. Densities refer to the white level found in the pixels: under a dim lamp
glass would otherwise count as a grey stain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from histokd_jax.ops.image import macenko
from histokd_jax.ops.image.colour import mix
from histokd_jax.ops.image.density import from_density, optical_density
from histokd_jax.ops.image.stains import (
    StainParams,
    checked,
    is_tissue,
    largest_amounts,
    per_image,
    red_first,
    unit,
    white_level,
)

TRANSFORM_SPARSITY = 0.01


def fit(
    pixels: jax.Array,
    mask: jax.Array | None = None,
    *,
    background: float | None = None,
    lightness: float = 80.0,
    sparsity: float = 0.1,
    rounds: int = 100,
) -> StainParams:
    """Finds the two stains of some pixels.

    Args:
      pixels: [N, 3] uint8 or float on 0..255, of one tile or sampled over a slide; `jax.vmap` fits many.
      mask: [N] bool, pixels to look at (None: all).
      background: level of unstained glass; None finds it with `stains.white_level`.
      lightness: tissue is darker than this L*, after scaling glass to white.
      sparsity: weight of the amounts while stains are learnt.
      rounds: alternations.

    Returns:
      The stains. Without two stains in the pixels (glass, black, a single colour: Macenko's directions do not differ),
      `valid` is False.
    """
    planes = pixels.T
    white = white_level(planes, mask) if background is None else background
    used = is_tissue(planes.astype(jnp.float32) * (255 / white), lightness)
    used = used if mask is None else used & mask
    density = jnp.maximum(optical_density(planes, white), 0) * used.astype(jnp.float32)[None, :]
    start, found = initial_stains(planes.T * (255 / white), used)
    stains = lax.fori_loop(0, rounds, lambda _, s: update_stains(density, s, sparsity), start)
    stains = red_first(stains)
    maximum = largest_amounts(sparse_amounts(density, stains, TRANSFORM_SPARSITY), used)
    return checked(stains, maximum, white, jnp.where(found, jnp.sum(used), 0))


def transform(
    images: jax.Array,
    source: StainParams,
    target: StainParams,
    *,
    dtype: jnp.dtype | str = jnp.uint8,
) -> jax.Array:
    """Amounts of the source's stains, scaled to the target's largest amounts and shown in its stains.

    Args:
      images: [B, H, W, 3] uint8, or float32 on 0..255.
      source: stains of the images, one for all or with a leading axis B.
      target: stains of the reference.
      dtype: uint8 (rounded to nearest, halves to even) or float32.

    Returns:
      [B, H, W, 3]; unchanged where source or target is not valid.

    Raises:
      ValueError: for images of another form.
    """

    def one(planes, source, target):
        amounts = sparse_amounts(optical_density(planes, source.background), source.stains, TRANSFORM_SPARSITY)
        scaled = target.stains * (target.maximum / source.maximum)[:, None]
        return from_density(mix(amounts, scaled, axis=0), target.background)

    return per_image(one, images, source, target, dtype)


def initial_stains(pixels: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """([2, 3] Macenko's stains without negative entries, [] bool whether Macenko finds two; else Ruifrok's)."""
    found = macenko.fit(pixels, used)
    return unit(jnp.maximum(found.stains, 1e-3)), found.valid


def sparse_amounts(density: jax.Array, stains: jax.Array, sparsity: float) -> jax.Array:
    """The exact minimiser of 1/2 ||x - c S||^2 + sparsity * sum(c) over c >= 0, for every pixel.

    The free minimiser if it is not negative; else the better of the two with a single stain.

    Args:
      density: [3, ...].
      stains: [2, 3] unit rows.
      sparsity: >= 0.

    Returns:
      [2, ...] float32.
    """
    first, second = mix(density, stains.T, axis=0) - sparsity
    cosine = jnp.sum(stains[0] * stains[1])
    scale = 1 / jnp.maximum(1 - cosine**2, 1e-12)
    both_first, both_second = (first - cosine * second) * scale, (second - cosine * first) * scale
    both = (both_first >= 0) & (both_second >= 0)
    only_first = first >= second
    return jnp.stack(
        [
            jnp.where(both, both_first, jnp.where(only_first, jnp.maximum(first, 0), 0)),
            jnp.where(both, both_second, jnp.where(only_first, 0, jnp.maximum(second, 0))),
        ]
    )


def update_stains(density: jax.Array, stains: jax.Array, sparsity: float) -> jax.Array:
    """One alternation: exact amounts, then each stain in turn by its exact step on the non-negative unit sphere.

    Args:
      density: [3, N] >= 0, zeros for pixels that do not count.
      stains: [2, 3].
      sparsity: as in `fit`.

    Returns:
      [2, 3]; a stain that no pixel uses stays.
    """
    amounts = sparse_amounts(density, stains, sparsity)
    both = jnp.concatenate([amounts, density])
    products = jnp.matmul(amounts, both.T, precision=lax.Precision.HIGHEST)
    overlap, projected = products[:, :2], products[:, 2:]
    for k in range(2):
        step = jnp.maximum(projected[k] - overlap[k, 1 - k] * stains[1 - k], 0)
        moved = jnp.where(jnp.sum(step) > 0, unit(step), stains[k])
        stains = stains.at[k].set(moved)
    return stains


def objective(density: jax.Array, stains: jax.Array, sparsity: float) -> jax.Array:
    """[] float32: the function that `fit` minimises, at the best amounts; arguments as for `update_stains`."""
    amounts = sparse_amounts(density, stains, sparsity)
    return 0.5 * jnp.sum((density - mix(amounts, stains, axis=0)) ** 2) + sparsity * jnp.sum(amounts)
