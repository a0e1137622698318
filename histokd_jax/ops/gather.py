"""The rows of a step, gathered from a cohort in device memory by a pure function of a few indices.

It runs under `jit`, `vmap` and `lax.map` alike (indices per replica, one shared cohort) and needs no other device: each
reads only its own share of the patches (see `data_pipelines.indexing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from histokd_jax.ops import quantize


class Cohort(NamedTuple):
    """Patches in device memory; the share of one device."""

    patches: jax.Array  # [N, D] float16/float32, or int8 with a scale
    scale: jax.Array | None  # [N] float32, or None


class SlideRows(NamedTuple):
    """Where the slides of a plan lie in the cohort, in the order of the plan."""

    base: jax.Array  # [n] int32 first row
    size: jax.Array  # [n] int32 patches of the bag, over all devices


class StepShape(NamedTuple):
    """Static shape of the steps of a plan."""

    rows: int  # rows on one device
    row_patches: int  # L
    padded: bool  # slot s starts at row s; otherwise the slots follow each other
    dtype: str  # of the gathered patches
    shards: int = 1  # n, devices that share the patches of every slide


def row_fields(
    cohort: Cohort, slides: SlideRows, index: jax.Array, shape: StepShape, shard: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows of one device.

    Args:
      cohort: this device's share.
      slides: where the slides lie.
      index: [3, S] int32: slide (-1 in empty slots), first patch and number of patches of every slot.
      shape: static shape.
      shard: this device's place on the data axis.

    Returns:
      patches [R, L, D] of `shape.dtype`, zero on padding; segment_ids [R, L] int32; positions [R, L] int32.
    """
    row, segment_ids, positions = patch_rows(slides, index, shape, shard, len(cohort.patches))
    # Padding points behind the last row, which `fill` turns into zeros.
    patches = jnp.take(cohort.patches, row, axis=0, mode="fill", fill_value=0)
    if cohort.scale is not None:
        scale = jnp.take(cohort.scale, row, mode="fill", fill_value=0)
        patches = quantize.dequantize(patches, scale, shape.dtype)
    lead = (shape.rows, shape.row_patches)
    return patches.astype(shape.dtype).reshape(*lead, -1), segment_ids.reshape(lead), positions.reshape(lead)


def patch_rows(
    slides: SlideRows, index: jax.Array, shape: StepShape, shard: jax.Array | int, padding: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cohort row, segment id and position of every patch of a step, each [R * L] int32.

    Args:
      slides: where the slides lie.
      index: see `row_fields`.
      shape: static shape.
      shard: this device's place on the data axis.
      padding: row given to padding.

    Returns:
      (row, segment_ids, positions).
    """
    slide, start, count = index
    base, size = (jnp.take(t, jnp.maximum(slide, 0)) for t in slides)

    def below(p):
        # Patches before p of a bag that lie on this device.
        return (p - shard + shape.shards - 1) // shape.shards

    stop, first, held = start + count, below(start), below(size)
    here = below(jnp.minimum(stop, size)) - first + below(jnp.maximum(stop - size, 0))
    place = jnp.arange(shape.rows * shape.row_patches, dtype=jnp.int32)
    if shape.padded:
        slot, within = jnp.divmod(place, shape.row_patches)
    else:
        ends = jnp.cumsum(here, dtype=jnp.int32)
        slot = jnp.sum(place[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
        within = place - jnp.take(ends - here, slot, mode="clip")
    real = within < jnp.take(here, slot, mode="fill", fill_value=0)
    local = within + jnp.take(first, slot, mode="clip")
    held = jnp.take(held, slot, mode="clip")
    local = jnp.where(local >= held, local - held, local)
    return (
        jnp.where(real, local + jnp.take(base, slot, mode="clip"), padding),
        jnp.where(real, slot + 1, 0),
        jnp.where(real, local * shape.shards + shard, 0),
    )


def slot_fields(tables: Mapping[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
    """Values of the slides of a step.

    Args:
      tables: name -> [n, ...], in the order of the plan.
      index: see `row_fields`.

    Returns:
      name -> [S, ...]; zero in empty slots.
    """
    slide = index[0]
    return {
        name: jnp.take(values, _or_none(slide, len(values)), axis=0, mode="fill", fill_value=0)
        for name, values in tables.items()
    }


def _or_none(slide: jax.Array, n: int) -> jax.Array:
    """Empty slots point behind the table: -1 would count from its end."""
    return jnp.where(slide >= 0, slide, n)
