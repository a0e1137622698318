"""Kinds of training data by the name that configurations give (`data.kind`): bags of patches, or image pairs.

The loop, the evaluation and the run directory do not know which kind they work on; whatever differs is a function of
the kind's module.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ml_collections import ConfigDict

BAGS, PAIRS = "bags", "pairs"
TRAINING = {BAGS: "histokd_jax.train.experiment", PAIRS: "histokd_jax.train.pair_experiment"}
"""Kind -> module with `open_manifest(directory)`, `resolve(cfg)`, `load_experiment(cfg)`, `fold_data(experiment, fold,
method)`, `share_shapes(folds)`, `check_mesh(mesh, cfg, fold_data)` and `make_feeder(cfg, mesh, sources, cache)`."""
NEW_DATA = {BAGS: "histokd_jax.train.new_bags", PAIRS: "histokd_jax.train.new_pairs"}
"""Kind -> module with `open_new(model, mode, directory, **tables) -> NewData`, the input of a trained model."""


def kind_of(cfg: ConfigDict) -> str:
    """`data.kind` of a configuration; those that do not give it read bags.

    Raises:
      ValueError: it is unknown.
    """
    kind = cfg.data.get("kind", BAGS)
    if kind not in TRAINING:
        raise ValueError(f"data.kind={kind!r} is unknown; choose one of {tuple(TRAINING)}")
    return kind


def training(cfg: ConfigDict) -> ModuleType:
    """The module of `TRAINING` that a configuration needs."""
    return importlib.import_module(TRAINING[kind_of(cfg)])


def new_data(cfg: ConfigDict) -> ModuleType:
    """The module of `NEW_DATA` that a configuration needs."""
    return importlib.import_module(NEW_DATA[kind_of(cfg)])
