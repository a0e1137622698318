"""All mesh code: the named mesh, and host batches made into global arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data_pipelines import schema

DATA, SEQUENCE, REPLICA = "data", "sequence", "replica"

FSDP_MIN_SIZE = 2**10
"""Arrays with fewer elements are replicated: sharding them saves nothing and costs a collective each."""


def make_mesh(data: int = 1, sequence: int = 1) -> Mesh:
    """A mesh with the axes "data", over which packed rows are divided, and "sequence", which divides every row.

    Args:
      data: devices that divide the rows; 0 takes all that `sequence` leaves.
      sequence: devices that divide the patches of a row; neighbours, so that one process holds whole rows.

    Raises:
      ValueError: if there are fewer devices, a size is not positive, or a row would span processes.
    """
    devices = jax.devices()
    if data < 0 or sequence < 1:
        raise ValueError(f"mesh.data={data} and mesh.sequence={sequence}: expected data >= 0 and sequence >= 1")
    count = data or max(len(devices) // sequence, 1)
    if count * sequence > len(devices):
        product = f"mesh.data={count}" + (f" x mesh.sequence={sequence}" if sequence > 1 else "")
        raise ValueError(f"{product}, but only {len(devices)} {devices[0].platform} devices are present")
    if jax.process_count() > 1 and count * sequence != len(devices):
        raise ValueError(
            f"mesh.data={count} x mesh.sequence={sequence}, but the {jax.process_count()} processes have "
            f"{len(devices)} devices: every process must take part; set mesh.data=0 for all of them"
        )
    # Auto, because the library default (Explicit) rejects Linen's constraints.
    grid = np.asarray(devices[: count * sequence]).reshape(count, sequence)
    if any(len({d.process_index for d in row}) > 1 for row in grid):
        raise ValueError(
            f"mesh.sequence={sequence} would divide rows between processes with {jax.local_device_count()} devices "
            "each: choose a divisor of that number"
        )
    return Mesh(grid, (DATA, SEQUENCE), axis_types=(AxisType.Auto,) * 2)


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


def resolve_mesh(cfg: ConfigDict) -> ConfigDict:
    """The configuration with the devices and rows of this run filled in, so that the record is explicit.

    `mesh.data` = 0 becomes all devices that `mesh.sequence` leaves, as does the default of 1 with several processes,
    since each of them must take part. `data.rows` = 0 becomes one row per device of the data axis.
    """
    resolved = ConfigDict(cfg.to_dict())
    if cfg.mesh.data == 0 or (cfg.mesh.data == 1 and jax.process_count() > 1):
        resolved.mesh.data = max(jax.device_count() // cfg.mesh.sequence, 1)
    resolved.data.rows = cfg.data.rows or resolved.mesh.data
    return resolved.lock()


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and slot-level tables."""
    return NamedSharding(mesh, PartitionSpec())


def field_sharding(mesh: Mesh, field: str) -> NamedSharding:
    """Row fields [R, L, ...] are divided over "data" and "sequence"; slot-level fields are on every device."""
    return NamedSharding(mesh, PartitionSpec(DATA, SEQUENCE) if field in schema.ROW_FIELDS else PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The sharding of every field of a step of image pairs: examples [B, ...] are divided over "data"."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_examples(mesh: Mesh, count: int) -> None:
    """Refuses steps of image pairs that the mesh cannot divide.

    Args:
      mesh: the mesh of the run.
      count: B, examples of a step over all processes.

    Raises:
      ValueError: naming the sizes and the settings to change.
    """
    data, sequence = mesh.shape[DATA], mesh.shape.get(SEQUENCE, 1)
    if count % data:
        raise ValueError(
            f"{count} images cannot be divided over mesh.data={data} devices: set train.b to a multiple of {data}"
        )
    if sequence > 1:
        raise ValueError(
            f"mesh.sequence={sequence} divides the patches of bags; image pairs have none: set mesh.sequence=1 and use "
            "mesh.data"
        )


def put_examples(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays of this process's examples of a step -> global arrays [B, ...].

    Raises:
      ValueError: if the examples cannot be divided over the devices of the mesh.
    """
    local = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
    check_examples(mesh, len(batch[schema.WEIGHT]) * (mesh.devices.size // local))
    # Asked for, which the library does not tell the transfer guard when the mesh spans processes.
    with jax.transfer_guard_host_to_device("allow"):
        return {name: jax.make_array_from_process_local_data(by_example(mesh), v) for name, v in batch.items()}


def check_divides(mesh: Mesh, rows: int, row_patches: int) -> None:
    """Refuses steps that the mesh cannot divide.

    Args:
      mesh: the mesh of the run.
      rows: R, rows of a step over all processes.
      row_patches: L, patches per row.

    Raises:
      ValueError: naming the sizes and the settings to change.
    """
    data, sequence = mesh.shape[DATA], mesh.shape.get(SEQUENCE, 1)
    if rows % data:
        raise ValueError(
            f"{rows} packed rows cannot be divided over mesh.data={data} devices: set data.rows to a multiple of {data}"
        )
    if row_patches % sequence:
        raise ValueError(
            f"rows of {row_patches} patches cannot be divided over mesh.sequence={sequence} devices: set "
            f"data.row_multiple to a multiple of {sequence}"
        )


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays of this process -> global arrays.

    Args:
      mesh: the mesh of the run.
      batch: row fields hold this process's rows, slot fields are equal on all processes.

    Raises:
      ValueError: if the rows cannot be divided over the devices of the mesh, or hold more slides than there are slots
        or patches.
    """
    local = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
    ids = batch[schema.SEGMENT_IDS]
    processes = mesh.devices.size // local
    check_divides(mesh, ids.shape[0] * processes, ids.shape[1])
    _check_slots(batch, ids, processes)
    # Asked for, which the library does not tell the transfer guard when the mesh spans processes.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(field_sharding(mesh, name), value)
            for name, value in batch.items()
        }


def put_replicated(mesh: Mesh, values: Any) -> Any:
    """A pytree of host arrays, equal on all processes -> the same on every device of the mesh."""
    return jax.tree.map(lambda value: _put(value, replicated(mesh)), values)


def _check_slots(batch: Mapping[str, np.ndarray], ids: np.ndarray, processes: int) -> None:
    slots, largest = len(batch[schema.WEIGHT]), int(ids.max(initial=0))
    if largest > slots:
        raise ValueError(
            f"segment ids of the step reach {largest}, but it has {slots} slots: the patches of the last slides would "
            "be left out; plan with as many slots as slides"
        )
    slides = int(np.count_nonzero(batch[schema.WEIGHT]))
    if slides > ids.size * processes:
        raise ValueError(
            f"a step of {slides} slides does not fit into {ids.shape[0] * processes} rows of {ids.shape[1]} patches: "
            "every slide needs at least one; lower train.b or raise data.row_multiple"
        )


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
