"""How the patches of a step lie: rows over the mesh axis "data", the patches of a row over "sequence"."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

DATA_AXIS, SEQUENCE_AXIS = "data", "sequence"


def shards() -> tuple[int, int]:
    """(devices that divide the rows, devices that divide the patches of a row) of the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    data, sequence = (mesh.shape[a] if a in mesh.axis_names else 1 for a in (DATA_AXIS, SEQUENCE_AXIS))
    return data, sequence


def axes() -> tuple[str, ...]:
    """The mesh axes that divide patches; () if one device holds all of them."""
    if math.prod(shards()) == 1:
        return ()
    return tuple(a for a in (DATA_AXIS, SEQUENCE_AXIS) if a in jax.sharding.get_abstract_mesh().axis_names)


def patch_spec(*leading: None) -> P:
    """Sharding of [*leading, R, L, ...]."""
    present = axes()
    return P(*leading, *(a if a in present else None for a in (DATA_AXIS, SEQUENCE_AXIS)))


def stacked_spec() -> P:
    """Sharding of arrays that each device makes for its own patches, stacked on the first axis."""
    return P(axes())


def on_shards(fn: Callable, in_specs: tuple, out_specs: tuple | P, check_vma: bool = False) -> Callable:
    """`fn` on the patches of each device; other axes of the mesh stay as they are."""
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes()), check_vma=check_vma)


def check_divides(rows: int, length: int) -> None:
    """Refuses rows that cannot be divided over the mesh in use.

    Raises:
      ValueError: naming the axis and the setting to change.
    """
    data, sequence = shards()
    if rows % data:
        raise ValueError(
            f"{rows} packed rows cannot be divided over the {data} devices of the 'data' axis: "
            f"set data.rows to a multiple of {data}"
        )
    if length % sequence:
        raise ValueError(
            f"rows of {length} patches cannot be divided over the {sequence} devices of the 'sequence' axis: "
            f"set data.row_multiple to a multiple of {sequence}"
        )


def flatten(patches: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[R, L, ...] to [R * L, ...]."""
    return patches.reshape(-1, patches.shape[-1]), segment_ids.reshape(-1), positions.reshape(-1)


def masked(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Patches [n, D] with padding set to 0.

    Zeroing the input, not the output: 0 * NaN is NaN inside the weight gradient.
    """
    return jnp.where((segment_ids > 0)[:, None], x, jnp.zeros((), x.dtype))
