"""Files of `torch.save` read without PyTorch and without running what they contain.

Two layouts exist. The zip one (PyTorch 1.6 and later) holds FOLDER/data.pkl and one entry per storage. The older one is
a row of pickles (magic number, version, machine, the object, the storage names) with the raw storages behind them.
Tensors become NumPy arrays that look into the memory-mapped file, so nothing is loaded before it is used; bfloat16
becomes float32.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data_pipelines import torch_objects
from data_pipelines.errors import DataError
from data_pipelines.safe_pickle import Reader
from data_pipelines.torch_objects import Storage, TorchType, decode
from data_pipelines.torch_write import write_state_dict

__all__ = ["read_state_dict", "read_torch", "write_state_dict"]

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# A state dict is often one entry of a checkpoint; its usual names, first come first served.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
DATA_PARALLEL = "module."


def read_torch(path: str | pathlib.Path) -> Any:
    """Reads a .pt or .pth file.

    Args:
      path: file written by `torch.save`, in either layout.

    Returns:
      What was saved, in plain Python: containers, numbers, strings, and arrays for tensors and parameters. Arrays are
      read-only views of the mapped file with the strides of the tensor; tensors that share storage share memory.

    Raises:
      FileNotFoundError: no such file.
      UnsafePickleError: the file names code; none was run.
      DataError: not a PyTorch file, truncated, or with element types that NumPy does not know.
    """
    path = pathlib.Path(path)
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty: download or copy it again")
    content = np.asarray(np.memmap(path, np.uint8, mode="r"))
    if content[:4].tobytes() == b"PK\x03\x04":
        return _read_zip(path, content)
    return _read_legacy(path, content)


def read_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the named tensors of a model from .pt, .pth or .safetensors.

    Entries called state_dict, model_state_dict, model or net are opened, and the prefix "module." that
    torch.nn.DataParallel puts before every key is removed.

    Args:
      path: the file; the layout is told from its contents, safetensors by the suffix.

    Returns:
      {key: array} in the order of the file.

    Raises:
      FileNotFoundError: no such file.
      DataError: as `read_torch`, or if an entry is no tensor (named).
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        return strip_prefix(_read_safetensors(path))
    return strip_prefix(state_dict_of(read_torch(path), path))


def state_dict_of(saved: Any, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The named tensors within what a file holds; see `read_state_dict`."""
    while isinstance(saved, Mapping):
        inner = [saved[name] for name in WRAPPERS if isinstance(saved.get(name), Mapping)]
        if not inner:
            break
        saved = inner[0]
    if not isinstance(saved, Mapping):
        raise DataError(f"{path}: holds a {type(saved).__name__}, not named tensors: save model.state_dict()")
    other = [f"{key!r} ({type(value).__name__})" for key, value in saved.items() if not isinstance(value, np.ndarray)]
    if other or not saved:
        raise DataError(
            f"{path}: {', '.join(other[:4]) or 'it'} {'are' if len(other) > 1 else 'is'} "
            f"{'no tensor' if other else 'empty'}; "
            f"expected a state dict, alone or under one of {', '.join(WRAPPERS)}"
        )
    return {str(key): value for key, value in saved.items()}


