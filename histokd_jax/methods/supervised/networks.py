"""The networks of the method `supervised` by name, and the one convention by which all of them are called.

**Calling convention.** A network is a Linen module with

    module.apply({"params": p}, bags, genes, seed) -> dict
    module.apply({"params": p}, bags, genes, method="attention_map") -> [R, L] float32

* `bags`: `Bags`; `ClusteredBags` if the network reads "clusters"; None if it reads no patches. Padding may hold NaN and
  a slide may span rows, so patches go through `histokd_jax.ops.pooling` or are masked first.
* `genes`: {"genes": [S, K] float}, finite (the method sets slides without genes to 0), or None if it reads none.
* `seed`: [] uint32 to draw dropout, None for none (`histokd_jax.ops.dropout`; number the layers within a network).
* The dict holds "embedding" [S, H] and "logits" [S, C] in at least float32 and, under names of its own, whatever the
  loss or a test reads. **Every value is float and slot-major, [S, ...]**: a step may be cut between forward pass and
  objective, so nothing per patch leaves a network, and nothing that needs the label is computed in one.
* `attention_map` gives the weight of every patch within its slide (0 on padding); a network without patches, or without
  attention, lacks it. It draws no dropout.

Auxiliaries that the objective knows (histokd_jax.methods.supervised.objective): "instance_logits" [S, C, 2 B, 2] and
"instance_valid" [S, 2 B] (CLAM), "max_logits" [S, C] (DSMIL).

**Adding a network.** One line in `NETWORKS`, "module:attribute", where the attribute is a `Network`: it names what the
network reads, its options with their defaults (they become the section `model.NAME` of the configuration), and how it
is built from a `NetworkSpec` and those options.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from histokd_jax.methods.supervised.torch_keys import Tensor
from histokd_jax.ops.pooling import CHUNKED

PATCHES, CLUSTERS, GENES = "patches", "clusters", "genes"
READABLE = (PATCHES, CLUSTERS, GENES)

_BAGS = "histokd_jax.methods.supervised.bag_networks"
NETWORKS: Mapping[str, str] = {
    "snn": f"{_BAGS}:SNN",
    "deepsets": f"{_BAGS}:DEEPSETS",
    "abmil": f"{_BAGS}:ABMIL",
    "deepattnmisl": f"{_BAGS}:DEEPATTNMISL",
    "clam_sb": f"{_BAGS}:CLAM_SB",
    "clam_mb": f"{_BAGS}:CLAM_MB",
    "dsmil": f"{_BAGS}:DSMIL",
}
"""Name (config key `model.name`) -> "module:attribute" of a `Network`. Imported on demand."""

Options = Mapping[str, Any]
"""The section `model.NAME` of the configuration as a plain dict."""


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """What every network is told about data and machine; its own options come beside it.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: width C of the logits: classes, time bins, or 1 for a Cox head.
      num_genes: width K of the batch field `genes`; 0 without genes.
      gene_groups: sizes of consecutive blocks of `genes`; empty without groups.
      dtype: compute dtype of matrix products; None keeps the parameters'.
      chunk: patches per chunk of the pool.
      pool: implementation of the pool, see `histokd_jax.ops.pooling.attention_pool`.
    """

    feat_dim: int = 1024
    num_outputs: int = 4
    num_genes: int = 0
    gene_groups: tuple[int, ...] = ()
    dtype: jnp.dtype | None = None
    chunk: int = 512
    pool: str = CHUNKED


@dataclasses.dataclass(frozen=True)
class Network:
    """One entry of the table of networks.

    Attributes:
      build: (spec, options) -> Linen module that follows the calling convention.
      reads: (options) -> subset of `READABLE`; it decides the deployment mode ("pathology", "genomics" or "both").
      options: every option with its default; placeholders are not possible, so "off" is a value such as 0 or "none".
      torch: (options, number of outputs) -> {key in the public checkpoint: `Tensor`}, see `torch_keys`.
      choices: allowed values of the options that are names.
      initializer: (options) -> None, or the name in `histokd_jax.nn.mil.redraw.KERNELS` with which every kernel is
        drawn anew after construction (biases then 0), as some of the public codes do.
      l1: top-level parameter names under the L1 term; () for all of them.
      may_be_zero: integer options for which 0 has a meaning although their default is another number.
      instance_classes: whether the network has one instance head per class, which rules out a Cox head.
    """

    build: Callable[[NetworkSpec, Options], nn.Module]
    reads: Callable[[Options], tuple[str, ...]]
    options: Options
    torch: Callable[[Options, int], Mapping[str, Tensor]]
    choices: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    initializer: Callable[[Options], str | None] = lambda options: None
    l1: tuple[str, ...] = ()
    may_be_zero: tuple[str, ...] = ()
    instance_classes: bool = False


def network(name: str) -> Network:
    """The entry of a network.

    Args:
      name: key of `NETWORKS`.

    Returns:
      Its `Network`.

    Raises:
      ValueError: if no network has this name.
    """
    if name not in NETWORKS:
        raise ValueError(f"model.name = {name!r} is unknown; use one of {sorted(NETWORKS)}")
    module, attribute = NETWORKS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
