"""Stain normalisation of slides while they are embedded: fitted to each slide, to one target."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.embed import tiles as images
from histokd_jax.embed.slides import Unusable
from histokd_jax.embed.transform import Stain
from histokd_jax.ops.image import stain_normaliser
from histokd_jax.ops.image.stain_normaliser import StainNormaliser


def load(text: str, reference: pathlib.Path | None) -> Stain:
    """The stain normalisation that a user names.

    Args:
      text: a method ("macenko", "reinhard", "vahadane"), or a JSON file that holds method and target.
      reference: image with the stains to give to all slides; needed with a method, and only then.

    Raises:
      ValueError: an unknown method, a missing or superfluous reference, or one without stained tissue.
    """
    if text in stain_normaliser.METHODS:
        if reference is None:
            raise ValueError(f"--stain {text} needs --stain-reference IMAGE: a tile with the stains to aim at")
        pixels = images.read_image(reference)
        return stain_of(stain_normaliser.fit_target(text, pixels, str(reference)))
    if reference is not None:
        raise ValueError(f"--stain {text}: --stain-reference goes with one of {', '.join(stain_normaliser.METHODS)}")
    if not pathlib.Path(text).is_file():
        raise ValueError(f"--stain {text}: neither one of {', '.join(stain_normaliser.METHODS)} nor a file")
    return stain_of(stain_normaliser.read(text))


def stain_of(normaliser: StainNormaliser) -> Stain:
    """A normaliser as embedding uses it: one set of parameters per slide, so that differences within a slide stay.

    Args:
      normaliser: method and target.
    """

    def fit(tiles: np.ndarray) -> Any:
        found = stain_normaliser.fit_tiles(normaliser.method, tiles)
        if not bool(found.valid):
            raise Unusable(
                "no stains", f"{normaliser.method} finds no stained tissue in {len(tiles)} tiles spread over the slide"
            )
        return jax.tree.map(np.asarray, found)

    def apply(tiles: jax.Array, parameters: Any) -> jax.Array:
        return normaliser(tiles, parameters, dtype=jnp.float32)

    return Stain(json.loads(stain_normaliser.to_json(normaliser)), fit, apply)
