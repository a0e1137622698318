"""Shapes of the steps of bags: one for all folds, and one that the mesh divides."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jax.sharding import Mesh
from ml_collections import ConfigDict

from histokd_jax.train import sharding

if TYPE_CHECKING:
    from histokd_jax.train.experiment import FoldData


def share_shapes(folds: list[FoldData]) -> list[FoldData]:
    """Gives the steps of all folds one row length, so that one compiled program serves them; empty chunks are free."""

    def longest(sources):
        return max(source.plan.row_patches for source in sources)

    def stretch(source, length):
        return dataclasses.replace(source, plan=dataclasses.replace(source.plan, row_patches=length))

    train = longest(fold.train for fold in folds)
    evaluation = longest(source for fold in folds for source in fold.evaluation.values())
    return [
        dataclasses.replace(
            fold,
            train=stretch(fold.train, train),
            evaluation={part: stretch(source, evaluation) for part, source in fold.evaluation.items()},
        )
        for fold in folds
    ]


def check_mesh(mesh: Mesh, cfg: ConfigDict, data: FoldData) -> None:
    """Refuses, before anything is compiled, a mesh that does not divide the steps."""
    if cfg.train.batching == "grad_cache" and mesh.shape[sharding.DATA] > 1:
        raise ValueError(
            f"train.batching=grad_cache holds one row at a time, which mesh.data={mesh.shape[sharding.DATA]} devices "
            "cannot divide: set mesh.data=1 (mesh.sequence may divide the row), or train.batching=packed"
        )
    for source in (data.train, *data.evaluation.values()):
        sharding.check_divides(mesh, source.plan.rows, source.plan.row_patches)
