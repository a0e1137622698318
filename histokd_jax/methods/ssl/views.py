"""What every branch sees: the privileged source, augmentation of each branch, scale of the pixels (A4, B5, B9)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from histokd_jax.methods.ssl.layout import IMAGE, PARTNER, Layout
from histokd_jax.ops.image import presets
from histokd_jax.ops.image.augment import Pipeline, augment, check_shared
from histokd_jax.ops.image.steps_colour import Brightness, Clip, Contrast, Hue, Saturation, Solarise, ZerosToNoise
from histokd_jax.ops.image.steps_vector import GaussianNoise, LogNormalise, MaskGenes, PermuteGenes
from histokd_jax.types import Batch

REAL, BLANK, SHUFFLED, NOISE = "real", "blank", "shuffled", "noise"
SOURCES = (REAL, BLANK, SHUFFLED, NOISE)
A4 = "a4"
FULL, GEOMETRIC_ONLY, NO_AUGMENT = "full", "geometric_only", "none"
PRIVILEGED_AUGMENT = (FULL, GEOMETRIC_ONLY, NO_AUGMENT)
BEFORE_ROTATION, AFTER_ROTATION = "before_rotation", "after_rotation"
AUGMENTED, PLAIN = "augmented", "plain"
NO_UPDATE, PERMUTE = "none", "permute"
RAW, AFTER_LOG = "raw", "after_log"
STANDARDISED = "standardised"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EVALUATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Views:
    """How a step becomes the inputs of the branches.

    Attributes:
      layout: the branches.
      pipelines: augmentation of every branch in training.
      shared_geometry: whether all branches of an example are moved alike.
      source: what stands in the place of the privileged view, one of `SOURCES`.
      blank: the value of a blank view.
      input: "raw" 0..255 (as released), or "standardised" (deviation 9).
      validation: "augmented" (as released) or "plain" (deviation 13).
      vector_size: length of the privileged vectors; 0: images.
    """

    layout: Layout
    pipelines: tuple[Pipeline, ...]
    shared_geometry: bool = False
    source: str = REAL
    blank: float = 128.0
    input: str = RAW
    validation: str = AUGMENTED
    vector_size: int = 0

    def __post_init__(self) -> None:
        """Refuses to share a geometry that differs between the views."""
        if self.shared_geometry:
            check_shared([p for name, p in zip(self.layout.inputs, self.pipelines) if not self.is_vector(name)])

    def is_vector(self, name: str) -> bool:
        """Whether a field holds vectors."""
        return name == PARTNER and self.vector_size > 0


def image_recipe(settings: Any) -> presets.Recipe:
    """Augmentation of images: steps of the primary and of the privileged view, and whether they are moved alike.

    Args:
      settings: section `augment` of a configuration: preset "a4" with its switches, or one of `ops.image.presets`, of
        which `shared_geometry` alone can be changed, to True.
    """
    if settings.preset != A4:
        recipe = presets.recipe(settings.preset)
        return dataclasses.replace(recipe, shared_geometry=recipe.shared_geometry or settings.shared_geometry)
    full = a4(settings.solarise_scale, settings.brightness, settings.noise)
    privileged = {FULL: full, GEOMETRIC_ONLY: presets.mfl_geometry(), NO_AUGMENT: ()}[settings.privileged]
    return presets.Recipe(full, privileged, settings.shared_geometry)


def a4(solarise_scale: float, brightness: float, noise: str) -> Pipeline:
    """The steps of A4 in order, without the pictures of step 6, which are off in all released runs.

    Args:
      solarise_scale: factor of the threshold of step 8: 1 as released, 255 corrected (deviation 7).
      brightness: largest change of step 9 in grey levels: 0.4 as released, 102 corrected (deviation 8).
      noise: place of step 5, "before_rotation" or "after_rotation" (deviation 10).
    """
    *before, rotation = presets.mfl_geometry()
    moved = (*before, ZerosToNoise(), rotation) if noise == BEFORE_ROTATION else (*before, rotation, ZerosToNoise())
    colour = (Solarise(scale=solarise_scale), Brightness(delta=brightness), Contrast(), Saturation(), Hue(), Clip())
    return (*moved, *colour)


def vector_pipeline(settings: Any) -> Pipeline:
    """Augmentation of expression vectors (B5): masking, the update as released (nothing) or as intended, noise."""
    log = (LogNormalise(),) if settings.gene_noise == AFTER_LOG else ()
    update = (PermuteGenes(),) if settings.gene_update == PERMUTE else ()
    if settings.privileged == NO_AUGMENT:
        return log
    return (*log, MaskGenes(), *update, GaussianNoise())


def make_views(
    views: Views, key: jax.Array | None, batch: Batch, train: bool
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Inputs of all branches.

    Args:
      views: how.
      key: of the step; None draws what every evaluation draws, so that its losses can be compared between epochs.
      batch: "image", "partner" and "has_partner" as the layout needs them, "example", "weight".
      train: validation may be plain.

    Returns:
      (per branch [B, H, W, 3] or [B, P] float32, per branch [B] bool: whether the view is real).

    Raises:
      ValueError: images that are no 8-bit RGB, or vectors of another length.
    """
    key = jax.random.key(_EVALUATION_SEED) if key is None else key
    source_key, augment_key = jax.random.split(key)
    real = batch["weight"] > 0
    found = {}
    if IMAGE in views.layout.inputs:
        check_images(IMAGE, batch[IMAGE])
        found[IMAGE] = batch[IMAGE], real
    if views.layout.reads_partner():
        check_partner(views, batch[PARTNER])
        view, has = privileged_source(views, source_key, batch)
        found[PARTNER] = view, has & real
    pipelines = views.pipelines if train or views.validation == AUGMENTED else tuple(map(plain, views.pipelines))
    moved = []
    for branch, (name, pipeline) in enumerate(zip(views.layout.inputs, pipelines)):
        shared = views.shared_geometry and not views.is_vector(name)
        x = augment(augment_key, batch["example"], found[name][0], pipeline, branch=branch, shared_geometry=shared)
        moved.append(_scaled(views, x))
    return tuple(moved), tuple(found[name][1] for name in views.layout.inputs)


