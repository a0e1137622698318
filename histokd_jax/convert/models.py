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
from histokd_jax.convert.adapters import Adapter, adapters
from histokd_jax.convert.matching import ConversionError, Matched, Tensors, match
from histokd_jax.methods import registry
from histokd_jax.train import model_dir
from histokd_jax.types import DataSpec
from histokd_jax.utils import config as config_utils


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted model.

    Attributes:
      params: parameter group -> tree, float32.
      spec: what it expects of the data, widths as the tensors show them.
      matched: parameter group -> what was taken from its checkpoint.
    """

    params: Mapping[str, Any]
    spec: DataSpec
    matched: Mapping[str, Matched]


def from_checkpoints(cfg: ConfigDict, checkpoints: Mapping[str, pathlib.Path]) -> Converted:
    """Reads the networks of a method from the authors' checkpoints; no code of the files is run.

    Args:
      cfg: resolved configuration: method, network and its options.
      checkpoints: parameter group -> .pt, .pth or .safetensors; "" for the only network of a method.

    Returns:
      The parameters.

    Raises:
      ConversionError: a file does not hold the network; the message names the keys.
      DataError: a file cannot be read.
    """
    known = adapters(cfg)
    chosen = {_group(name, known): path for name, path in checkpoints.items()}
    states = {group: torch_file.read_state_dict(path) for group, path in chosen.items()}
    spec = _spec(cfg, {group: (known[group], states[group], str(chosen[group])) for group in chosen})
    like, _ = jax.eval_shape(registry.get_method(cfg.method)(cfg, spec).init, jax.random.key(0))
    params, matched = {}, {}
    for group, path in chosen.items():
        matched[group] = match(
            states[group],
            _expected(known[group], like[group]),
            known[group].dead,
            where=str(path),
            network=known[group].name,
        )
        params[group] = _cast(known[group].from_torch(matched[group].tensors), like[group], group)
    return Converted(params, spec, matched)


def _group(name: str, known: Mapping[str, Adapter]) -> str:
    if name in known:
        return name
    if name == "" and len(known) == 1:
        return next(iter(known))
    given = f"network {name!r} is unknown" if name else "the method has several networks"
    raise ConversionError(f"{given}: name it as {' or '.join(f'{group}=FILE' for group in known)}")


def _spec(cfg: ConfigDict, sources: Mapping[str, tuple[Adapter, Tensors, str]]) -> DataSpec:
    """Widths from the tensors, where they show them, else from the configuration; files must agree."""
    found: dict[str, int] = {}
    for adapter, state, where in sources.values():
        for field in adapter.sizes:
            value = adapter.size(state, field, where)
            if found.setdefault(field, value) != value:
                raise ConversionError(f"{where}: {adapter.name} has {field} = {value}, another file {found[field]}")
    num_genes = cfg.genes.top_k if "genes" in cfg else 0
    return DataSpec(**{"feat_dim": cfg.data.feat_dim or 1024, "num_classes": 2, "num_genes": num_genes, **found})


def _expected(adapter: Adapter, like: Any) -> dict[str, tuple[int, ...]]:
    # The map to the checkpoint is asked for the shapes, so that a layout is written down once. Zeros of a broadcast
    # take no memory.
    template = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)
    return {key: tuple(value.shape) for key, value in adapter.to_torch(template).items()}


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
      encoder: facts about the patch encoder of its training, if known.
      mpp: micrometres per pixel of its training patches, if known.
      source: parameter group -> file name, kept in model.json.

    Raises:
      ConversionError: another number of class names, or the folder holds a model.
    """
    if (directory / model_dir.MODEL_FILE).exists():
        raise ConversionError(f"{directory} holds a model already: choose another folder")
    names = list(class_names) or [f"class_{k}" for k in range(converted.spec.num_classes)]
    if len(names) != converted.spec.num_classes:
        raise ConversionError(f"{len(names)} class names {names} for {converted.spec.num_classes} outputs")
    cfg = ConfigDict(cfg)
    cfg.data.feat_dim = converted.spec.feat_dim
    facts = {
        "method": cfg.method,
        "config": json.loads(config_utils.to_json(cfg)),
        "spec": dataclasses.asdict(converted.spec),
        "class_names": names,
        "encoder": encoder,
        "mpp": mpp,
        "selections": {},
        "fold": 0,
        "trained_on": {"converted_from": dict(source or {})},
    }
    model_dir.write(directory, converted.params, facts)


def to_checkpoint(directory: pathlib.Path, group: str = "") -> Tensors:
    """The tensors of a network of a model folder under the authors' names.

    Args:
      directory: a model folder.
      group: parameter group; "" for the only one that the folder holds.

    Returns:
      {key: array}, in the layout of the checkpoint. Tensors that the authors' code stores and never uses are absent.

    Raises:
      ConversionError: no published names, or the folder holds several networks and none was named.
      CheckpointMismatchError: no model, or damaged.
    """
    facts = model_dir.read_facts(directory)
    cfg, _, method = model_dir.rebuild(facts)
    known = adapters(cfg)
    present = [name for name in known if (directory / name).is_dir()]
    if group and group not in known:
        raise ConversionError(f"network {group!r} is unknown; {directory} holds {present}")
    if not group and len(present) != 1:
        raise ConversionError(f"{directory} holds the networks {present}: choose one with --network")
    group = group or present[0]
    params, _ = model_dir.read_groups(directory, facts, method, (group,))
    return known[group].to_torch(jax.tree.map(np.asarray, params[group]))
