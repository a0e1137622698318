"""The checkpoint names of every method, behind one interface. The key maps themselves lie with the networks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from histokd_jax.convert.matching import ConversionError, Tensors, plain
from histokd_jax.tasks.registry import kind_of
from histokd_jax.types import CLASSIFICATION, SURVIVAL, DataSpec

Groups = Mapping[str, Any]
"""Parameter group -> tree."""
PARAMS, STATISTICS = "params", "batch_stats"


@dataclasses.dataclass(frozen=True)
class GroupSizes:
    """Where a checkpoint shows the sizes of the gene groups.

    Attributes:
      pattern: of a whole key, with the number of the group as its only group.
      axis: axis of these tensors that is the size.
    """

    pattern: str
    axis: int

    def read(self, state: Tensors) -> tuple[int, ...]:
        """Sizes by number of the group, 0 where a number is left out; () without any such key."""
        keys = {key: re.fullmatch(self.pattern, plain(key)) for key in state}
        found = {int(m.group(1)): int(np.shape(state[key])[self.axis]) for key, m in keys.items() if m}
        return tuple(found.get(number, 0) for number in range(max(found, default=-1) + 1))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How the checkpoints of one network are named.

    Attributes:
      name: for messages.
      groups: parameter groups that one checkpoint fills.
      from_torch: {key: array} of exactly this network, and the widths -> parameter groups.
      to_torch: the reverse.
      dead: beginnings of keys that the authors' code stores and never uses.
      task: "classification" or "survival".
      gene_groups: where the sizes of gene groups can be read off, if there are any.
      genes_in_config: whether the number of genes is a setting (genes.top_k), which no tensor shows.
      counters: keys of integers that PyTorch stores beside running statistics; ignored when read, 0 when written.
      statistics: whether the network keeps running statistics: its group is then {"params", "batch_stats"} in both
        directions.
    """

    name: str
    groups: tuple[str, ...]
    from_torch: Callable[[Tensors, DataSpec], Groups]
    to_torch: Callable[[Groups, DataSpec], Tensors]
    dead: tuple[str, ...] = ()
    task: str = CLASSIFICATION
    gene_groups: GroupSizes | None = None
    genes_in_config: bool = False
    counters: tuple[str, ...] = ()
    statistics: bool = False


def adapters(cfg: ConfigDict) -> dict[str, Adapter]:
    """The networks of a method that have published checkpoints.

    Args:
      cfg: resolved configuration.

    Returns:
      Name, as in NETWORK=FILE -> adapter.

    Raises:
      ConversionError: there are none for this method or these options.
    """
    if cfg.method not in _METHODS:
        raise ConversionError(f"method {cfg.method!r} has no published checkpoints to convert; {sorted(_METHODS)} have")
    return _METHODS[cfg.method](cfg)


def _mkd(cfg: ConfigDict) -> dict[str, Adapter]:
    from histokd_jax.methods.mkd import torch_keys

    def one(group: str) -> Adapter:
        options = dict(network=group, variant=cfg.variant, fusion=cfg.fusion.type)
        return Adapter(
            f"{cfg.variant} {group}",
            (group,),
            lambda state, spec: {group: torch_keys.from_torch(state, **options)},
            lambda params, spec: torch_keys.to_torch(params[group], **options),
            torch_keys.UNUSED.get((group, cfg.variant), ()),
            genes_in_config=True,
        )

    return {group: one(group) for group in (torch_keys.STUDENT, torch_keys.MULTIMODAL, torch_keys.GENOMIC)}


def _ghanet(cfg: ConfigDict) -> dict[str, Adapter]:
    from histokd_jax.methods.ghanet import networks, spec, torch_keys

    if cfg.cab.second_attention != spec.SHARED:
        raise ConversionError(
            "the authors' code applies the first cross-attention twice: add --config.cab.second_attention="
            f"{spec.SHARED}, or take the faithful configuration"
        )
    groups = (networks.CAB, networks.HEADS, networks.HSB)
    adapter = Adapter(
        "G-HANet",
        groups,
        lambda state, spec: torch_keys.from_torch(state, spec.gene_groups),
        lambda params, spec: torch_keys.to_torch(params, spec.gene_groups),
        (torch_keys.UNUSED,),
        SURVIVAL,
        GroupSizes(r"recon_net\.sig_reconstruct_net\.(\d+)\.4\.weight", 0),
    )
    return {"ghanet": adapter}


