"""One stain normalisation with its target: what an embedding run applies to every tile, and its JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.ops.image import macenko, reinhard, vahadane
from histokd_jax.ops.image.reinhard import ReinhardParams
from histokd_jax.ops.image.stains import StainParams

Params = StainParams | ReinhardParams
FORMAT = "histokd-stain/1"
_MODULES = {"macenko": macenko, "reinhard": reinhard, "vahadane": vahadane}
METHODS = tuple(_MODULES)
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True, eq=False)
class StainNormaliser:
    """A method with the stains of its reference image.

    Attributes:
      method: "macenko", "reinhard" or "vahadane".
      target: what `fit` found in the reference.
    """

    method: str
    target: Params

    def __call__(self, images: jax.Array, source: Params | None = None, dtype: Any = jnp.uint8) -> jax.Array:
        """Normalises a batch of tiles; pure, so that it can be part of a jitted encoder.

        Args:
          images: [B, H, W, 3] uint8, or float32 on 0..255.
          source: parameters of the slide from `fit_tiles` (one set, or one for each tile); None fits every tile on its
            own, which keeps no differences between the tiles of a slide.
          dtype: uint8 or float32 of the result.

        Returns:
          [B, H, W, 3]; tiles without two stains or tissue, and all tiles of such a slide, are unchanged.
        """
        module = module_of(self.method)
        if source is None:
            source = jax.vmap(module.fit)(images.reshape(images.shape[0], -1, 3))
        return module.transform(images, source, self.target, dtype=dtype)


def fit_tiles(method: str, tiles: np.ndarray, pixels: int = 100_000) -> Params:
    """Fits one set of parameters to a slide: to pixels spread evenly over some of its tiles.

    Args:
      method: a name of `METHODS`.
      tiles: [T, H, W, 3] uint8 (a reference image: T = 1).
      pixels: at most so many are used; the same ones every time.

    Returns:
      The parameters; `valid` is False if the tiles hold no two stains.

    Raises:
      ValueError: for an unknown method, or tiles of another form.
    """
    module = module_of(method)
    tiles = np.asarray(tiles)
    if tiles.ndim != 4 or tiles.shape[-1] != 3 or not tiles.size or tiles.dtype != np.uint8:
        raise ValueError(f"tiles are {tiles.dtype} of shape {tiles.shape}; expected uint8 [tiles, height, width, 3]")
    flat = tiles.reshape(-1, 3)
    return jax.jit(module.fit)(jnp.asarray(flat[spread_indices(len(flat), pixels)]))


def fit_target(method: str, image: np.ndarray, name: str = "the reference image") -> StainNormaliser:
    """The normaliser whose target is one reference image.

    Args:
      method: a name of `METHODS`.
      image: [H, W, 3] uint8; all pixels are used.
      name: of the image, for the message.

    Returns:
      The normaliser.

    Raises:
      ValueError: if the image holds no two stains (or no tissue).
    """
    target = fit_tiles(method, np.asarray(image)[None], pixels=np.asarray(image).size)
    if not bool(target.valid):
        raise ValueError(f"{name}: {method} finds no stained tissue in it; choose a tile that is mostly tissue")
    return StainNormaliser(method, target)


def spread_indices(total: int, wanted: int) -> np.ndarray:
    """min(total, wanted) distinct indices below `total`, evenly spread and free of the period of rows and tiles.

    Args:
      total: number of pixels.
      wanted: largest number to return.

    Returns:
      [n] int64; all of them in order if total <= wanted. Multiples of a step near the golden section of `total`.
    """
    if total <= wanted:
        return np.arange(total)
    step = max(1, round(total * _GOLDEN))
    while math.gcd(step, total) != 1:
        step += 1
    return np.arange(wanted, dtype=np.int64) * step % total


def to_json(normaliser: StainNormaliser) -> str:
    """The normaliser as text; float32 numbers are written so that reading gives the same bits."""
    target = {name: np.asarray(value).tolist() for name, value in normaliser.target._asdict().items()}
    return json.dumps({"format": FORMAT, "method": normaliser.method, "target": target}, indent=2) + "\n"


def from_json(text: str, name: str = "the stain file") -> StainNormaliser:
    """The inverse of `to_json`.

    Args:
      text: JSON.
      name: of the file, for messages.

    Returns:
      The normaliser.

    Raises:
      ValueError: naming the file, the field and what was expected.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        raise ValueError(f"{name}: expected a stain normalisation of format {FORMAT!r}, written by this library")
    method, target = record.get("method"), record.get("target")
    if method not in METHODS:
        raise ValueError(f"{name}: method is {method!r}; expected one of {', '.join(METHODS)}")
    kind = ReinhardParams if method == "reinhard" else StainParams
    if not isinstance(target, Mapping) or set(target) != set(kind._fields):
        raise ValueError(f"{name}: target of {method} must have the fields {', '.join(kind._fields)}")
    return StainNormaliser(method, kind(*(_field(target, field, name) for field in kind._fields)))


def write(normaliser: StainNormaliser, path: str | os.PathLike[str]) -> None:
    """Writes `to_json` to a file."""
    pathlib.Path(path).write_text(to_json(normaliser))


def read(path: str | os.PathLike[str]) -> StainNormaliser:
    """Reads a file of `write`; ValueError names it if it is something else."""
    return from_json(pathlib.Path(path).read_text(), str(path))


def module_of(method: str) -> ModuleType:
    """The module with `fit` and `transform` of a method.

    Raises:
      ValueError: for an unknown name.
    """
    if method not in _MODULES:
        raise ValueError(f"unknown stain normalisation {method!r}; known are {', '.join(METHODS)}")
    return _MODULES[method]


def _field(target: Mapping[str, Any], field: str, name: str) -> jax.Array:
    shape = {"stains": (2, 3), "maximum": (2,), "background": (), "mean": (3,), "std": (3,), "valid": ()}[field]
    dtype = bool if field == "valid" else np.float32
    try:
        value = np.asarray(target[field], dtype)
    except (TypeError, ValueError):
        value = None
    if value is None or value.shape != shape or not np.isfinite(value).all():
        raise ValueError(f"{name}: target.{field} is {target[field]!r}; expected finite numbers of shape {shape}")
    return jnp.asarray(value)
