"""Configuration of the supervised baselines: defaults, validation, split into specs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from histokd_jax.losses.survival import CLAMPS, TIES
from histokd_jax.methods.settings import lookup
from histokd_jax.methods.supervised import objective
from histokd_jax.methods.supervised.networks import NETWORKS, Network, NetworkSpec, network
from histokd_jax.methods.supervised.objective import ObjectiveSpec
from histokd_jax.ops.pooling import IMPLS
from histokd_jax.types import SURVIVAL, DataSpec

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "data.pool": IMPLS,
    "loss.classification": objective.CLASSIFICATION_LOSSES,
    "loss.survival": objective.SURVIVAL_LOSSES,
    "loss.clamp": CLAMPS,
    "loss.ties": TIES,
    "loss.l1_scaling": (objective.PER_BAG, objective.PER_UPDATE),
    "loss.instance_loss": objective.INSTANCE_LOSSES,
    "loss.instance_on": (objective.UNCENSORED, objective.ALL),
    "train.compute_dtype": ("float32", "bfloat16"),
}
"""Allowed values of every enumerated key outside the networks' sections."""


def default_config() -> ml_collections.ConfigDict:
    """All keys that this method reads, with their defaults; `model.NAME` holds the options of network NAME.

    Returns:
      A new ConfigDict.
    """
    sections = {name: dict(network(name).options) for name in NETWORKS}
    return ml_collections.ConfigDict(
        dict(
            # feat_dim: 0 takes the width of the data set.
            data=dict(feat_dim=1024, chunk=512, pool="chunked"),
            model=dict(name="abmil", **sections),
            loss=dict(
                classification="ce",
                survival="nll",
                alpha=0.0,
                clamp="both",
                ties="breslow",
                l1=0.0,
                l1_scaling="per_bag",
                instance_weight=0.3,
                instance_loss="ce",
                instance_on="uncensored",
                subtyping=True,
                max_weight=0.5,
            ),
            infer=dict(average_max=False),
            train=dict(compute_dtype="float32"),
        )
    )


def selected(config: ml_collections.ConfigDict) -> tuple[Network, dict[str, Any]]:
    """The network that a config asks for, and its options.

    Raises:
      ValueError: unknown network, or a section without its keys.
    """
    name = lookup(config, "model.name")
    entry = network(name)
    return entry, {option: lookup(config, f"model.{name}.{option}") for option in entry.options}


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown values and contradictory switches.

    Args:
      config: with at least the keys of `default_config`.

    Raises:
      ValueError: naming the key, its value, what is expected and how to fix it.
    """
    for key in (f"data.{k}" for k in ("feat_dim", "chunk")):
        lookup(config, key)
    entry, options = selected(config)
    for key, allowed in CHOICES.items():
        _require(lookup(config, key) in allowed, config, key, f"one of {allowed}")
    for option, allowed in entry.choices.items():
        _require(options[option] in allowed, config, f"model.{config.model.name}.{option}", f"one of {allowed}")
    _validate_ranges(config, entry, options)
    _validate_combinations(config, entry)


def _validate_ranges(config: ml_collections.ConfigDict, entry: Network, options: Mapping[str, Any]) -> None:
    for key in ("loss.alpha", "loss.instance_weight", "loss.max_weight"):
        _require(0.0 <= lookup(config, key) <= 1.0, config, key, "a number in [0, 1]")
    _require(lookup(config, "loss.l1") >= 0.0, config, "loss.l1", "a weight >= 0")
    _require(config.data.chunk >= 1, config, "data.chunk", "a positive integer")
    for option, value in options.items():
        _validate_option(config, entry, option, value)


def _validate_option(config: ml_collections.ConfigDict, entry: Network, option: str, value: Any) -> None:
    key, default = f"model.{config.model.name}.{option}", entry.options[option]
    if "dropout" in option:
        _require(0.0 <= value < 1.0, config, key, "a drop probability in [0, 1)")
    elif isinstance(default, int) and not isinstance(default, bool):
        least = 0 if default == 0 or option in entry.may_be_zero else 1
        _require(value >= least, config, key, f"an integer >= {least}")
    elif option == "widths":
        _require(len(value) > 0 and min(value) >= 1, config, key, "positive integers")


def _require(condition: bool, config: ml_collections.ConfigDict, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {lookup(config, key)!r} is not possible; expected {expected}")


def _validate_combinations(config: ml_collections.ConfigDict, entry: Network) -> None:
    if config.loss.survival == objective.COX and entry.instance_classes:
        raise ValueError(
            f"loss.survival = 'cox' has no time bins, but the instance heads of model.name = {config.model.name!r} are "
            "one per bin: use loss.survival = 'nll', or another network"
        )


def network_spec(config: ml_collections.ConfigDict, data: DataSpec) -> NetworkSpec:
    """What a validated config and the data tell every network."""
    cox = data.task == SURVIVAL and config.loss.survival == objective.COX
    return NetworkSpec(
        feat_dim=data.feat_dim,
        num_outputs=1 if cox else data.num_classes,
        num_genes=data.num_genes,
        gene_groups=tuple(data.gene_groups),
        dtype=jnp.bfloat16 if config.train.compute_dtype == "bfloat16" else None,
        chunk=config.data.chunk,
        pool=config.data.pool,
    )


def objective_spec(config: ml_collections.ConfigDict, task: str, needs_genes: bool) -> ObjectiveSpec:
    """The objective that a validated config asks for."""
    return ObjectiveSpec(task=task, needs_genes=needs_genes, **dict(config.loss))
