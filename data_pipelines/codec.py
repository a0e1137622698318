"""One chunk record: a serialised `tf.train.Example`, written and read by hand.

Fields, in this fixed order: `patches` (bytes, [n, D] row-major), `coords` (bytes, [n, 2] int32), `slide_id` (bytes,
UTF-8), `chunk` (int64), `crc` (int64: CRC-32 of the four other values). All numbers are little-endian.

Lengths that vary and both integers are written as varints of a fixed width (padded with continuation bits, which every
protobuf parser accepts). The layout is thus a pure function of n, D and the length of the id: the arrays lie at known
offsets, the patches always at byte 36, which keeps them aligned, and a reader slices them out without parsing.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import zlib
from typing import NamedTuple

import numpy as np

from data_pipelines import framing
from data_pipelines.schema import FEATURE_DTYPES

PATCHES_OFFSET = 36
COORD_BYTES = 8
MAX_BYTES = (1 << 28) - 64
"""Largest array of one record in bytes; its length must fit a 4-byte varint."""


class ChunkRecord(NamedTuple):
    """The content of a record; the arrays are read-only views of its bytes.

    Attributes:
      patches: [n, D] float16 or float32.
      coords: [n, 2] int32.
      slide_id: key of the slide.
      chunk: number of this chunk within its slide, from 0.
    """

    patches: np.ndarray
    coords: np.ndarray
    slide_id: str
    chunk: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything lies in a record of n patches.

    Attributes:
      constants: (offset, bytes) of all protobuf framing, which is the same in every record of this layout.
      patches, coords, slide_id, chunk, crc: slices of the values.
      size: length of the record in bytes.
    """

    constants: tuple[tuple[int, bytes], ...]
    patches: slice
    coords: slice
    slide_id: slice
    chunk: slice
    crc: slice
    size: int


@functools.lru_cache(maxsize=4096)
def layout(n: int, row_bytes: int, id_bytes: int) -> Layout:
    """Layout of a record.

    Args:
      n: number of patches, at least 1.
      row_bytes: bytes per patch, D x itemsize.
      id_bytes: length of the UTF-8 slide id.

    Returns:
      The offsets of all values and the framing between them.
    """
    frames = (
        framing.bytes_frame("patches", n * row_bytes, (5, 4, 4, 4)),
        framing.bytes_frame("coords", n * COORD_BYTES, (4, 4, 4, 4)),
        framing.bytes_frame("slide_id", id_bytes, (4, 4, 4, 4)),
        framing.int_frame("chunk"),
        framing.int_frame("crc"),
    )
    sizes = (n * row_bytes, n * COORD_BYTES, id_bytes, framing.INT_WIDTH, framing.INT_WIDTH)
    total = sum(map(len, frames)) + sum(sizes)
    head = framing.example_head(total)
    constants, values, at = [], [], 0
    for frame, size in zip((head + frames[0], *frames[1:]), sizes):
        constants.append((at, frame))
        at += len(frame)
        values.append(slice(at, at + size))
        at += size
    return Layout(tuple(constants), *values, size=at)


def _crc(patches: memoryview, coords: memoryview, slide_id: bytes, chunk: int) -> int:
    crc = zlib.crc32(coords, zlib.crc32(patches))
    return zlib.crc32(struct.pack("<q", chunk), zlib.crc32(slide_id, crc))


def _little_endian(array: np.ndarray, dtype: np.dtype) -> memoryview:
    """The bytes of an array in row-major order, without a copy where it lies in memory like that already."""
    return memoryview(array.astype(dtype.newbyteorder("<"), order="C", copy=False).reshape(-1).view(np.uint8))


def encode(patches: np.ndarray, coords: np.ndarray, slide_id: str, chunk: int) -> bytes:
    """Serialises one chunk.

    Args:
      patches: [n, D] float16 or float32, already in the stored dtype.
      coords: [n, 2] int32.
      slide_id: key of the slide.
      chunk: number of this chunk within its slide, from 0.

    Returns:
      The bytes of a `tf.train.Example`.

    Raises:
      ValueError: if a dtype or shape differs from the above, or an array exceeds `MAX_BYTES`.
    """
    if patches.dtype.name not in FEATURE_DTYPES or patches.ndim != 2 or coords.shape != (len(patches), 2):
        raise ValueError(f"cannot encode patches {patches.dtype}{patches.shape} with coords {coords.shape}")
    if patches.nbytes > MAX_BYTES:
        raise ValueError(f"a record of {patches.nbytes} bytes exceeds {MAX_BYTES}; store fewer patches per record")
    key = slide_id.encode()
    data = _little_endian(patches, patches.dtype)
    xy = _little_endian(coords, np.dtype(np.int32))
    frame = layout(len(patches), patches.shape[1] * patches.itemsize, len(key))
    values = (data, xy, key, *(framing.varint(v, framing.INT_WIDTH) for v in (chunk, _crc(data, xy, key, chunk))))
    return b"".join(part for (_, head), value in zip(frame.constants, values) for part in (head, value))


