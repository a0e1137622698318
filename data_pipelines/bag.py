"""What a bag must satisfy to be stored, and the order in which its patches are stored. NumPy only."""

from __future__ import annotations

import hashlib

import numpy as np

from data_pipelines.errors import BagError

NO_COORDS = -1
"""Stored in both columns of `coords` where a bag came without coordinates."""

_EXPONENT = {"float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
_INT32 = np.iinfo(np.int32)


def permutation(seed: int, slide_id: str, n: int) -> np.ndarray:
    """Order in which the patches of a slide are stored, so that any contiguous run is a uniform sample.

    Depends on nothing but the arguments: a SHA-256 of seed and key starts a PCG-64, whose raw output NumPy keeps stable
    across versions and platforms.

    Args:
      seed: seed of the dataset.
      slide_id: key of the slide.
      n: bag size.

    Returns:
      int64 [n]; stored patch i is input patch `permutation[i]`.
    """
    digest = hashlib.sha256(f"{seed}\0{slide_id}".encode()).digest()
    keys = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(keys, kind="stable")


def check_key(key: str, field: str, slide_id: object) -> None:
    """Refuses keys that cannot serve as a file name or a CSV field.

    Args:
      key: the key to check.
      field: its name, for the message.
      slide_id: the slide it belongs to, for the message.

    Raises:
      BagError: if it is empty, padded with blanks, or holds path separators or control characters.
    """
    bad = not isinstance(key, str) or not key or key != key.strip() or key in (".", "..")
    if bad or any(c in "/\\" or not c.isprintable() for c in key):
        raise BagError(
            f"slide {slide_id!r}: {field} is {key!r}, expected a non-empty string without path separators, control "
            "characters or surrounding blanks; rename it"
        )


def check_features(slide_id: str, features: np.ndarray, feat_dim: int, dtype: np.dtype, block: int) -> None:
    """Refuses a bag that cannot be stored without loss of meaning.

    Args:
      slide_id: key of the slide, for the message.
      features: [n, D] patch embeddings.
      feat_dim: the width that is expected.
      dtype: the stored dtype, float16 or float32.
      block: patches checked at a time, which bounds the memory needed.

    Raises:
      BagError: if the bag is empty, not floating point, of another width, or holds values that are NaN, Inf or beyond
        the range of `dtype`; the first such value is named by row and column.
    """
    if features.ndim != 2 or features.shape[1] != feat_dim:
        raise BagError(
            f"slide {slide_id!r}: features have shape {features.shape}, expected [n, {feat_dim}]; encode the slide "
            "with the encoder of this dataset, or change feat_dim"
        )
    if len(features) == 0:
        raise BagError(f"slide {slide_id!r}: the bag is empty; leave the slide out")
    if features.dtype.kind != "f" and features.dtype.name != "bfloat16":
        raise BagError(f"slide {slide_id!r}: features have dtype {features.dtype}, expected floating point; cast them")
    for start in range(0, len(features), block):
        rows = features[start : start + block]
        bad = _not_finite(rows, dtype)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise BagError(
                f"slide {slide_id!r}: features[{start + row}, {column}] is {rows[row, column]}, expected a finite "
                f"value within +-{float(np.finfo(dtype).max)} ({dtype}); repair or rescale the encoder's output"
            )


def check_coords(slide_id: str, coords: np.ndarray | None, n: int) -> np.ndarray:
    """The coordinates as they are stored.

    Args:
      slide_id: key of the slide, for the message.
      coords: [n, 2] integers, or None.
      n: bag size.

    Returns:
      int32 [n, 2]; all `NO_COORDS` if `coords` is None.

    Raises:
      BagError: if the shape differs or a value is no integer or does not fit int32.
    """
    if coords is None:
        return np.full((n, 2), NO_COORDS, np.int32)
    coords = np.asarray(coords)
    if coords.shape != (n, 2) or coords.dtype.kind not in "iu":
        found = f"{coords.dtype} of shape {coords.shape}"
        raise BagError(f"slide {slide_id!r}: coords are {found}, expected integers [{n}, 2], one row per patch")
    outside = (coords < _INT32.min) | (coords > _INT32.max)
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        value = coords[row, column]
        raise BagError(f"slide {slide_id!r}: coords[{row}, {column}] is {value}, expected level-0 pixels within int32")
    return coords.astype(np.int32, copy=False)


def _not_finite(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Where `rows`, cast to `dtype`, are NaN or Inf: there all bits of the exponent are set.

    Several times faster than `np.isfinite` on float16, which NumPy runs through float32.
    """
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(rows.astype(dtype, copy=False))
    unsigned, exponent = _EXPONENT[dtype.name]
    return (cast.view(unsigned) & exponent) == exponent