def strip_prefix(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes "module." from the keys if all of them begin with it, as often as they do."""
    while state and all(key.startswith(DATA_PARALLEL) for key in state):
        state = {key.removeprefix(DATA_PARALLEL): value for key, value in state.items()}
    return dict(state)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError, numpy
    except ImportError as error:
        raise DataError(
            f"{path}: reading safetensors needs the package safetensors: pip install safetensors"
        ) from error
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        state = numpy.load_file(path)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a safetensors file that NumPy can hold: {error!r}") from error
    return {key: _without_bfloat16(state[key]) for key in sorted(state)}


def _without_bfloat16(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


# --- the zip layout


@dataclasses.dataclass(frozen=True)
class _Archive:
    """A zip of PyTorch, with access to its stored bytes."""

    path: pathlib.Path
    content: np.ndarray
    file: zipfile.ZipFile
    folder: str

    def names(self) -> list[str]:
        """Entries of the archive's folder, without it."""
        return [name.removeprefix(self.folder) for name in self.file.namelist() if name.startswith(self.folder)]

    def read(self, name: str) -> np.ndarray:
        """[n] uint8: an entry. Checksums are not compared: PyTorch can be told not to compute them."""
        entry = self.file.getinfo(self.folder + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self.file.read(entry), np.uint8)
        header = self.content[entry.header_offset :][: _LOCAL_HEADER.size].tobytes()
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + entry.file_size > self.content.size:
            raise DataError(f"{self.path}: entry {entry.filename} lies outside the file: truncated?")
        return self.content[start : start + entry.file_size]


def _read_zip(path: pathlib.Path, content: np.ndarray) -> Any:
    try:
        with zipfile.ZipFile(path) as file:
            return _read_archive(_open_archive(path, content, file))
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{path}: the zip archive is damaged or truncated: {error}") from error


def _open_archive(path: pathlib.Path, content: np.ndarray, file: zipfile.ZipFile) -> _Archive:
    heads = [name.removesuffix("data.pkl") for name in file.namelist() if name.endswith("/data.pkl")]
    if not heads:
        raise DataError(f"{path}: a zip archive, but not of torch.save: it has no FOLDER/data.pkl")
    return _Archive(path, content, file, min(heads, key=len))


def _read_archive(archive: _Archive) -> Any:
    entries, where = set(archive.names()), str(archive.path)
    big_endian = "byteorder" in entries and archive.read("byteorder").tobytes() == b"big"
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        _, kind, key, _, numel = _storage_id(identity, where)
        if key not in storages:
            if f"data/{key}" not in entries:
                raise DataError(f"{where}: storage data/{key} is missing")
            data = archive.read(f"data/{key}")
            if data.size != numel * kind.stored.itemsize:
                raise DataError(f"{where}: storage data/{key} has {data.size} bytes, not {numel} {kind.name}")
            storages[key] = Storage(kind, decode(data, kind, big_endian))
        return storages[key]

    return _reader(torch_objects.names(), storage, where).load(io.BytesIO(archive.read("data.pkl").tobytes()))


def _reader(names: Mapping[str, Any], storage: Callable[[Any], Any] | None, where: str) -> Reader:
    return Reader(names, storage, torch_objects.set_state, where)


def _storage_id(identity: Any, where: str) -> tuple[str, TorchType, str, Any, int]:
    """Checks ("storage", type, key, device, number of elements)."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise DataError(f"{where}: it holds {str(identity)[:60]!r} where a storage belongs: a whole model was saved?")
    if not isinstance(identity[1], TorchType) or not isinstance(identity[4], int):
        raise DataError(f"{where}: storage {identity[2]!r} has no known type or size")
    return identity[0], identity[1], str(identity[2]), identity[3], identity[4]


# --- the older layout


def _read_legacy(path: pathlib.Path, content: np.ndarray) -> Any:
    where, stream = str(path), io.BufferedReader(_Raw(content), 1 << 16)
    plain = _reader({}, None, where)
    if not _starts_like_torch(content) or plain.load(stream) != _MAGIC:
        raise DataError(f"{where}: not a file of torch.save (neither a zip archive nor its older layout)")
    if (version := plain.load(stream)) != _VERSION:
        raise DataError(f"{where}: torch.save layout {version}, known is {_VERSION}")
    big_endian = not plain.load(stream)["little_endian"]
    start = stream.tell()
    kinds: dict[str, TorchType] = {}
    # The sizes of the storages are known only from the object that precedes them, so it is read twice.
    note = _reader(torch_objects.names_without_tensors(), lambda identity: _note(identity, kinds, where), where)
    note.load(stream)
    keys = plain.load(stream)
    storages = _legacy_storages(content, stream.tell(), keys, kinds, big_endian, where)

    def storage(identity: Any) -> Storage:
        return _legacy_view(storages, identity, where)

    stream.seek(start)
    return _reader(torch_objects.names(), storage, where).load(stream)


def _starts_like_torch(content: np.ndarray) -> bool:
    # PROTO 2..5, then (from protocol 4) a frame, then LONG1 of ten bytes.
    head = content[:24].tobytes()
    return head[:1] == b"\x80" and b"\x8a\n" + _MAGIC.to_bytes(10, "little") in head


def _note(identity: Any, kinds: dict[str, TorchType], where: str) -> None:
    _, kind, key, _, _ = _storage_id(identity, where)
    kinds[key] = kind


def _legacy_storages(
    content: np.ndarray, start: int, keys: Any, kinds: Mapping[str, TorchType], big_endian: bool, where: str
) -> dict[str, Storage]:
    """Storages in the order of `keys`, each an int64 number of elements and the elements."""
    storages = {}
    for key in map(str, keys):
        if key not in kinds:
            raise DataError(f"{where}: storage {key!r} belongs to no tensor")
        count = np.frombuffer(content[start : start + 8].tobytes().ljust(8, b"\0"), ">i8" if big_endian else "<i8")[0]
        size = int(count) * kinds[key].stored.itemsize
        if start + 8 > content.size or count < 0 or start + 8 + size > content.size:
            raise DataError(f"{where}: truncated within storage {key!r}: download or copy the file again")
        start += 8
        storages[key] = Storage(kinds[key], decode(content[start : start + size], kinds[key], big_endian))
        start += size
    return storages


def _legacy_view(storages: Mapping[str, Storage], identity: Any, where: str) -> Storage:
    _, kind, key, _, _ = _storage_id(identity, where)
    if key not in storages:
        raise DataError(f"{where}: storage {key!r} is missing")
    view = identity[5] if len(identity) > 5 else None
    if view is None:
        return storages[key]
    _, offset, size = view
    if offset < 0 or size < 0 or offset + size > storages[key].elements.size:
        raise DataError(f"{where}: a part of storage {key!r} lies outside it")
    return Storage(kind, storages[key].elements[offset : offset + size])


class _Raw(io.RawIOBase):
    """A mapped file as a stream: reading the object does not load the storages behind it."""

    def __init__(self, content: np.ndarray):
        self.view, self.position = memoryview(content), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = (0, self.position, len(self.view))[whence] + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        part = self.view[self.position : self.position + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)
