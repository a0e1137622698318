"""The bytes of a chunk record, compared with an independent protobuf reader written from the wire-format rules."""

import struct
import zlib

import numpy as np
import pytest

from data_pipelines import codec


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data):
    """(field number, payload) of a message that holds length-delimited fields only."""
    at, found = 0, []
    while at < len(data):
        tag, at = _varint(data, at)
        assert tag & 7 == 2
        size, at = _varint(data, at)
        found.append((tag >> 3, data[at : at + size]))
        at += size
    return found


def _parse_example(data):
    """tf.train.Example -> list of (key, kind, value), by the schema of example.proto and feature.proto."""
    ((number, features),) = _fields(data)
    assert number == 1
    out = []
    for number, entry in _fields(features):
        assert number == 1
        (k, key), (v, feature) = _fields(entry)
        assert (k, v) == (1, 2)
        ((kind, values),) = _fields(feature)
        ((inner, payload),) = _fields(values)
        assert inner == 1
        out.append((key.decode(), kind, payload if kind == 1 else _varint(payload, 0)[0]))
    return out


def _chunk(n, dim, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)).astype(dtype), rng.integers(-9, 1 << 30, size=(n, 2)).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("n,dim", [(1, 1), (3, 5), (128, 64)])
def test_record_is_an_example_in_fixed_field_order(n, dim, dtype):
    patches, coords = _chunk(n, dim, dtype)
    record = codec.encode(patches, coords, "slide-é", 300)
    crc = zlib.crc32(patches.tobytes() + coords.tobytes() + "slide-é".encode() + struct.pack("<q", 300))
    assert _parse_example(record) == [
        ("patches", 1, patches.tobytes()),
        ("coords", 1, coords.tobytes()),
        ("slide_id", 1, "slide-é".encode()),
        ("chunk", 3, 300),
        ("crc", 3, crc),
    ]
    back = codec.decode(record, dim, dtype)
    np.testing.assert_array_equal(back.patches, patches, strict=True)
    np.testing.assert_array_equal(back.coords, coords, strict=True)
    assert (back.slide_id, back.chunk) == ("slide-é", 300)


def test_decode_does_not_copy_and_is_aligned():
    patches, coords = _chunk(4, 8)
    record = codec.encode(patches, coords, "s", 0)
    back = codec.decode(record, 8, "float16")
    start = np.frombuffer(record, np.uint8).__array_interface__["data"][0]
    assert back.patches.__array_interface__["data"][0] == start + codec.PATCHES_OFFSET
    assert back.patches.flags.aligned and not back.patches.flags.writeable


def test_encode_of_strided_input_equals_that_of_a_copy():
    patches, coords = _chunk(6, 8)
    strided = codec.encode(patches[::2, ::2], coords[::2], "s", 0)
    assert strided == codec.encode(patches[::2, ::2].copy(), coords[::2].copy(), "s", 0)


def test_every_flipped_bit_is_noticed():
    record = codec.encode(*_chunk(3, 4), "slide", 7)
    for bit in range(len(record) * 8):
        broken = bytearray(record)
        broken[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(ValueError):
            codec.decode(bytes(broken), 4, "float16")


def test_crc_is_checked_only_on_request():
    patches, coords = _chunk(3, 4)
    broken = bytearray(codec.encode(patches, coords, "slide", 7))
    broken[codec.PATCHES_OFFSET] ^= 1
    with pytest.raises(ValueError, match="checksum mismatch"):
        codec.decode(bytes(broken), 4, "float16")
    assert codec.decode(bytes(broken), 4, "float16", verify=False).chunk == 7


@pytest.mark.parametrize("dim,dtype", [(5, "float16"), (4, "float32"), (16, "float32")])
def test_wrong_width_or_dtype_is_refused(dim, dtype):
    record = codec.encode(*_chunk(3, 4), "slide", 7)
    with pytest.raises(ValueError, match="no multiple|framing|too few"):
        codec.decode(record, dim, dtype)


def test_encode_refuses_what_it_cannot_represent():
    patches, coords = _chunk(3, 4)
    with pytest.raises(ValueError, match="cannot encode"):
        codec.encode(patches.astype(np.float64), coords, "s", 0)
    with pytest.raises(ValueError, match="cannot encode"):
        codec.encode(patches, coords[:2], "s", 0)
    huge = np.lib.stride_tricks.as_strided(patches, (codec.MAX_BYTES, 1), (0, 0))
    with pytest.raises(ValueError, match="fewer patches per record"):
        codec.encode(huge, np.lib.stride_tricks.as_strided(coords, (codec.MAX_BYTES, 2), (0, 0)), "s", 0)


def test_a_known_record_decodes_alike_and_another_one_is_not_taken_for_it():
    patches, coords = _chunk(5, 7)
    record = codec.encode(patches, coords, "Schnitt_ä", 300)
    known = {"n": 5, "feat_dim": 7, "stored": np.dtype("<f2"), "slide_key": "Schnitt_ä".encode(), "chunk": 300}
    found = codec.decode_known(record, **known)
    np.testing.assert_array_equal(found[0], patches)
    np.testing.assert_array_equal(found[1], coords)
    for change in ({"n": 4}, {"slide_key": "Schnitt_ö".encode()}, {"slide_key": b"x"}, {"chunk": 301}):
        assert codec.decode_known(record, **{**known, **change}) is None
