"""Finished networks that a run uses without training them: read from model folders, handed to `Method.forward`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from histokd_jax.methods import registry
from histokd_jax.train import model_dir
from histokd_jax.train.checkpoint import CheckpointMismatchError, params_hash
from histokd_jax.types import DataSpec
from histokd_jax.utils import config as config_utils

OTHER_SPLIT = "teacher trained on another split: it may have seen the reported images"


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """Networks that are not trained.

    Attributes:
      groups: parameter group -> {"params", "batch_stats" if it has running statistics}.
      identity: what must stay equal to continue a run.
    """

    groups: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)


def folders(cfg: ConfigDict, fold: int) -> dict[str, pathlib.Path]:
    """Parameter group -> model folder of its finished network, as the configuration gives them.

    The module of a method names the groups and their configuration keys in `FROZEN`. A key may name a model folder, the
    folder of a fold, or a run directory, of which the model of the same fold is taken.

    Raises:
      ValueError: a folder without a model.
    """
    flat, found = config_utils.flatten(cfg), {}
    for group, key in getattr(registry.method_module(cfg.method), "FROZEN", {}).items():
        if not flat[key]:
            continue
        given = pathlib.Path(flat[key])
        places = (given, given / "model", given / f"fold_{fold}" / "model")
        folder = next((place for place in places if (place / model_dir.MODEL_FILE).is_file()), None)
        if folder is None:
            where = f"RUN or RUN/fold_{fold}/model"
            raise ValueError(f"{key}={flat[key]} holds no trained model of fold {fold}: give {where}")
        found[group] = folder
    return found


def read(cfg: ConfigDict, spec: DataSpec, fold: int) -> Frozen:
    """Reads the finished networks of a configuration.

    Args:
      cfg: resolved configuration.
      spec: of the data.
      fold: whose models are taken from a run directory.

    Raises:
      CheckpointMismatchError: other widths or layers than this configuration gives the network, another method, or
        damaged contents; names the first difference.
    """
    groups, identity = {}, {}
    for group, folder in folders(cfg, fold).items():
        facts = model_dir.read_facts(folder)
        if facts["method"] != cfg.method:
            raise CheckpointMismatchError(f"{folder} holds a model of {facts['method']}, expected {cfg.method}")
        like = _as_if_trained(cfg, spec, group)
        if group not in jax.eval_shape(like.init, jax.random.key(0))[0]:
            continue  # Nothing is distilled, e.g. in the control arm.
        try:
            params, extra = model_dir.read_groups(folder, facts, like, [group])
        except CheckpointMismatchError as error:
            raise CheckpointMismatchError(
                f"the {group} does not fit this configuration (other widths, depths or classes?): {error}"
            ) from error
        groups[group] = {"params": params[group]}
        if isinstance(extra, Mapping) and group in extra:
            groups[group]["batch_stats"] = extra[group]
        identity[f"frozen {group}"] = params_hash(jax.device_get(groups[group]))
    return Frozen(groups, identity)


def precompute(
    cfg: ConfigDict,
    spec: DataSpec,
    groups: Mapping[str, Any],
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    examples: int,
) -> Mapping[str, Any]:
    """What `Method.forward` gets as `frozen`: the networks, or their outputs if the method caches them.

    Args:
      cfg: resolved configuration.
      spec: of the data.
      groups: from `read`.
      batches: gives one pass over the training examples.
      examples: in the whole data set.
    """
    own = getattr(registry.method_module(cfg.method), "precompute", None)
    return groups if own is None or not groups else own(cfg, spec, groups, batches, examples)


def marks(cfg: ConfigDict, fold: int, split_hash: str) -> tuple[str, ...]:
    """What must be said about the finished networks of a fold beside every number."""
    hashes = [model_dir.read_facts(folder)["trained_on"].get("split_hash") for folder in folders(cfg, fold).values()]
    return (OTHER_SPLIT,) if any(found != split_hash for found in hashes) else ()


def _as_if_trained(cfg: ConfigDict, spec: DataSpec, group: str):
    """The method of the same configuration if it trained the network itself: gives its shapes."""
    module = registry.method_module(cfg.method)
    own = ConfigDict(cfg.to_dict())
    own.update_from_flattened_dict({module.FROZEN[group]: "", **getattr(module, "UNFROZEN", {})})
    return registry.get_method(cfg.method)(own.lock(), spec)
