"""Widths of data that a checkpoint shows, found by asking the key maps instead of writing shapes down again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from histokd_jax.convert.adapters import PARAMS, STATISTICS, Adapter
from histokd_jax.convert.matching import ConversionError, Tensors, plain
from histokd_jax.methods import registry
from histokd_jax.types import DataSpec
from histokd_jax.utils import config as config_utils

# Unlike any width of a layer, and far apart, so that no two axes are confused.
_FEAT_DIM, _NUM_CLASSES, _NUM_GENES = 1031, 5, 1511

Shapes = Mapping[str, tuple[int, ...]]


def fitted(cfg: ConfigDict, feat_dim: int) -> ConfigDict:
    """A copy of the configuration for patches of a width."""
    cfg = config_utils.from_json(config_utils.to_json(cfg))
    cfg.data.feat_dim = feat_dim
    return cfg


def shapes_of(cfg: ConfigDict, spec: DataSpec, statistics: bool = False) -> dict[str, Any]:
    """Parameter group -> tree of shapes; nothing is computed.

    Args:
      cfg: resolved configuration.
      spec: widths.
      statistics: whether a group is {"params", "batch_stats"}, see `Adapter`.
    """
    params, extra = _traced(config_utils.to_json(fitted(cfg, spec.feat_dim)), spec)
    if not statistics:
        return dict(params)
    return {group: {PARAMS: tree, STATISTICS: extra[group]} for group, tree in params.items()}


@functools.lru_cache(maxsize=32)
def _traced(config: str, spec: DataSpec) -> tuple[Any, Any]:
    # Probing asks for the same networks again and again, one file after the other; large ones take seconds to trace.
    cfg = config_utils.from_json(config)
    return jax.eval_shape(registry.get_method(cfg.method)(cfg, spec).init, jax.random.key(0))


def expected(adapter: Adapter, like: Mapping[str, Any], spec: DataSpec) -> dict[str, tuple[int, ...]]:
    """{checkpoint key: shape} of a network.

    Args:
      adapter: its names.
      like: see `shapes_of`.
      spec: widths.
    """
    # The map to the checkpoint is asked for the shapes, so that a layout is written down once. Zeros of a broadcast
    # take no memory.
    groups = {group: like[group] for group in adapter.groups if group in like}
    template = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), groups)
    return {key: tuple(value.shape) for key, value in adapter.to_torch(template, spec).items()}


def data_spec(cfg: ConfigDict, sources: Mapping[str, tuple[Adapter, Tensors, str]]) -> DataSpec:
    """Widths from the tensors, where they show them, else from the configuration; files must agree.

    Args:
      cfg: resolved configuration.
      sources: network -> (its names, its tensors, file for messages).

    Returns:
      The data specification that a model of these checkpoints has.

    Raises:
      ConversionError: a key that shows a width is missing, or two files disagree.
    """
    spec, found = _start(cfg, sources), {}
    for adapter, state, where in sources.values():
        for field, (key, axis) in _probe(cfg, adapter, spec).items():
            value = _size(state, key, axis, adapter.name, where)
            if found.setdefault(field, value) != value:
                raise ConversionError(f"{where}: {adapter.name} has {field} = {value}, another file {found[field]}")
    num_genes = 0 if spec.num_genes == _NUM_GENES else spec.num_genes
    unseen = {"feat_dim": cfg.data.feat_dim or 1024, "num_classes": 2, "num_genes": num_genes}
    return dataclasses.replace(spec, **{**unseen, **found})


def _start(cfg: ConfigDict, sources: Mapping[str, tuple[Adapter, Tensors, str]]) -> DataSpec:
    """Widths for probing; gene groups, task and a number of genes that is a setting are final."""
    spec = DataSpec(_FEAT_DIM, _NUM_CLASSES, _NUM_GENES)
    for adapter, state, where in sources.values():
        spec = dataclasses.replace(spec, task=adapter.task)
        if adapter.genes_in_config:
            spec = dataclasses.replace(spec, num_genes=cfg.genes.top_k)
        if adapter.gene_groups is not None:
            groups = adapter.gene_groups.read(state)
            if not groups:
                pattern = adapter.gene_groups.pattern.replace("\\", "")
                raise ConversionError(f"{where}: not a checkpoint of {adapter.name}: no key like {pattern}")
            spec = dataclasses.replace(spec, gene_groups=groups, num_genes=sum(groups))
    return spec


def _probe(cfg: ConfigDict, adapter: Adapter, spec: DataSpec) -> dict[str, tuple[str, int]]:
    """Field of the specification -> (key, axis) that grows with it."""
    shapes, found = expected(adapter, shapes_of(cfg, spec, adapter.statistics), spec), {}
    for field in ("feat_dim", "num_classes", *(("num_genes",) if spec.num_genes == _NUM_GENES else ())):
        larger = dataclasses.replace(spec, **{field: getattr(spec, field) + 1})
        where = _grown(shapes, expected(adapter, shapes_of(cfg, larger, adapter.statistics), larger))
        if where is not None:
            found[field] = where
    return found


def _grown(before: Shapes, after: Shapes) -> tuple[str, int] | None:
    for key in (key for key in before if key in after):
        for axis, (a, b) in enumerate(zip(before[key], after[key])):
            if b == a + 1:
                return key, axis
    return None


def _size(state: Tensors, key: str, axis: int, name: str, where: str) -> int:
    value = next((v for k, v in state.items() if plain(k) == plain(key)), None)
    if value is None or value.ndim <= axis:
        what = "is missing" if value is None else f"has shape {value.shape}"
        raise ConversionError(f"{where}: not a checkpoint of {name}: {key} {what}")
    return int(value.shape[axis])
