"""The bytes around the values of a serialised `tf.train.Example`, written and read by hand.

Lengths and integers are varints of a fixed width (padded with continuation bits, which every protobuf parser accepts),
so that where a value lies follows from the lengths of the values before it, without parsing.
"""

from __future__ import annotations

INT_WIDTH = 5
"""Bytes of an integer from 0 to 2^35 - 1."""
SIGNED_WIDTH = 10
"""Bytes of any int64, also a negative one."""

LEN = 0x0A  # Field 1, wire type 2 (length-delimited); in every message used here field 1 is the payload.
_VALUE = 0x12  # Field 2, wire type 2: the value of a map entry.
_INT64_LIST = 0x1A  # Field 3 of Feature.
WIDTHS = (4, 4, 4, 4)


def varint(value: int, width: int) -> bytes:
    """`value` as a base-128 varint padded to `width` bytes.

    Raises:
      ValueError: it is negative or does not fit.
    """
    if value < 0 or value >> (7 * width):
        raise ValueError(f"{value} does not fit a varint of {width} bytes")
    low = [(value >> (7 * i)) & 0x7F for i in range(width)]
    return bytes([b | 0x80 for b in low[:-1]] + [low[-1]])


def read_varint(data: bytes, start: int, width: int) -> int:
    """Inverse of `varint`; continuation bits are not looked at."""
    value = 0
    for i in range(width):
        value |= (data[start + i] & 0x7F) << (7 * i)
    return value


def read_int(record: bytes, place: slice) -> int:
    """An integer value; its continuation bits count as framing.

    Raises:
      ValueError: they are not those of `varint`.
    """
    data, width = record[place], place.stop - place.start
    if [byte >> 7 for byte in data] != [1] * (width - 1) + [0]:
        raise ValueError(f"the integer at byte {place.start} is {data.hex()}, not a varint of {width} bytes")
    return read_varint(data, 0, width)


def bytes_frame(key: str, size: int, widths: tuple[int, int, int, int] = WIDTHS) -> bytes:
    """Framing in front of a bytes value: map entry, key, Feature, BytesList, value."""
    name = key.encode()
    inner = bytes([LEN]) + varint(size, widths[3])
    bytes_list = bytes([LEN]) + varint(len(inner) + size, widths[2])
    feature_size = len(bytes_list) + len(inner) + size
    value = bytes([_VALUE]) + varint(feature_size, widths[1])
    head = bytes([LEN, len(name)]) + name
    entry = bytes([LEN]) + varint(len(head) + len(value) + feature_size, widths[0])
    return entry + head + value + bytes_list + inner


def int_frame(key: str, width: int = INT_WIDTH) -> bytes:
    """Framing in front of a packed Int64List of one integer of fixed width."""
    name = key.encode()
    int_list = bytes([_INT64_LIST, 2 + width, LEN, width])
    head = bytes([LEN, len(name)]) + name
    value = bytes([_VALUE, len(int_list) + width])
    body = head + value + int_list
    return bytes([LEN, len(body) + width]) + body


def example_head(size: int) -> bytes:
    """Framing in front of all map entries, which have `size` bytes."""
    return bytes([LEN]) + varint(size, INT_WIDTH)
