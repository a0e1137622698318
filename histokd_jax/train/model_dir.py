"""Exported models: one folder per network, and model.json with what is needed to use them.

model/model.json   config, classes, patch width and encoder, selected genes by name, hashes
model/cluster_centres.npz   of networks that read clusters of patches
model/extra_GROUP/ (or extra/)   state without gradient, e.g. running statistics, of methods that have it
model/S_P/         the student alone is enough for pathology-only prediction; teachers may be deleted
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines.clusters import ClusterModel, centres_facts
from histokd_jax.evals.predictions import atomic_writer
from histokd_jax.methods import registry
from histokd_jax.tasks import Task, get_task
from histokd_jax.train import cluster_choice, distributed
from histokd_jax.train.checkpoint import CheckpointMismatchError, export_groups, load_groups, params_hash
from histokd_jax.train.experiment import Experiment, FoldData
from histokd_jax.train.gene_choice import Selection, read_selection
from histokd_jax.types import Batch, DataSpec, Method
from histokd_jax.utils import config as config_utils

MODEL_FILE, EXTRA = "model.json", "extra"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model of one fold.

    Attributes:
      cfg: its configuration.
      method: built from it.
      spec: what it expects of the data.
      params: the parameter groups that were loaded.
      extra: extra state.
      selections: batch field -> genes it reads.
      facts: model.json.
      task: fitted as in training.
      clusters: centres that assign the patches of new slides, for methods that read clusters fitted in training.
    """

    cfg: ConfigDict
    method: Method
    spec: DataSpec
    params: dict[str, Any]
    extra: Any
    selections: dict[str, Selection]
    facts: dict[str, Any]
    task: Task
    clusters: ClusterModel | None = None

    @property
    def class_names(self) -> list[str]:
        """One name per class."""
        return self.facts["class_names"]

    def of_batches(self, function: Callable[..., Any]) -> Callable[[Batch], Any]:
        """`function(params, extra, batch)` with the networks of this model, compiled, as a function of a batch.

        The networks are arguments of the program and no constants in it: models of equal shapes (the folds of a run)
        share one entry of the compilation cache, and none holds a copy of the parameters.
        """
        run = jax.jit(function)
        return lambda batch: run(self.params, self.extra, batch)


def export(
    directory: pathlib.Path, params: Any, experiment: Experiment, data: FoldData, fold: int, extra: Any = None
) -> None:
    """Writes a model folder; model.json last, so that an incomplete folder has none."""
    manifest = experiment.manifest
    fields = ("genes",) if data.selections else ()
    facts = {
        "method": experiment.cfg.method,
        "config": json.loads(config_utils.to_json(experiment.cfg)),
        "spec": dataclasses.asdict(experiment.data_spec(fields, fold)),
        "class_names": list(experiment.cohort.class_names),
        "encoder": manifest.encoder,
        "mpp": manifest.mpp,
        "selections": {field: json.loads(s.to_json()) for field, s in data.selections.items()},
        "fold": fold,
        **({"task": data.task.facts()} if data.task.facts() else {}),
        "trained_on": {
            "dataset": manifest.name,
            "simulated": manifest.simulated,
            "patient_overlap": any(split.patient_overlap for split in experiment.folds),
            "data_fingerprint": manifest.fingerprint(),
            "split_hash": data.split_hash,
        },
    }
    if data.clusters is not None and data.clusters.model is not None:
        facts["clusters"] = centres_facts(data.clusters.model)
        if distributed.is_main():
            directory.mkdir(parents=True, exist_ok=True)
            data.clusters.write_centres(directory)
    write(directory, params, facts, extra)


def write(directory: pathlib.Path, params: Mapping[str, Any], facts: Mapping[str, Any], extra: Any = None) -> None:
    """Writes parameter groups and their facts, which need not come from a run of this library.

    Args:
      directory: the model folder.
      params: group -> tree.
      facts: content of model.json but for the hashes: method, config, spec, class_names, encoder, mpp, selections,
        fold, trained_on.
      extra: state without gradient; a mapping by parameter group is divided as the parameters are.
    """
    state = _extra_folders(extra, params)
    export_groups(directory, {**params, **state})
    facts = {**facts, "params_sha256": {group: params_hash(tree) for group, tree in params.items()}}
    if state:
        facts["extra_sha256"] = {folder: params_hash(tree) for folder, tree in state.items()}
    if not distributed.is_main():
        return
    with atomic_writer(directory / MODEL_FILE) as stream:
        json.dump(facts, stream, indent=2, sort_keys=True)