def _supervised(cfg: ConfigDict) -> dict[str, Adapter]:
    from histokd_jax.methods.supervised import torch_keys, torch_keys_multimodal
    from histokd_jax.methods.supervised.config import network_spec, selected
    from histokd_jax.methods.supervised.method import GROUP
    from histokd_jax.methods.supervised.multimodal_networks import GENE_GROUPS

    entry, options = selected(cfg)
    name = cfg.model.name

    def table(spec: DataSpec) -> Mapping[str, Any]:
        return entry.torch({**options, GENE_GROUPS: spec.gene_groups}, network_spec(cfg, spec).num_outputs)

    def keys(spec: DataSpec) -> Any:
        # Layers of gene groups are parts of one array here, which only the second module knows.
        parts = any(isinstance(tensor, torch_keys_multimodal.Tensor) for tensor in table(spec).values())
        return torch_keys_multimodal if parts else torch_keys

    adapter = Adapter(
        name,
        (GROUP,),
        lambda state, spec: {GROUP: keys(spec).from_torch(state, table(spec))},
        lambda params, spec: keys(spec).to_torch(params[GROUP], table(spec)),
        _dead(name, options),
        kind_of(cfg),
        _GROUPED.get(name),
    )
    return {name: adapter}


def _dead(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    from histokd_jax.methods.supervised import torch_keys_multimodal

    if name in ("clam_sb", "clam_mb"):
        # A buffer of the smooth top-1 loss on instances, stored with networks that were trained with it.
        return ("instance_loss_fn.",)
    if name == "porpoise_mmf":
        return torch_keys_multimodal.unused_porpoise_mmf((options["gate_path"], options["gate_omic"]))
    return ()


def _hmkd(cfg: ConfigDict) -> dict[str, Adapter]:
    from histokd_jax.methods.hmkd import torch_keys
    from histokd_jax.methods.hmkd.config import paired_spec
    from histokd_jax.methods.hmkd.objective import STUDENT, TEACHER

    def one(group: str) -> Adapter:
        def read(state: Tensors, data: DataSpec) -> Groups:
            trees = torch_keys.from_torch(state, paired_spec(cfg, data.num_classes), group)
            return {group: dict(zip((PARAMS, STATISTICS), trees))}

        def write(groups: Groups, data: DataSpec) -> Tensors:
            trees = (groups[group][name] for name in (PARAMS, STATISTICS))
            return torch_keys.to_torch(*trees, paired_spec(cfg, data.num_classes), group)

        counters = torch_keys.counters(paired_spec(cfg, 2), group)
        return Adapter(f"HM-KD {group}", (group,), read, write, counters=counters, statistics=True)

    return {group: one(group) for group in (TEACHER, STUDENT)}


def _momkd(cfg: ConfigDict) -> dict[str, Adapter]:
    from histokd_jax.methods.momkd import torch_keys
    from histokd_jax.methods.momkd.config import GRADIENT
    from histokd_jax.methods.momkd.networks import GENES, MEMORY, SLIDE

    if cfg.memory.update_by != GRADIENT or cfg.ablate.baseline or not cfg.attention.learn_temperature:
        raise ConversionError(
            "the authors' checkpoints hold trained memories and a trained temperature: set memory.update_by=gradient, "
            "ablate.baseline=False and attention.learn_temperature=True"
        )
    adapter = Adapter(
        "MoMKD",
        (SLIDE, MEMORY, GENES),
        lambda state, spec: torch_keys.from_torch(state),
        lambda params, spec: torch_keys.to_torch(params),
        torch_keys.UNUSED,
    )
    return {"momkd": adapter}


_PATHWAYS = GroupSizes(r"sig_networks\.(\d+)\.0\.0\.weight", 1)
_GROUPED: Mapping[str, GroupSizes] = {"mcat": _PATHWAYS, "survpath": _PATHWAYS}
_METHODS: Mapping[str, Callable[[ConfigDict], dict[str, Adapter]]] = {
    "mkd": _mkd,
    "ghanet": _ghanet,
    "supervised": _supervised,
    "hmkd": _hmkd,
    "momkd": _momkd,
}
