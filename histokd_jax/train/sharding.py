"""All mesh code: the named mesh, and host batches made into global arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data_pipelines import schema

DATA = "data"

FSDP_MIN_SIZE = 2**10
"""Arrays with fewer elements are replicated: sharding them saves nothing and costs a collective each."""


def make_mesh(data: int = 1) -> Mesh:
    """A mesh with the axis "data", over which packed rows are divided.

    Args:
      data: number of devices on it; 0 takes all of them.

    Raises:
      ValueError: if there are fewer devices.
    """
    devices = jax.devices()
    count = data or len(devices)
    if count > len(devices):
        raise ValueError(f"mesh.data={count}, but only {len(devices)} {devices[0].platform} devices are present")
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(
            f"mesh.data={count}, but the {jax.process_count()} processes have {len(devices)} devices: every process "
            "must take part; set mesh.data=0 for all of them"
        )
    # Auto, because the library default (Explicit) rejects Linen's constraints.
    return Mesh(np.asarray(devices[:count]), (DATA,), axis_types=(AxisType.Auto,))


def resolve_mesh(cfg: ConfigDict) -> ConfigDict:
    """The configuration with the devices and rows of this run filled in, so that the record is explicit.

    `mesh.data` = 0 becomes all devices that other axes leave, as does the default of 1 with several processes, since
    each of them must take part. `data.rows` = 0 becomes one row per device of the data axis.
    """
    resolved = ConfigDict(cfg.to_dict())
    if cfg.mesh.data == 0 or (cfg.mesh.data == 1 and jax.process_count() > 1):
        others = [size for axis, size in cfg.mesh.items() if axis not in (DATA, "fsdp") and size > 1]
        resolved.mesh.data = max(jax.device_count() // int(np.prod(others, dtype=int)), 1)
    resolved.data.rows = cfg.data.rows or resolved.mesh.data
    return resolved.lock()


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and slot-level tables."""
    return NamedSharding(mesh, PartitionSpec())


def field_sharding(mesh: Mesh, field: str) -> NamedSharding:
    """Rows are divided over "data"; slot-level fields are on every device."""
    return NamedSharding(mesh, PartitionSpec(DATA) if field in schema.ROW_FIELDS else PartitionSpec())


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays of this process -> global arrays.

    Args:
      mesh: the mesh of the run.
      batch: row fields hold this process's rows, slot fields are equal on all processes.

    Raises:
      ValueError: if the rows cannot be divided over the devices of the mesh.
    """
    local = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
    rows = batch[schema.SEGMENT_IDS].shape[0]
    if rows % local:
        raise ValueError(f"{rows} packed rows cannot be divided over {local} local devices: set data.rows accordingly")
    # Asked for, which the library does not tell the transfer guard when the mesh spans processes.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(field_sharding(mesh, name), value)
            for name, value in batch.items()
        }


def state_shardings(mesh: Mesh, tree: Any, fsdp: bool) -> Any:
    """Where the leaves of a training state live.

    Args:
      mesh: the mesh of the run.
      tree: arrays or their shapes.
      fsdp: False replicates everything. True divides each array over "data" along its largest dimension that the number
        of devices divides (the first of several); arrays with none, or below `FSDP_MIN_SIZE` elements, are replicated.

    Returns:
      A tree of NamedSharding.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape[DATA], fsdp)), tree)


def _fsdp_spec(shape: tuple[int, ...], devices: int, fsdp: bool) -> PartitionSpec:
    divisible = [size if size % devices == 0 else 0 for size in shape]
    if not fsdp or devices == 1 or int(np.prod(shape)) < FSDP_MIN_SIZE or not any(divisible):
        return PartitionSpec()
    axis = divisible.index(max(divisible))
    return PartitionSpec(*[None] * axis, DATA)


def put_tree(tree: Any, shardings: Any) -> Any:
    """Arrays onto a mesh that may span processes.

    Args:
      tree: arrays that every process holds alike, or global arrays.
      shardings: a tree of NamedSharding.
    """
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    # Not device_put, which would compare the values between the processes each time.
    host = jax.device_get(leaf)
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
