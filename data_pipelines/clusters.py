"""Cluster ids of patches for DeepAttnMISL (survival_baselines, section 5): k-means on patches of training slides.

How the published clusters were fitted is not in the authors' repository. Here: mini-batch k-means on a random sample of
the patches of a fold's *training* slides; every patch of every slide then belongs to the nearest centre. With
`assign_per_slide` each slide has clusters of its own, which need no training slides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import atomic
from data_pipelines.errors import DataError
from data_pipelines.reader import BagReader

SAMPLE = 100_000
_BLOCK = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class ClusterModel:
    """Centres and where they come from.

    Attributes:
      centres: [k, D] float32.
      source: JSON-able facts: slides, sampled patches, seed.
    """

    centres: np.ndarray
    source: Mapping[str, Any]

    def assign(self, patches: np.ndarray) -> np.ndarray:
        """The nearest centre of every patch, the first of equals.

        Args:
          patches: [n, D] float.

        Returns:
          [n] int32 in [0, k).

        Raises:
          DataError: patches of another width.
        """
        if patches.ndim != 2 or patches.shape[1] != self.centres.shape[1]:
            raise DataError(
                f"patches have shape {patches.shape}, but the clusters were fitted on embeddings of width "
                f"{self.centres.shape[1]}: use the same patch encoder, or fit the clusters again"
            )
        # |x - c|^2 without |x|^2, which is the same for every centre.
        centres = self.centres.astype(np.float64)
        offset = 0.5 * np.sum(centres**2, axis=1)
        out = np.empty(len(patches), np.int32)
        for start in range(0, len(patches), _BLOCK):
            block = patches[start : start + _BLOCK].astype(np.float64)
            out[start : start + _BLOCK] = np.argmin(offset - block @ centres.T, axis=1)
        return out


def sample_patches(reader: BagReader, slides: Sequence[int], count: int, seed: int = 0) -> np.ndarray:
    """About `count` patches, as many of every slide as its bag allows.

    Args:
      reader: the data set.
      slides: rows of the manifest.
      count: patches in all.
      seed: chooses the part of every bag; patches are stored in random order, so any run of them is a random sample.

    Returns:
      [n, D] float32, n <= count rounded up to whole patches per slide.

    Raises:
      DataError: no slides.
    """
    if not len(slides):
        raise DataError("clusters: there are no slides to sample patches from; check the split")
    rng, each = np.random.default_rng(seed), -(-count // len(slides))
    parts = []
    for slide in slides:
        size = reader.manifest.slides[slide].n_patches
        part = np.empty((min(each, size), reader.manifest.feat_dim), np.float32)
        reader.read_into(int(slide), int(rng.integers(size)), len(part), part)
        parts.append(part)
    return np.concatenate(parts)


def fit_centres(patches: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Centres of mini-batch k-means.

    Args:
      patches: [n, D] float.
      k: number of clusters.
      seed: of the initial centres and of the mini-batches.

    Returns:
      [k, D] float32.

    Raises:
      DataError: fewer patches than clusters, or k below 1.
    """
    from sklearn.cluster import MiniBatchKMeans  # slow to import, and only needed here

    if not 1 <= k <= len(patches):
        raise DataError(f"{len(patches)} patches cannot form k = {k} clusters: give 1 <= k <= number of patches")
    model = MiniBatchKMeans(k, random_state=seed, n_init=3, batch_size=4096).fit(np.asarray(patches, np.float32))
    return np.asarray(model.cluster_centers_, np.float32)


def fit_clusters(
    reader: BagReader, train_slides: Sequence[int], *, k: int = 10, sample: int = SAMPLE, seed: int = 0
) -> ClusterModel:
    """Clusters of a fold, fitted on its training slides only.

    Args:
      reader: the data set.
      train_slides: rows of the manifest.
      k: number of clusters.
      sample: patches to fit on, see `sample_patches`.
      seed: of sample and fit.

    Returns:
      The model.

    Raises:
      DataError: no slides, or fewer patches than clusters.
    """
    patches = sample_patches(reader, train_slides, sample, seed)
    slides = [reader.manifest.slides[slide].slide_id for slide in train_slides]
    source = {"scope": "training slides", "slides": slides, "patches": len(patches), "seed": seed, "k": k}
    return ClusterModel(fit_centres(patches, k, seed), source)


def assign_clusters(reader: BagReader, slides: Iterable[int], model: ClusterModel) -> dict[str, np.ndarray]:
    """Cluster ids of every patch of some slides.

    Args:
      reader: the data set.
      slides: rows of the manifest.
      model: see `fit_clusters`.

    Returns:
      {slide id: [n] int32 in stored order, i.e. by the batch field `positions`}.

    Raises:
      DataError: embeddings of another width than the model's.
    """
    return {reader.manifest.slides[slide].slide_id: model.assign(reader.read_bag(int(slide))[0]) for slide in slides}


