"""All checkpoint code: the resumable state of a run, and exported models.

Precedence when a run starts: its own checkpoints (resume) > nothing. Teachers of two-stage methods live in the same
parameters. A missing or mis-shaped leaf raises: a partial restore could leave it unmaterialised.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from data_pipelines.atomic import storage_errors


class CheckpointMismatchError(ValueError):
    """A checkpoint that belongs to another method, configuration, data set or plan."""


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
    """`storage_errors`, also for the checkpoint library, which reports a full disk as a ValueError."""
    with storage_errors(directory):
        try:
            yield
        except ValueError as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


class RunCheckpoints:
    """The newest states of one fold, with the host-side progress as metadata. Use as a context manager.

    Args:
      directory: folder of the checkpoints; made if absent.
      identity: facts that must be equal to continue (method, config and input fingerprints).
      keep: how many to keep.
    """

    def __init__(self, directory: pathlib.Path, identity: Mapping[str, str], keep: int = 2):
        self._identity = dict(identity)
        self._directory = directory
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        policies = ocp.training.preservation_policies
        # The library's default preserves every checkpoint.
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(), preservation_policy=policies.LatestN(keep), cleanup_tmp_directories=True
        )

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, *exc) -> None:
        # Closing repeats the error of a failed save.
        with _writing(self._directory):
            self._checkpointer.close()

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Writes `state` and `progress` under a global step; replaces an older save of the same step."""
        with _writing(self._directory):
            self._checkpointer.save(
                step,
                state,
                force=True,
                overwrite=True,
                custom_metadata={"identity": self._identity, "progress": dict(progress)},
            )

    def progress(self) -> dict[str, Any] | None:
        """Progress of the newest checkpoint, or None if there is none.

        Raises:
          CheckpointMismatchError: if it belongs to another method, configuration or input; names what differs.
        """
        if self._checkpointer.latest is None:
            return None
        metadata = self._checkpointer.metadata().custom_metadata or {}
        saved = metadata.get("identity", {})
        different = sorted(k for k in {*saved, *self._identity} if saved.get(k) != self._identity.get(k))
        if different:
            raise CheckpointMismatchError(
                f"cannot resume from {self._directory.parent.name}/{self._directory.name}: it was written with another "
                + "; ".join(f"{k} ({saved.get(k)!s:.24} there, {self._identity.get(k)!s:.24} now)" for k in different)
                + ". Restore the old setting or data, or give another --workdir"
            )
        return metadata["progress"]

    def restore(self, like: Any) -> Any:
        """The newest state, with the structure, shapes and shardings of `like`.

        Raises:
          CheckpointMismatchError: if the stored tree has other leaves.
        """
        abstract = jax.tree.map(_abstract, like)
        try:
            state = self._checkpointer.load(None, abstract)
        except (ValueError, KeyError, TypeError) as e:
            raise CheckpointMismatchError(f"checkpoint in {self._directory} does not fit this model: {e}") from e
        return state


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def export_groups(directory: pathlib.Path, params: Mapping[str, Any]) -> None:
    """Writes each parameter group to its own folder, so that a student can be shipped without its teachers."""
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for group, tree in params.items():
            ocp.save((directory / group).absolute(), tree, overwrite=True)


def load_groups(directory: pathlib.Path, like: Mapping[str, Any], groups: Iterable[str]) -> dict[str, Any]:
    """Reads some parameter groups of an exported model.

    Args:
      directory: what `export_groups` wrote.
      like: parameter groups with the expected structure and shapes.
      groups: which to read.

    Raises:
      CheckpointMismatchError: if a group is absent or has other leaves or shapes.
    """
    # Stated here: the file names the devices of the training machine, which may not exist on this one.
    device = SingleDeviceSharding(jax.devices()[0])

    def on_one_device(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    out = {}
    for group in groups:
        path = directory / group
        if not path.is_dir():
            raise CheckpointMismatchError(f"model {directory} has no parameters {group!r}: copy the folder {group} too")
        # Compared beforehand: the library may pad or truncate arrays of another shape.
        stored = jax.tree.map(lambda leaf: tuple(leaf.shape), _plain(ocp.metadata(path.absolute()).metadata))
        wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), _plain(like[group]))
        if stored != wanted:
            found = _difference(stored, wanted)
            raise CheckpointMismatchError(f"{path} holds other parameters than this model: {found}")
        out[group] = ocp.load(path.absolute(), jax.tree.map(on_one_device, like[group]))
    return out


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _difference(stored: Any, wanted: Any, prefix: str = "") -> str:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted({*stored, *wanted}):
            if stored.get(key) != wanted.get(key):
                return _difference(stored.get(key), wanted.get(key), f"{prefix}/{key}")
    return f"{prefix} is {stored} there, {wanted} expected"


def params_hash(params: Any) -> str:
    """sha256 over names, shapes and bytes of all leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