def plain(pipeline: Pipeline) -> Pipeline:
    """What is left of a pipeline without anything random: the transform of counts."""
    return tuple(step for step in pipeline if isinstance(step, LogNormalise))


def privileged_source(views: Views, key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The privileged view or what stands in its place (B9, `privileged_source`).

    A shuffled pairing is drawn anew for every step: each image meets the view of another example of its step.

    Returns:
      (view [B, ...], [B] bool whether there is one).
    """
    view, has = batch[PARTNER], batch["has_partner"]
    if views.source == BLANK:
        return jnp.full_like(view, views.blank if not views.vector_size else 0.0), has
    if views.source == NOISE:
        return jax.vmap(lambda n, x: _noise(jax.random.fold_in(key, n), x))(batch["example"], view), has
    if views.source == SHUFFLED:
        # One cycle through all examples: nobody keeps its own view.
        order = jax.random.permutation(key, len(view))
        giver = jnp.zeros_like(order).at[order].set(jnp.roll(order, -1))
        return view[giver], has[giver]
    return view, has


def _noise(key: jax.Array, like: jax.Array) -> jax.Array:
    if like.dtype == jnp.uint8:
        return jax.random.randint(key, like.shape, 0, 256).astype(jnp.uint8)
    return jax.random.normal(key, like.shape, like.dtype)


def _scaled(views: Views, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    if views.input == RAW or x.ndim == 2:
        return x
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, STD))
    return (x / 255.0 - mean) / std


def check_images(name: str, images: jax.Array) -> None:
    """Refuses what is no batch of 8-bit RGB images.

    Raises:
      ValueError: showing shape and type.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{name} must be [B, H, W, 3] uint8, got {images.shape} {images.dtype}")


def check_partner(views: Views, partner: jax.Array) -> None:
    """Refuses privileged views of another kind or length than the networks were built for.

    Raises:
      ValueError: showing what was expected and what came.
    """
    if not views.vector_size:
        check_images(PARTNER, partner)
    elif partner.ndim != 2 or partner.shape[1] != views.vector_size:
        raise ValueError(
            f"privileged vectors must be [B, {views.vector_size}], as in training; got {partner.shape}: give a data "
            "set with vectors of the same columns"
        )
