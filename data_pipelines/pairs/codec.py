"""One record of a pair dataset: a serialised `tf.train.Example`, written and read by hand.

Fields, in this fixed order: `image` (PNG or JPEG), `partner` (likewise; one black pixel where an example has none; only
if the dataset has partner images), `vector` ([P] little-endian float32; only if it has vectors), `example_id` and
`group` (UTF-8), `label` (int64, -1: none), `has_partner` (int64), `crc` (int64: CRC-32 of the values before it).
"""

from __future__ import annotations

import base64
import dataclasses
import struct
import zlib
from typing import NamedTuple

import numpy as np

from data_pipelines import framing

NO_PARTNER = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)
"""A PNG of one black pixel: stands where an example has no partner image, so that every reader can decode the field."""
MAX_BYTES = (1 << 28) - 64
"""Largest value of one record in bytes; its length must fit a 4-byte varint."""
_INTS = (("label", framing.SIGNED_WIDTH), ("has_partner", framing.INT_WIDTH), ("crc", framing.INT_WIDTH))
_TWO_64 = 1 << 64


@dataclasses.dataclass(frozen=True)
class Contents:
    """Which optional fields all records of a dataset have.

    Attributes:
      partner: partner images.
      vector_size: P, length of the vectors; 0: none.
    """

    partner: bool
    vector_size: int = 0

    @property
    def byte_fields(self) -> tuple[str, ...]:
        """The bytes fields, in order."""
        optional = (("partner",) if self.partner else ()) + (("vector",) if self.vector_size else ())
        return ("image", *optional, "example_id", "group")


class PairRecord(NamedTuple):
    """The content of a record.

    Attributes:
      example_id: key of the example.
      group: slide or patient, may be empty.
      label: class index, -1 where there is none.
      image: PNG or JPEG.
      partner: PNG or JPEG, or None.
      vector: [P] float32, or None if the dataset has no vectors. NaN where this example has none.
    """

    example_id: str
    group: str
    label: int
    image: bytes
    partner: bytes | None = None
    vector: np.ndarray | None = None


def encode(record: PairRecord, contents: Contents) -> bytes:
    """Serialises one example.

    Args:
      record: its content.
      contents: the fields of the dataset.

    Returns:
      The bytes of a `tf.train.Example`.

    Raises:
      ValueError: a vector of another length, or an image that is too large.
    """
    values = {
        "image": record.image,
        "partner": record.partner or NO_PARTNER,
        "vector": b"" if record.vector is None else np.asarray(record.vector, "<f4").tobytes(),
        "example_id": record.example_id.encode(),
        "group": record.group.encode(),
    }
    if contents.vector_size and len(values["vector"]) != 4 * contents.vector_size:
        raise ValueError(f"the vector has {len(values['vector']) // 4} numbers, expected {contents.vector_size}")
    chosen = [(name, values[name]) for name in contents.byte_fields]
    for name, value in chosen:
        if len(value) > MAX_BYTES:
            raise ValueError(f"{name} of {record.example_id} has {len(value)} bytes, more than {MAX_BYTES}")
    has_partner = int(record.partner is not None)
    ints = (record.label % _TWO_64, has_partner, _crc([value for _, value in chosen], record.label, has_partner))
    body = b"".join(framing.bytes_frame(name, len(value)) + value for name, value in chosen)
    body += b"".join(
        framing.int_frame(name, width) + framing.varint(value, width) for (name, width), value in zip(_INTS, ints)
    )
    return framing.example_head(len(body)) + body


def decode(record: bytes, contents: Contents, *, verify: bool = True) -> PairRecord:
    """Slices the values out of a record.

    Args:
      record: bytes written by `encode`.
      contents: the fields of the dataset.
      verify: whether to check the CRC-32; the framing is checked always.

    Returns:
      The content.

    Raises:
      ValueError: the bytes are no record with these fields, or the CRC differs.
    """
    at, values = _expect(record, 0, framing.example_head(max(len(record) - _HEAD, 0))), {}
    for name in contents.byte_fields:
        values[name], at = _take_bytes(record, at, name)
    ints = {}
    for name, width in _INTS:
        at = _expect(record, at, framing.int_frame(name, width))
        ints[name] = framing.read_int(record, slice(at, at + width))
        at += width
    if at != len(record):
        raise ValueError(f"the record has {len(record)} bytes, {at} were expected")
    label = ints["label"] - _TWO_64 if ints["label"] >> 63 else ints["label"]
    if verify and (found := _crc(list(values.values()), label, ints["has_partner"])) != ints["crc"]:
        raise ValueError(
            f"checksum mismatch: the content has CRC-32 {found:#010x}, the record says {ints['crc']:#010x}"
        )
    vector = np.frombuffer(values["vector"], "<f4") if contents.vector_size else None
    if vector is not None and len(vector) != contents.vector_size:
        raise ValueError(f"the vector has {len(vector)} numbers, expected {contents.vector_size}")
    partner = values.get("partner") if ints["has_partner"] else None
    try:
        ids = values["example_id"].decode(), values["group"].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the example id {values['example_id']!r} or its group is not UTF-8") from error
    return PairRecord(*ids, label, values["image"], partner, vector)


_HEAD = len(framing.example_head(0))


def _crc(values: list[bytes], label: int, has_partner: int) -> int:
    crc = 0
    for value in values:
        crc = zlib.crc32(value, crc)
    return zlib.crc32(struct.pack("<qq", label, has_partner), crc)


def _expect(record: bytes, at: int, frame: bytes) -> int:
    """The position behind a frame that must stand at `at`."""
    if record[at : at + len(frame)] != frame:
        raise ValueError(f"the framing of the record at byte {at} is not that of an image pair")
    return at + len(frame)


def _take_bytes(record: bytes, at: int, name: str) -> tuple[bytes, int]:
    length = len(framing.bytes_frame(name, 0))
    if at + length > len(record):
        raise ValueError(f"the record ends at byte {len(record)}, before its field {name}")
    size = framing.read_varint(record, at + length - framing.WIDTHS[3], framing.WIDTHS[3])
    start = _expect(record, at, framing.bytes_frame(name, size))
    if start + size > len(record):
        raise ValueError(f"the record ends at byte {len(record)}, inside its field {name}")
    return record[start : start + size], start + size
