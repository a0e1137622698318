"""Augmentations by name: those of the methods, as released and corrected, and lighter ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from histokd_jax.ops.image.augment import Pipeline, check_shared
from histokd_jax.ops.image.steps import HorizontalFlip, QuarterTurns, RandomCrop, Rotate, Step, VerticalFlip
from histokd_jax.ops.image.steps_colour import (
    Brightness,
    Clip,
    Contrast,
    Hue,
    Saturation,
    Solarise,
    StainJitter,
    ZerosToNoise,
)
from histokd_jax.ops.image.steps_vector import GaussianNoise, LogNormalise, MaskGenes, PermuteGenes

Size = tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the views of an example are augmented.

    Attributes:
      image: steps of the modality of deployment (every branch of it).
      partner: steps of the partner image.
      shared_geometry: whether all views of an example are moved alike.

    Raises:
      ValueError: if the geometry is shared but the geometric steps differ.
    """

    image: Pipeline
    partner: Pipeline
    shared_geometry: bool = False

    def __post_init__(self):
        if self.shared_geometry:
            check_shared((self.image, self.partner))


def recipe(name: str, size: Size = None) -> Recipe:
    """The named augmentation of images.

    Args:
      name: a key of `image_presets()`.
      size: (rows, columns) to which crops are stretched; None keeps those of the images. Only presets that crop use it.

    Returns:
      Its steps; `dataclasses.replace` changes single parts (e.g. partner=()).

    Raises:
      ValueError: for an unknown name.
    """
    return _lookup(image_presets(), name, "augmentation")(size)


def gene_steps(name: str) -> Pipeline:
    """The named augmentation of expression vectors.

    Args:
      name: a key of `gene_presets()`.

    Returns:
      Its steps.

    Raises:
      ValueError: for an unknown name.
    """
    return _lookup(gene_presets(), name, "augmentation of genes")()


def image_presets() -> Mapping[str, Callable[[Size], Recipe]]:
    """All augmentations of images.

    none               nothing
    geometric_only     the geometry of More From Less for all views, alike
    mfl_faithful       More From Less A4, the same steps for all views, independently
    mfl_corrected      A4 with deviations 7, 8, 10, 11, 12 repaired
    hmkd_faithful      flips drawn separately for the two stains (CoCoFNet 2.3, D3)
    hmkd_paired_flips  flips alike for both stains
    stain_jitter       flips and quarter turns alike; stain and colour jitter of the image only
    """
    return {
        "none": lambda size: Recipe((), ()),
        "geometric_only": lambda size: Recipe(mfl_geometry(size), mfl_geometry(size), shared_geometry=True),
        "mfl_faithful": lambda size: Recipe(mfl_faithful(size), mfl_faithful(size)),
        "mfl_corrected": lambda size: Recipe(mfl_corrected(size), mfl_geometry(size), shared_geometry=True),
        "hmkd_faithful": lambda size: Recipe(_flips(), _flips()),
        "hmkd_paired_flips": lambda size: Recipe(_flips(), _flips(), shared_geometry=True),
        "stain_jitter": lambda size: Recipe(stain_jitter(), (*_flips(), QuarterTurns()), shared_geometry=True),
    }


def gene_presets() -> Mapping[str, Callable[[], Pipeline]]:
    """All augmentations of expression vectors.

    genes_none       nothing
    genes_faithful   More From Less B5 as released: masking and unit noise on raw counts (the update changes nothing)
    genes_corrected  log-normalised first, and the update permutes (deviations 21 and 22)
    """
    return {
        "genes_none": lambda: (),
        "genes_faithful": lambda: (MaskGenes(), GaussianNoise()),
        "genes_corrected": lambda: (LogNormalise(), MaskGenes(), PermuteGenes(), GaussianNoise()),
    }


def mfl_geometry(size: Size = None) -> Pipeline:
    """Steps 2, 3, 4 and 7 of More From Less A4."""
    return (*_flips(), RandomCrop(size=size), Rotate(probability=0.4))


def mfl_faithful(size: Size = None) -> Pipeline:
    """More From Less A4, in order; step 6 is off in all released runs."""
    *before, rotation = mfl_geometry(size)
    return (*before, ZerosToNoise(), rotation, Solarise(), Brightness(), *_a4_colour())


def mfl_corrected(size: Size = None) -> Pipeline:
    """A4 with noise after the rotation and thresholds on the scale 0..255 (deviations 7, 8 and 10)."""
    return (*mfl_geometry(size), ZerosToNoise(), Solarise(scale=255.0), Brightness(delta=0.4 * 255), *_a4_colour())


def stain_jitter(sigma: float = 0.05) -> Pipeline:
    """Flips, quarter turns, stain jitter and mild brightness and contrast."""
    light = (Brightness(delta=12.75), Contrast(factor=(0.9, 1.1)))
    return (*_flips(), QuarterTurns(), StainJitter(sigma=sigma), *light, Clip())


def colour_jitter(brightness: float, contrast: float, saturation: float, hue: float) -> Pipeline:
    """Colour jitter in this order, clipped.

    Args:
      brightness: largest change, as a fraction of 255.
      contrast: factor is U[1 - contrast, 1 + contrast).
      saturation: likewise.
      hue: largest shift, in turns.

    Returns:
      Five steps.
    """
    return (
        Brightness(delta=255 * brightness),
        Contrast(factor=(1 - contrast, 1 + contrast)),
        Saturation(factor=(1 - saturation, 1 + saturation)),
        Hue(shift=hue),
        Clip(),
    )


def _flips() -> tuple[Step, ...]:
    return (HorizontalFlip(), VerticalFlip())


def _a4_colour() -> tuple[Step, ...]:
    return (Contrast(), Saturation(), Hue(), Clip())


def _lookup(known: Mapping, name: str, what: str):
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return known[name]
