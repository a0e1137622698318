"""Reads headers (names, shapes, dtypes, attributes) and arrays of .h5, .npy, .npz and .pt files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.importers.hdf5 import read_dataset
from data_pipelines.torch_file import read_torch

HDF5, TORCH = (".h5", ".hdf5"), (".pt",)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file holds, without its contents.

    Attributes:
      arrays: name -> (shape, dtype name); a bare array is called "".
      attrs: name -> attributes of that array; "" for those of the file.
    """

    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    attrs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def of(self, name: str) -> Mapping[str, Any]:
        """Attributes of an array; empty if it has none."""
        return self.attrs.get(name, {})

    def listed(self) -> str:
        """The arrays with their shapes, for a message."""
        names = [f"{name or 'one array'} {list(shape)} {dtype}" for name, (shape, dtype) in self.arrays.items()]
        return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"


def import_h5py() -> Any:
    """The module h5py.

    Raises:
      DataError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        reason = "HDF5 files need h5py, which is not installed"
        raise DataError(f"{reason}: pip install 'histokd_jax[import]'") from error
    return h5py


def read_header(path: pathlib.Path) -> Header:
    """The header of a feature file.

    Args:
      path: .h5, .hdf5, .npy, .npz or .pt.

    Raises:
      OSError, ValueError: if the file cannot be read as what its suffix says.
    """
    kind = path.suffix.lower()
    if kind in HDF5:
        with import_h5py().File(path, "r") as file:
            return _h5_header(file)
    if kind == ".npy":
        with open(path, "rb") as file:
            return Header({"": _npy_header(file)})
    if kind == ".npz":
        return Header(_npz_header(path))
    if kind in TORCH:
        return Header({name: (array.shape, array.dtype.name) for name, array in _read_torch(path).items()})
    raise DataError(f"{path.name}: the suffix {kind!r} is none of .h5, .hdf5, .npy, .npz, .pt")


def read_arrays(path: pathlib.Path, names: list[str]) -> list[np.ndarray]:
    """The named arrays of a feature file, as they are stored.

    Raises:
      OSError, ValueError, KeyError: if they cannot be read.
    """
    kind = path.suffix.lower()
    if kind in HDF5:
        with import_h5py().File(path, "r") as file:
            return [read_dataset(file[name], path) for name in names]
    if kind == ".npy":
        return [np.load(path, allow_pickle=False) for _ in names]
    if kind == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            return [stored[name] for name in names]
    arrays = _read_torch(path)
    return [arrays[name] for name in names]


def _h5_header(file: Any) -> Header:
    h5py = import_h5py()
    arrays, attrs = {}, {"": _attributes(file)}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            arrays[name] = (tuple(item.shape), item.dtype.name)
            attrs[name] = _attributes(item)

    file.visititems(visit)
    return Header(arrays, attrs)


def _attributes(item: Any) -> dict[str, Any]:
    """Attributes as Python values; what cannot be read (an empty or foreign type) is left out."""
    values = {}
    for name in item.attrs:
        try:
            values[name] = _plain(item.attrs[name])
        except (OSError, TypeError, ValueError):
            continue
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, str) and value[:1] in "{[":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _npy_header(file: Any) -> tuple[tuple[int, ...], str]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise DataError("the array holds Python objects, which would run code when read; save it as numbers")
    return shape, dtype.name


def _npz_header(path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        arrays[name.removesuffix(".npy")] = _npy_header(file)
    except zipfile.BadZipFile as error:
        raise DataError(f"no valid npz file ({error})") from error
    return arrays


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays of a .pt file by name; a bare tensor is called "". No pickled code is run."""
    content = read_torch(path)
    items = content.items() if isinstance(content, Mapping) else [("", content)]
    return {str(name): value for name, value in items if isinstance(value, np.ndarray)}
