"""All mesh code: the named mesh, and host batches made into global arrays."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines import schema

DATA, REPLICA = "data", "replica"


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
    # Auto, because the library default (Explicit) rejects Linen's constraints.
    return Mesh(np.asarray(devices[:count]), (DATA,), axis_types=(AxisType.Auto,))


def make_replica_mesh(count: int = 1) -> Mesh:
    """A mesh with the axis "replica", over which whole trainings are divided.

    Args:
      count: number of devices on it; 0 takes all of them.

    Raises:
      ValueError: if there are fewer devices.
    """
    devices = jax.devices()
    count = count or len(devices)
    if not 0 < count <= len(devices):
        raise ValueError(f"mesh.replica={count}, but {len(devices)} {devices[0].platform} devices are present")
    return Mesh(np.asarray(devices[:count]), (REPLICA,), axis_types=(AxisType.Auto,))


def by_replica(mesh: Mesh) -> NamedSharding:
    """The sharding of everything with a leading replica axis."""
    return NamedSharding(mesh, PartitionSpec(REPLICA))


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
    return {
        name: jax.make_array_from_process_local_data(field_sharding(mesh, name), value) for name, value in batch.items()
    }
