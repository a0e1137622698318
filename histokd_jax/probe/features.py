"""Frozen features: images of labelled patches through an encoder, plain or augmented, and scaling per fold."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.labelled.patches import LabelledPatches
from histokd_jax.embed.embedder import Compute, Embedder, embed_function
from histokd_jax.encoders.loading import LoadedEncoder
from histokd_jax.ops.image import augment
from histokd_jax.ops.image.steps import Step

Pipeline = tuple[Step, ...]
Progress = Callable[[int], None]
"""Called with the number of patches that were embedded since the last call."""
_GROUP = 32
"""Images that the readers decode ahead, times the number of threads."""


def embed_patches(
    loaded: LoadedEncoder,
    patches: LabelledPatches,
    compute: Compute,
    *,
    threads: int = 2,
    progress: Progress | None = None,
) -> np.ndarray:
    """Embeddings of all patches, in inference mode (running averages of batch norms, A6).

    Args:
      loaded: the encoder.
      patches: with images; those that are not square are cropped to their centre.
      compute: batch, dtype and devices; the last batch of every image size is filled up.
      threads: that decode.
      progress: called after every step.

    Returns:
      [n, features] float32.

    Raises:
      DataError: an image cannot be read, or its embedding is not finite; names it.
    """
    engine = Embedder(loaded, compute)
    return _embed(lambda tiles, _: engine(tiles), engine.features, engine.batch, patches, threads, progress)


def embed_views(
    loaded: LoadedEncoder, patches: LabelledPatches, compute: Compute, pipeline: Pipeline, views: int, seed: int,
    *, threads: int = 2, progress: Progress | None = None,
) -> np.ndarray:  # fmt: skip
    """Embeddings of augmented views: what a probe sees in one epoch each.

    Args:
      loaded, patches, compute, threads, progress: see `embed_patches`.
      pipeline: augmentation of images on 0..255.
      views: V, how many views of every patch.
      seed: of the augmentation.

    Returns:
      [V, n, features] float32. The view of a patch depends on (seed, view, patch) only.
    """
    embed = embed_function(loaded.encoder, compute)

    @jax.jit
    def step(variables, tiles, numbers, key):
        return embed(variables, augment.augment(key, numbers, tiles.astype(jnp.float32), pipeline))

    variables, found = jax.device_put(loaded.variables), []
    for view in range(views):
        key = jax.random.fold_in(jax.random.key(seed), view)
        run = lambda tiles, rows, key=key: step(variables, tiles, jnp.asarray(rows, jnp.int32), key)  # noqa: E731
        found.append(_embed(run, loaded.encoder.features, compute.batch, patches, threads, progress))
    return np.stack(found)


def _embed(
    run, width: int, batch: int, patches: LabelledPatches, threads: int, progress: Progress | None
) -> np.ndarray:
    out = np.empty((len(patches), width), np.float32)
    pending: tuple[list[int], jax.Array] | None = None
    for rows, tiles in batches(decoded(patches, range(len(patches)), threads), batch):
        padded = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows))])
        tiles = np.concatenate([tiles, np.zeros((batch - len(tiles), *tiles.shape[1:]), np.uint8)])
        started = (rows, run(tiles, padded))
        _collect(out, pending, progress)
        pending = started
    _collect(out, pending, progress)
    bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
    if len(bad):
        raise DataError(
            f"{patches.name}: the embedding of {patches.ids[bad[0]]!r} (and {len(bad) - 1} more) is not finite"
        )
    return out


def _collect(out: np.ndarray, pending, progress: Progress | None) -> None:
    if pending is None:
        return
    rows, values = pending
    out[rows] = np.asarray(values)[: len(rows)]
    if progress is not None:
        progress(len(rows))


def decoded(patches: LabelledPatches, rows: Iterable[int], threads: int) -> Iterator[tuple[int, np.ndarray]]:
    """(row, uint8 square image), decoded a bounded number of images ahead."""
    rows = list(rows)
    with ThreadPoolExecutor(threads) as pool:
        ahead: collections.deque = collections.deque()
        for row in rows:
            ahead.append((row, pool.submit(lambda r=row: square(patches.read(r)))))
            if len(ahead) > _GROUP * threads:
                first, future = ahead.popleft()
                yield first, future.result()
        for row, future in ahead:
            yield row, future.result()


def batches(images: Iterable[tuple[int, np.ndarray]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, [<= size, e, e, 3] images of one edge e): a program compiled for one edge serves all its images."""
    waiting: dict[int, list[tuple[int, np.ndarray]]] = collections.defaultdict(list)
    for row, image in images:
        same = waiting[len(image)]
        same.append((row, image))
        if len(same) == size:
            yield _stacked(same)
            same.clear()
    for same in waiting.values():
        if same:
            yield _stacked(same)


def _stacked(same: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row for row, _ in same]), np.stack([image for _, image in same])


def square(image: np.ndarray) -> np.ndarray:
    """The largest centred square of [H, W, 3]."""
    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return image[top : top + edge, left : left + edge]


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """Standardisation of features by the training part of a fold.

    Attributes:
      mean: [D] float64; absent values (NaN) become it.
      divisor: [D] float64 deviations; infinite for constant columns, which become 0.
    """

    mean: np.ndarray
    divisor: np.ndarray

    def filled(self, features: np.ndarray) -> np.ndarray:
        """[..., D] features whose absent values are the mean, float32."""
        return np.where(np.isnan(features), self.mean, features).astype(np.float32)

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """[..., D] float32, centred and divided."""
        return ((np.where(np.isnan(features), self.mean, features) - self.mean) / self.divisor).astype(np.float32)


def scale_of(features: np.ndarray, train: np.ndarray) -> Scale:
    """Mean and deviation of the training part, whatever fraction of its labels is known: this needs no labels.

    Args:
      features: [n, D], may hold NaN.
      train: training rows.
    """
    own = np.asarray(features[train], np.float64)
    mean = _nanmean(own)
    deviation = np.sqrt(_nanmean((own - mean) ** 2))
    # A column that is constant but for rounding would be blown up.
    usable = deviation > 1e-6 * np.maximum(np.abs(mean), 1e-6)
    return Scale(mean, np.where(usable, deviation, np.inf))


def _nanmean(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    return np.where(known, values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