def _layout_of(record: bytes, row_bytes: int) -> Layout:
    """Derives the layout from the lengths inside a record and checks all framing against it."""
    if len(record) < PATCHES_OFFSET:
        raise ValueError(f"the record has only {len(record)} bytes")
    size = framing.read_varint(record, PATCHES_OFFSET - 4, 4)
    n, rest = divmod(size, row_bytes)
    if n < 1 or rest:
        raise ValueError(
            f"the record holds {size} bytes of patches, which is no multiple of {row_bytes} bytes per patch"
        )
    id_bytes = len(record) - layout(n, row_bytes, 0).size
    if id_bytes < 0:
        raise ValueError(f"the record has {len(record)} bytes, too few for {n} patches")
    frame = layout(n, row_bytes, id_bytes)
    for at, constant in frame.constants:
        if record[at : at + len(constant)] != constant:
            raise ValueError(f"the framing of the record at byte {at} is not that of a chunk record")
    return frame


@functools.lru_cache(maxsize=4096)
def _chunk_bytes(chunk: int) -> bytes:
    return framing.varint(chunk, framing.INT_WIDTH)


def decode_known(
    record: bytes, n: int, feat_dim: int, stored: np.dtype, slide_key: bytes, chunk: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The arrays of a record that was decoded before, several times faster than `decode`.

    Args:
      record: bytes written by `encode`.
      n: patches it must hold.
      feat_dim: embedding width D.
      stored: little-endian dtype of the patches.
      slide_key: UTF-8 key of the slide it must belong to.
      chunk: the number it must have.

    Returns:
      patches [n, D] and coords [n, 2] as views of `record`; None if length, slide or number differ.
    """
    frame = layout(n, feat_dim * stored.itemsize, len(slide_key))
    if len(record) != frame.size or record[frame.slide_id] != slide_key or record[frame.chunk] != _chunk_bytes(chunk):
        return None
    patches = np.frombuffer(record, stored, n * feat_dim, PATCHES_OFFSET).reshape(n, feat_dim)
    return patches, np.frombuffer(record, "<i4", n * 2, frame.coords.start).reshape(n, 2)


def decode(record: bytes, feat_dim: int, dtype: str, *, verify: bool = True) -> ChunkRecord:
    """Slices the arrays out of a record without copying them.

    Args:
      record: bytes written by `encode`.
      feat_dim: embedding width D.
      dtype: name of the stored dtype, "float16" or "float32".
      verify: whether to check the CRC-32 (about 1-3 GB/s); the framing is checked always.

    Returns:
      The content; its arrays are views of `record`.

    Raises:
      ValueError: if the bytes are not a record of this width and dtype, or the CRC differs.
    """
    stored = np.dtype(FEATURE_DTYPES[dtype]).newbyteorder("<")
    frame = _layout_of(record, feat_dim * stored.itemsize)
    key = record[frame.slide_id]
    chunk, expected = framing.read_int(record, frame.chunk), framing.read_int(record, frame.crc)
    if verify:
        view = memoryview(record)
        found = _crc(view[frame.patches], view[frame.coords], key, chunk)
        if found != expected:
            raise ValueError(
                f"checksum mismatch: the content has CRC-32 {found:#010x}, the record says {expected:#010x}"
            )
    n = (frame.coords.stop - frame.coords.start) // COORD_BYTES
    patches = np.frombuffer(record, stored, n * feat_dim, frame.patches.start).reshape(n, feat_dim)
    coords = np.frombuffer(record, "<i4", n * 2, frame.coords.start).reshape(n, 2)
    try:
        return ChunkRecord(patches, coords, key.decode(), chunk)
    except UnicodeDecodeError as error:
        raise ValueError(f"the slide id {key!r} is not UTF-8") from error
