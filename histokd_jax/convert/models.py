"""Checkpoints to model folders, and model folders to checkpoints."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import torch_file
from data_pipelines.survival import TimeBins
from histokd_jax.convert import widths
from histokd_jax.convert.adapters import PARAMS, STATISTICS, Adapter, adapters
from histokd_jax.convert.matching import ConversionError, Matched, Tensors, match, plain
from histokd_jax.tasks.survival import bin_names
from histokd_jax.train import model_dir
from histokd_jax.types import SURVIVAL, DataSpec
from histokd_jax.utils import config as config_utils


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted model.

    Attributes:
      params: parameter group -> tree, float32.
      spec: what it expects of the data, widths as the tensors show them.
      matched: network -> what was taken from its checkpoint.
      extra: parameter group -> running statistics, of networks that keep some.
    """

    params: Mapping[str, Any]
    spec: DataSpec
    matched: Mapping[str, Matched]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def from_checkpoints(cfg: ConfigDict, checkpoints: Mapping[str, pathlib.Path]) -> Converted:
    """Reads the networks of a method from the authors' checkpoints; no code of the files is run.

    Args:
      cfg: resolved configuration: method, network and its options.
      checkpoints: network -> .pt, .pth or .safetensors; "" for the only network of a method.

    Returns:
      The parameters.

    Raises:
      ConversionError: a file does not hold the network; the message names the keys.
      DataError: a file cannot be read.
    """
    known = adapters(cfg)
    chosen = {_network(name, known): path for name, path in checkpoints.items()}
    states = {name: torch_file.read_state_dict(path) for name, path in chosen.items()}
    spec = widths.data_spec(cfg, {name: (known[name], states[name], str(chosen[name])) for name in chosen})
    params, extra, matched = {}, {}, {}
    for name, path in chosen.items():
        adapter = known[name]
        like = widths.shapes_of(cfg, spec, adapter.statistics)
        expected = widths.expected(adapter, like, spec)
        matched[name] = match(
            _without(states[name], adapter.counters), expected, adapter.dead, where=str(path), network=adapter.name
        )
        found = adapter.from_torch(matched[name].tensors, spec)
        trees = {group: _cast(found[group], like[group], group) for group in adapter.groups if group in like}
        own, statistics = _split(adapter, trees)
        params, extra = params | own, extra | statistics
    return Converted(params, spec, matched, extra)


def _without(state: Tensors, counters: Sequence[str]) -> Tensors:
    """The tensors that are no step counters."""
    ignored = set(counters)
    return {key: value for key, value in state.items() if plain(key) not in ignored}


def _split(adapter: Adapter, trees: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and running statistics by group."""
    if not adapter.statistics:
        return dict(trees), {}
    return tuple({group: tree[name] for group, tree in trees.items()} for name in (PARAMS, STATISTICS))


def _network(name: str, known: Mapping[str, Adapter]) -> str:
    if name in known:
        return name
    if name == "" and len(known) == 1:
        return next(iter(known))
    given = f"network {name!r} is unknown" if name else "the method has several networks"
    raise ConversionError(f"{given}: name it as {' or '.join(f'{network}=FILE' for network in known)}")


def _cast(tree: Any, like: Any, group: str) -> Any:
    """Contiguous arrays of our parameter types, after a last comparison of all shapes."""

    def one(path, leaf, value):
        if value.shape != leaf.shape:
            name = jax.tree_util.keystr(path)
            raise ConversionError(f"{group}{name} has shape {value.shape}, expected {leaf.shape}")
        return np.ascontiguousarray(value, leaf.dtype).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, _plain(like), _plain(tree))


def _plain(tree: Any) -> Any:
    return {key: _plain(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def write_model(
    directory: pathlib.Path,
    cfg: ConfigDict,
    converted: Converted,
    *,
    class_names: Sequence[str] = (),
    edges: Sequence[float] = (),
    encoder: Mapping[str, Any] | None = None,
    mpp: float | None = None,
    source: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder that `histokd predict --model` opens.

    Args:
      directory: the folder; must not hold a model.
      cfg: resolved configuration.
      converted: what was read.
      class_names: one per class; default class_0, class_1, ...
      edges: of a survival model with time bins: one more than bins, in months. Checkpoints do not hold them; risks do
        not depend on them, the labels of an evaluation do.
      encoder: facts about the patch encoder of its training, if known.
      mpp: micrometres per pixel of its training patches, if known.
      source: network -> file name, kept in model.json.

    Raises:
      ConversionError: another number of class names or edges, or the folder holds a model.
    """
    if (directory / model_dir.MODEL_FILE).exists():
        raise ConversionError(f"{directory} holds a model already: choose another folder")
    answers = _answers(converted.spec, class_names, edges)
    facts = {
        "method": cfg.method,
        "config": json.loads(config_utils.to_json(widths.fitted(cfg, converted.spec.feat_dim))),
        "spec": dataclasses.asdict(converted.spec),
        **answers,
        "encoder": encoder,
        "mpp": mpp,
        "selections": {},
        "fold": 0,
        "trained_on": {"converted_from": dict(source or {})},
    }
    model_dir.write(directory, converted.params, facts, converted.extra)


def _answers(spec: DataSpec, class_names: Sequence[str], edges: Sequence[float]) -> dict[str, Any]:
    """Entries of model.json about what the outputs mean."""
    if spec.task == SURVIVAL:
        if len(edges) != spec.num_classes + 1:
            raise ConversionError(
                f"{len(edges)} edges of time bins, but {spec.num_classes} bins have {spec.num_classes + 1}: give those "
                "of the training cohort with --edges, in months; a checkpoint does not hold them"
            )
        bins = TimeBins(tuple(float(edge) for edge in edges))
        return {"class_names": list(bin_names(bins)), "task": {"edges": list(bins.edges)}}
    names = list(class_names) or [f"class_{k}" for k in range(spec.num_classes)]
    if len(names) != spec.num_classes:
        raise ConversionError(f"{len(names)} class names {names} for {spec.num_classes} outputs")
    return {"class_names": names}


def to_checkpoint(directory: pathlib.Path, network: str = "") -> Tensors:
    """The tensors of a network of a model folder under the authors' names.

    Args:
      directory: a model folder.
      network: as in NETWORK=FILE; "" for the only one that the folder holds.

    Returns:
      {key: array}, in the layout of the checkpoint. Tensors that the authors' code stores and never uses are absent.

    Raises:
      ConversionError: no published names, or the folder holds several networks and none was named.
      CheckpointMismatchError: no model, or damaged.
    """
    facts = model_dir.read_facts(directory)
    cfg, spec, method = model_dir.rebuild(facts)
    known = adapters(cfg)
    present = [name for name in known if any((directory / group).is_dir() for group in known[name].groups)]
    if network and network not in known:
        raise ConversionError(f"network {network!r} is unknown; {directory} holds {present}")
    if not network and len(present) != 1:
        raise ConversionError(f"{directory} holds the networks {present}: choose one with --network")
    adapter = known[network or present[0]]
    groups = [group for group in adapter.groups if group in facts["params_sha256"]]
    params, extra = model_dir.read_groups(directory, facts, method, groups)
    if adapter.statistics:
        params = {group: {PARAMS: tree, STATISTICS: extra[group]} for group, tree in params.items()}
    tensors = adapter.to_torch(jax.tree.map(np.asarray, params), spec)
    return {**tensors, **{key: np.zeros((), np.int64) for key in adapter.counters}}