def assign_per_slide(reader: BagReader, slides: Iterable[int], *, k: int = 10, seed: int = 0) -> dict[str, np.ndarray]:
    """Cluster ids from a fit of every slide on its own patches.

    Args:
      reader: the data set.
      slides: rows of the manifest.
      k: number of clusters; a slide with fewer patches has one cluster per patch.
      seed: of every fit.

    Returns:
      As `assign_clusters`.
    """
    found = {}
    for slide in slides:
        bag = reader.read_bag(int(slide))[0].astype(np.float32)
        own = ClusterModel(fit_centres(bag, min(k, len(bag)), seed), {})
        found[reader.manifest.slides[slide].slide_id] = own.assign(bag)
    return found


def write_clusters(
    path: str | os.PathLike[str], clusters: Mapping[str, np.ndarray], k: int, source: Mapping[str, Any] | None = None
) -> None:
    """Writes cluster ids of slides as one NPZ file, complete or not at all.

    Args:
      path: of the file.
      clusters: {slide id: [n] ids in [0, k)}.
      k: number of clusters.
      source: JSON-able facts to keep beside them.

    Raises:
      DataError: ids outside [0, k), naming the slide.
      StorageError: the file cannot be written.
    """
    for slide, ids in clusters.items():
        _check_ids(slide, ids, k, path)
    path, buffer = pathlib.Path(path), io.BytesIO()
    names = sorted(clusters)
    np.savez_compressed(
        buffer,
        slide_id=np.array(names, str),
        size=np.array([len(clusters[n]) for n in names], np.int64),
        cluster=np.concatenate([np.asarray(clusters[n], np.int16) for n in names]) if names else np.zeros(0, np.int16),
        k=np.int64(k),
        source=np.array(json.dumps(dict(source or {}))),
    )
    with atomic.storage_errors(path):
        os.replace(atomic.write_temporary(path.parent, path.name, buffer.getvalue()), path)
        atomic.sync(path.parent)


def read_clusters(path: str | os.PathLike[str], k: int | None = None) -> dict[str, np.ndarray]:
    """Reads what `write_clusters` wrote.

    Args:
      path: of the file.
      k: number of clusters that the network has; None for any.

    Returns:
      {slide id: [n] int32}.

    Raises:
      DataError: no such file, not a cluster file, or another number of clusters.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            names, size, cluster, found = (data[key] for key in ("slide_id", "size", "cluster", "k"))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a file of cluster ids ({error}); write one with write_clusters") from error
    if k is not None and int(found) != k:
        raise DataError(f"{path} has {int(found)} clusters, the network {k}: fit again, or set the number of clusters")
    parts = np.split(cluster.astype(np.int32), np.cumsum(size)[:-1]) if len(names) else []
    return dict(zip(names.tolist(), parts))


def write_centres(path: str | os.PathLike[str], model: ClusterModel) -> None:
    """Writes the centres of a model as one NPZ file, complete or not at all.

    Raises:
      StorageError: the file cannot be written.
    """
    path, buffer = pathlib.Path(path), io.BytesIO()
    np.savez(buffer, centres=model.centres, source=np.array(json.dumps(dict(model.source))))
    with atomic.storage_errors(path):
        os.replace(atomic.write_temporary(path.parent, path.name, buffer.getvalue()), path)
        atomic.sync(path.parent)


def centres_facts(model: ClusterModel) -> dict[str, Any]:
    """What `read_centres` compares: number of clusters and sha256 of the centres."""
    return {"k": len(model.centres), "sha256": hashlib.sha256(np.ascontiguousarray(model.centres)).hexdigest()}


def read_centres(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> ClusterModel:
    """Reads what `write_centres` wrote.

    Args:
      path: of the file.
      facts: `centres_facts` of the model that was written.

    Returns:
      The model.

    Raises:
      DataError: no such file, or other centres.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            model = ClusterModel(data["centres"], json.loads(str(data["source"])))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a file of cluster centres ({error}); it belongs to the model folder") from error
    if centres_facts(model) != dict(facts):
        raise DataError(f"{path} differs from what the model was trained with: damaged, or of another model")
    return model


def _check_ids(slide: str, ids: np.ndarray, k: int, path: str | os.PathLike[str]) -> None:
    ids = np.asarray(ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids.size and not 0 <= ids.min() <= ids.max() < k):
        raise DataError(f"{path}: cluster ids of slide {slide!r} must be a list of integers in [0, {k})")
