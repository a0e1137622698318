"""Cluster ids of patches, for networks that read the batch field `clusters`: fitted per fold, or from a file."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import clusters, schema
from data_pipelines.assembler import Reader
from data_pipelines.clusters import ClusterModel
from data_pipelines.errors import DataError
from data_pipelines.samples import SEPARATOR

IDS_FILE, CENTRES_FILE = "clusters.npz", "cluster_centres.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class FoldClusters:
    """The clusters of one fold.

    Attributes:
      ids: row of the reader's manifest -> [n_patches] int16, by the batch field `positions`.
      k: number of clusters.
      model: centres, by which new slides are assigned; None where the ids come from a file.
    """

    ids: Mapping[int, np.ndarray]
    k: int
    model: ClusterModel | None

    def write_ids(self, directory: pathlib.Path, reader: Reader) -> None:
        """Writes the ids of every slide (of a sample of several: of all of them in order) to `IDS_FILE`."""
        named = {reader.manifest.slides[row].slide_id: ids for row, ids in self.ids.items()}
        source = {"scope": "file (data.clusters)"} if self.model is None else self.model.source
        clusters.write_clusters(directory / IDS_FILE, named, self.k, source)

    def write_centres(self, directory: pathlib.Path) -> None:
        """Writes the centres to `CENTRES_FILE`; nothing where the ids come from a file."""
        if self.model is not None:
            clusters.write_centres(directory / CENTRES_FILE, self.model)


def number_of(cfg: ConfigDict) -> int:
    """Clusters that the network of a configuration tells apart."""
    return int(cfg.model[cfg.model.name].clusters)


def choose(cfg: ConfigDict, reader: Reader, train_rows: np.ndarray, rows: np.ndarray) -> FoldClusters:
    """The clusters of a fold: those of data.clusters, or fitted on patches of its training part.

    Args:
      cfg: resolved configuration.
      reader: reads the bags of the samples.
      train_rows: rows of the reader's manifest to fit on.
      rows: all rows that the fold reads.

    Returns:
      The clusters.

    Raises:
      DataError: a file that does not fit the data or the network, or too few patches.
    """
    k = number_of(cfg)
    if cfg.data.clusters:
        return FoldClusters(ids_of_file(cfg.data.clusters, k, reader, rows), k, None)
    model = clusters.fit_clusters(reader, [int(row) for row in train_rows], k=k, seed=cfg.seed)
    return FoldClusters(assign(model, reader, rows), k, model)


def assign(model: ClusterModel, reader: Reader, rows: Iterable[int]) -> dict[int, np.ndarray]:
    """Row -> cluster of every patch of its bag, [n_patches] int16."""
    found = {}
    for row in sorted({int(row) for row in rows}):
        bag = np.empty((int(reader.manifest.sizes[row]), reader.manifest.feat_dim), np.float32)
        reader.read_into(row, 0, len(bag), bag)
        found[row] = model.assign(bag).astype(np.int16)
    return found


def ids_of_file(path: str, k: int, reader: Reader, rows: Iterable[int]) -> dict[int, np.ndarray]:
    """Row -> ids that a file gives for its slides, one after the other.

    Raises:
      DataError: not such a file, another number of clusters, or slides that it lacks or knows with other sizes.
    """
    known, found = clusters.read_clusters(path, k), {}
    for row in sorted({int(row) for row in rows}):
        slides = reader.manifest.slides[row].slide_id.split(SEPARATOR)
        absent = [slide for slide in slides if slide not in known]
        if absent:
            raise DataError(
                f"{path} has no clusters of slide {absent[0]!r}: assign them as well, or leave data.clusters empty to "
                "fit clusters on the training part of every fold"
            )
        ids, size = np.concatenate([known[slide] for slide in slides]), int(reader.manifest.sizes[row])
        if len(ids) != size:
            raise DataError(
                f"{path} has {len(ids)} ids of {';'.join(slides)}, the data set {size} patches: made from another one?"
            )
        found[row] = ids.astype(np.int16)
    return found


def of_model(
    cfg: ConfigDict, fields: tuple[str, ...], model: ClusterModel | None, reader: Reader, rows: np.ndarray
) -> dict[int, np.ndarray] | None:
    """Row -> ids for a trained model; None if its mode does not read clusters.

    Raises:
      DataError: the model has no centres, and the file it was trained with does not cover the slides.
    """
    if schema.CLUSTERS not in fields:
        return None
    if model is not None:
        return assign(model, reader, rows)
    return ids_of_file(cfg.data.clusters, number_of(cfg), reader, rows)


def read_centres(directory: pathlib.Path, facts: Mapping[str, Any]) -> ClusterModel | None:
    """The centres of a model folder, if its model.json says that there are some.

    Raises:
      DataError: they are absent or damaged.
    """
    return clusters.read_centres(directory / CENTRES_FILE, facts["clusters"]) if "clusters" in facts else None