def _extra_folders(extra: Any, groups: Iterable[str]) -> dict[str, Any]:
    """Folder -> part of the extra state that it holds; empty if there is none."""
    if not jax.tree.leaves(extra):
        return {}
    if isinstance(extra, Mapping) and set(extra) <= set(groups):
        return {f"{EXTRA}_{group}": tree for group, tree in extra.items() if jax.tree.leaves(tree)}
    return {EXTRA: extra}


def _read_extra(directory: pathlib.Path, facts: Mapping[str, Any], like: Any, groups: Iterable[str], all_groups) -> Any:
    """The extra state that some parameter groups need; of a mapping by group, the others stay absent."""
    folders = _extra_folders(like, all_groups)
    if not folders:
        return like
    stored = facts.get("extra_sha256", {})
    wanted = [folder for folder in folders if folder == EXTRA or folder.removeprefix(f"{EXTRA}_") in set(groups)]
    absent = [folder for folder in wanted if folder not in stored]
    if absent:
        raise CheckpointMismatchError(f"{directory} holds no state {', '.join(absent)}, which {facts['method']} needs")
    found = load_groups(directory, folders, wanted)
    for folder, tree in found.items():
        if params_hash(tree) != stored[folder]:
            raise CheckpointMismatchError(f"{directory / folder} differs from its hash in {MODEL_FILE}: damaged?")
    if EXTRA in found:
        return found[EXTRA]
    # Groups without leaves have no folder.
    empty = {group: tree for group, tree in like.items() if not jax.tree.leaves(tree)}
    return empty | {folder.removeprefix(f"{EXTRA}_"): tree for folder, tree in found.items()}


def read_facts(directory: pathlib.Path) -> dict[str, Any]:
    """model.json of a model folder.

    Raises:
      CheckpointMismatchError: there is none.
    """
    path = directory / MODEL_FILE
    if not path.is_file():
        raise CheckpointMismatchError(f"{directory} holds no {MODEL_FILE}: give a folder like RUN/fold_0/model")
    return json.loads(path.read_text())


def rebuild(facts: Mapping[str, Any]) -> tuple[ConfigDict, DataSpec, Method]:
    """Configuration, data specification and method that the facts of a model describe."""
    cfg = config_utils.from_json(json.dumps(facts["config"]))
    spec = DataSpec(**{**facts["spec"], **_tuples(facts["spec"])})
    return cfg, spec, registry.get_method(facts["method"])(cfg, spec)


def _tuples(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a data specification that are tuples, which JSON does not have."""
    size = spec.get("image_size")
    return {"gene_groups": tuple(spec.get("gene_groups", ())), "image_size": None if size is None else tuple(size)}


def read_groups(
    directory: pathlib.Path, facts: Mapping[str, Any], method: Method, groups: Iterable[str]
) -> tuple[dict[str, Any], Any]:
    """Parameter groups of a model folder, compared with their hashes.

    Args:
      directory: the model folder.
      facts: its model.json.
      method: built from it.
      groups: which to read.

    Returns:
      (group -> tree, extra state; of a mapping by parameter group only those of `groups`).

    Raises:
      CheckpointMismatchError: a missing network, other shapes, or contents that differ from their hash.
    """
    like, extra = jax.eval_shape(method.init, jax.random.key(0))
    groups = tuple(groups)
    params = load_groups(directory, like, groups)
    for group, tree in params.items():
        if params_hash(tree) != facts["params_sha256"][group]:
            raise CheckpointMismatchError(f"{directory / group} differs from its hash in {MODEL_FILE}: damaged?")
    return params, _read_extra(directory, facts, extra, groups, like)


def load(directory: pathlib.Path, mode: str) -> Model:
    """Loads the networks that a mode needs; the others may be absent.

    Args:
      directory: a model folder.
      mode: inference mode, e.g. "pathology".

    Raises:
      CheckpointMismatchError: no model, a missing network, other shapes, or contents that differ from their hash.
      ValueError: the method has no such mode.
    """
    facts = read_facts(directory)
    cfg, spec, method = rebuild(facts)
    needed = method.mode(mode)
    params, extra = read_groups(directory, facts, method, needed.params)
    selections = {
        field: read_selection(cfg, json.dumps(value))
        for field, value in facts["selections"].items()
        if field in needed.fields
    }
    task = get_task(cfg).restore(facts.get("task", {}))
    centres = cluster_choice.read_centres(directory, facts)
    return Model(cfg, method, spec, params, extra, selections, facts, task, centres)
