"""Which trainings share one program: groups of settings, and parts of a group that fit into memory."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.pipeline import StepSource
from histokd_jax.train import optim
from histokd_jax.train.experiment import FoldData, share_shapes
from histokd_jax.train.replica_step import VMAP, resolve_loop
from histokd_jax.types import Method
from histokd_jax.utils import config as config_utils

TRAINER_KEYS = ("seed", "fold", "train.lr", "train.lr_schedule", "train.lr_floor")
"""Settings that reach the step of any method as data: keys and learning rates."""
DATA_KEYS = tuple(
    f"genes.{name}"
    for name in ("filter", "ranking", "ranking_scope", "ranking_table", "normalisation", "exclude", "nan_policy")
)
"""Settings that change the contents of the batches and nothing else."""
_COPIES = 5  # parameters, their gradient, two moments, the best parameters
_BATCHES = 4  # two read ahead, one fed, one stacked


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Settings that share one graph.

    Attributes:
      settings: names, in the order of the sweep.
      varying: config keys given to the objective as data because they differ within the group.
      free: config keys that were left out of the comparison.
    """

    settings: tuple[str, ...]
    varying: tuple[str, ...]
    free: tuple[str, ...]


def group_settings(settings: Mapping[str, ConfigDict], methods: Mapping[str, Method]) -> list[Group]:
    """Two settings share a group if and only if they differ in nothing but data of the step.

    Data are: what the method declares (`Method.traced`, e.g. loss weights), seeds and folds, learning rates, and the
    choice of genes. A setting whose loss does not couple slides is planned in other steps, so it is a group of its own.

    Args:
      settings: name -> resolved configuration.
      methods: name -> the method built from it.

    Returns:
      Groups in the order of their first setting.
    """
    found: dict[str, list[str]] = {}
    for name, cfg in settings.items():
        method = methods[name]
        free = {*TRAINER_KEYS, *DATA_KEYS, *method.traced}
        graph = {key: value for key, value in config_utils.flatten(cfg).items() if key not in free}
        text = json.dumps([graph, method.batch_coupled], sort_keys=True, default=str)
        found.setdefault(text, []).append(name)
    return [_group(names, settings, methods[names[0]]) for names in found.values()]


def _group(names: Sequence[str], settings: Mapping[str, ConfigDict], method: Method) -> Group:
    flat = [config_utils.flatten(settings[name]) for name in names]
    varying = tuple(key for key in method.traced if len({values[key] for values in flat}) > 1)
    return Group(tuple(names), varying, (*TRAINER_KEYS, *DATA_KEYS, *method.traced))


def align(folds: Sequence[FoldData]) -> list[FoldData]:
    """The same data with equal shapes of all training steps and of all evaluation steps; empty room costs no work."""
    slots = max(fold.train.plan.num_slots for fold in folds)
    return share_shapes([dataclasses.replace(fold, train=_with_slots(fold.train, slots)) for fold in folds])


def _with_slots(source: StepSource, slots: int) -> StepSource:
    plan = source.plan
    missing = slots - plan.num_slots
    if not missing:
        return source

    def wider(array: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=fill)

    plan = dataclasses.replace(
        plan, slide=wider(plan.slide, -1), start=wider(plan.start, 0), count=wider(plan.count, 0)
    )
    return dataclasses.replace(source, plan=plan)


def split_to_fit(
    members: Sequence[Any], streams: Sequence[Any], state_bytes: int, step_bytes: int, budget: int, most: int = 0
) -> list[list[Any]]:
    """Divides a group into parts of nearly equal size that fit into memory.

    Args:
      members: replicas, those that share a stream next to each other.
      streams: the stream of each.
      state_bytes: of one replica, with its working memory.
      step_bytes: of the batches of one stream.
      budget: bytes that may be used.
      most: largest part; 0 for no limit but the budget.

    Returns:
      Parts in order.

    Raises:
      ValueError: not even one replica fits.
    """
    if state_bytes + step_bytes > budget:
        raise ValueError(
            f"one replica needs {state_bytes / 2**20:.0f} MiB and its batches {step_bytes / 2**20:.0f} MiB, of "
            f"{budget / 2**20:.0f} MiB that may be used: lower train.b, or cap the slides with data.max_patches_train"
        )
    fits, used, seen, size = 1, 0, set(), 0
    for stream in streams:
        more = state_bytes + (0 if stream in seen else step_bytes)
        if size and (used + more > budget or size == (most or len(members))):
            fits, used, seen, size = fits + 1, 0, set(), 0
            more = state_bytes + step_bytes
        used, size = used + more, size + 1
        seen.add(stream)
    edges = np.linspace(0, len(members), fits + 1).round().astype(int)
    return [list(members[a:b]) for a, b in zip(edges, edges[1:])]


def memory_of(method: Method, cfg: ConfigDict, source: StepSource) -> tuple[int, int]:
    """(bytes of one replica, bytes of the batches of one stream), for `split_to_fit`."""
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    copies = _COPIES + (cfg.train.optimizer == optim.LOOKAHEAD)  # its slow weights
    state = copies * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, extra)))
    slot = sum(values[:1].nbytes for values in source.table.fields.values())
    step = source.step_bytes(source.plan.rows) + source.plan.num_slots * slot
    if resolve_loop(cfg.train.replica_loop, jax.devices()[0].platform) == VMAP:
        # Batched replicas hold their batches and as much again of activations at the same time.
        state += 2 * step
    return state, _BATCHES * step


def memory_budget() -> int:
    """Bytes that a group may use: half of the memory of the first device, or of the host if that is the device."""
    stats = jax.devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(limit) // 2
