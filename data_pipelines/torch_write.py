"""Writes named tensors as a file of `torch.save` (zip layout), without PyTorch."""

from __future__ import annotations

import io
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from pickle import encode_long

import numpy as np

from data_pipelines import table_files
from data_pipelines.errors import DataError
from data_pipelines.torch_objects import STORAGES

_FOLDER = "archive"
_ALIGNMENT = 64  # as PyTorch does, so that storages can be used where they are mapped
_HEADER = 30  # a local header without its name
_PADDING_TAG = b"FB"
_DATE = (1980, 1, 1, 0, 0, 0)  # equal tensors give equal files
_CLASSES = {kind.name: name.removeprefix("torch.") for name, kind in STORAGES.items()}


def write_state_dict(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file that `torch.load(path, weights_only=True)` opens as an OrderedDict of tensors.

    Args:
      path: the file; written whole or not at all.
      tensors: key -> array of a type that PyTorch has storages for (float16/32/64, int8/16/32/64, uint8, bool,
        complex64/128, and the bfloat16 of ml_dtypes). Each gets a storage of its own, row-major.

    Raises:
      DataError: for another type, naming the key.
      StorageError: if the disk is full or not writable.
    """
    path = pathlib.Path(path)
    arrays = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    for key, value in arrays.items():
        if value.dtype.name not in _CLASSES:
            raise DataError(
                f"{path}: {key!r} has type {value.dtype}, which PyTorch files cannot hold: convert it first"
            )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", _pickle(arrays))
        _add(archive, "byteorder", b"little")
        for number, value in enumerate(arrays.values()):
            _add(archive, f"data/{number}", _little_endian(value))
        _add(archive, "version", b"3\n")
    table_files.write_bytes(path, buffer.getvalue())


def _little_endian(value: np.ndarray) -> bytes:
    # bfloat16 of ml_dtypes knows no byte orders; it is native, and so are all machines this runs on.
    return value.tobytes() if value.dtype.kind == "V" else value.astype(value.dtype.newbyteorder("<")).tobytes()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(f"{_FOLDER}/{name}", _DATE)
    start = archive.fp.tell() + _HEADER + len(entry.filename) + 4
    entry.extra = _PADDING_TAG + struct.pack("<H", -start % _ALIGNMENT) + b"Z" * (-start % _ALIGNMENT)
    archive.writestr(entry, content)


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Protocol 2: OrderedDict() filled with (key, _rebuild_tensor_v2(...)) pairs."""
    items = b"".join(_text(key) + _tensor(str(number), value) for number, (key, value) in enumerate(arrays.items()))
    return b"\x80\x02" + _empty_dict() + b"(" + items + b"u."


def _tensor(key: str, value: np.ndarray) -> bytes:
    storage = _tuple(
        _text("storage"), _name("torch", _CLASSES[value.dtype.name]), _text(key), _text("cpu"), _integer(value.size)
    )
    strides = [int(np.prod(value.shape[axis + 1 :], dtype=np.int64)) for axis in range(value.ndim)]
    arguments = _tuple(storage + b"Q", _integer(0), _integers(value.shape), _integers(strides), b"\x89", _empty_dict())
    return _name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _empty_dict() -> bytes:
    return _name("collections", "OrderedDict") + b")R"


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _integers(values) -> bytes:
    return _tuple(*(_integer(value) for value in values))


def _integer(value: int) -> bytes:
    digits = encode_long(int(value))
    return b"\x8a" + bytes([len(digits)]) + digits


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content
