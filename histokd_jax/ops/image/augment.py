"""Pipelines of steps over a batch, inside the jitted training step.

The numbers of an example depend on (key, example, branch, place of the step) and on nothing else: not on its place in
the batch, the other examples or the number of devices. Geometric steps draw from a stream of their own, counted among
the geometric steps only, so that two views can share it although one of them has further colour steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from histokd_jax.ops.image.steps import Step, units

Pipeline = tuple[Step, ...]
_MOST_STEPS = 1 << 10


def augment(
    key: jax.Array,
    example: jax.Array,
    images: jax.Array,
    pipeline: Pipeline,
    *,
    branch: int = 0,
    shared_geometry: bool = False,
) -> jax.Array:
    """Augments a batch.

    Args:
      key: typed PRNG key of the step of training, the same on all devices.
      example: [B] int32, number of each example in the data set.
      images: [B, H, W, C] uint8 or float on 0..255; [B, K] for steps of vectors.
      pipeline: steps in order; empty returns the images as they are.
      branch: number of the view: views of an example draw independently.
      shared_geometry: geometric steps draw alike in all branches that set this (and have the same ones in the same
        order, see `check_shared`).

    Returns:
      [B, ...] in the dtype of the last step.

    Raises:
      ValueError: if `example` does not fit, or a step refuses the shape.
    """
    if example.shape != images.shape[:1]:
        raise ValueError(f"example has the shape {example.shape}, images {images.shape}: expected one number per image")

    def one(number, image):
        return augment_one(jax.random.fold_in(key, number), image, pipeline, branch, shared_geometry)

    return jax.vmap(one)(example, images) if pipeline else images


def augment_views(
    key: jax.Array,
    example: jax.Array,
    views: Sequence[jax.Array],
    pipelines: Sequence[Pipeline],
    *,
    shared_geometry: bool = False,
) -> tuple[jax.Array, ...]:
    """Augments several views of the same examples; view i is branch i of `augment`.

    Args:
      key: as for `augment`.
      example: [B] int32.
      views: arrays [B, ...]; the same array may occur more than once.
      pipelines: one for each view.
      shared_geometry: whether all views are moved alike.

    Returns:
      The augmented views.

    Raises:
      ValueError: if the numbers of views and pipelines differ, or their geometric steps when these are shared.
    """
    if len(views) != len(pipelines):
        raise ValueError(f"{len(views)} views and {len(pipelines)} pipelines: expected one pipeline for each view")
    if shared_geometry:
        check_shared(pipelines)
    return tuple(
        augment(key, example, images, pipeline, branch=branch, shared_geometry=shared_geometry)
        for branch, (images, pipeline) in enumerate(zip(views, pipelines))
    )


def augment_one(
    key: jax.Array, image: jax.Array, pipeline: Pipeline, branch: int = 0, shared_geometry: bool = False
) -> jax.Array:
    """Augments one example: `key` is that of the example.

    Args:
      key: fold_in(key of the training step, number of the example).
      image: [H, W, C] or [K].
      pipeline: steps in order.
      branch: number of the view.
      shared_geometry: as for `augment`.

    Returns:
      The augmented image.
    """
    keys = step_keys(key, pipeline, branch, shared_geometry)
    # One draw for the single numbers of all steps: each further one is a cipher of its own in the compiled program.
    drawn = jax.vmap(units)(keys)
    for i, step in enumerate(pipeline):
        if not step.pointwise:
            # Fused with this one, the steps before it would be computed anew for every pixel that it fetches.
            image = jax.lax.optimization_barrier(image)
        image = step.run(drawn[i], keys[i], image)
    return image


def step_keys(key: jax.Array, pipeline: Pipeline, branch: int = 0, shared_geometry: bool = False) -> jax.Array:
    """The key of every step for one example, [len(pipeline)]; arguments as for `augment_one`."""
    codes, places = [], {False: 0, True: 0}
    for step in pipeline:
        stream = 2 * branch + 1 if not step.geometric else 0 if shared_geometry else 2 * branch + 2
        codes.append(stream * _MOST_STEPS + places[step.geometric])
        places[step.geometric] += 1
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(codes, np.uint32))


def check_shared(pipelines: Sequence[Pipeline]) -> None:
    """Refuses pipelines whose geometric steps differ: sharing their draws would not align the views.

    Raises:
      ValueError: showing both lists.
    """
    moves = [tuple(step for step in pipeline if step.geometric) for pipeline in pipelines]
    for branch, own in enumerate(moves):
        if own != moves[0]:
            raise ValueError(
                f"shared geometry needs the same geometric steps in all views: view 0 has {moves[0]}, view {branch} "
                f"has {own}"
            )
