"""Configuration of G-HANet: defaults, faithful preset, validation, split into specs (specification 9, 11, 12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from histokd_jax.losses.survival import CLAMPS
from histokd_jax.methods.ghanet import spec as nets
from histokd_jax.methods.ghanet.objective import COX, REC_TERMS, SURVIVAL_LOSSES, ObjectiveSpec
from histokd_jax.methods.ghanet.spec import NetworkSpec
from histokd_jax.methods.settings import lookup
from histokd_jax.ops.pooling import IMPLS

CARRY, DROP, FLUSH = "carry", "drop", "flush_scaled"

FAITHFUL: Mapping[str, Any] = {
    "fidelity": "faithful",
    "data.metadata": "positional",
    "genes.select_on": "sampler_draw",
    "genes.correction": "none",
    "genes.empty_group": "error",
    "cab.second_attention": nets.SHARED,
    "hsb.map_source": nets.RAW,
    "hsb.min_k": 0,
    "loss.ce_clamp": "low",
    "train.remainder": CARRY,
}
"""Dotted overrides that restore the behaviour of the authors' code (specification section 11)."""

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "fidelity": ("corrected", "faithful"),
    "data.metadata": ("by_name", "positional"),
    "data.pool": IMPLS,
    "genes.selection": ("welch_p05", "none", "top_n"),
    "genes.select_on": ("sampler_draw", "unique_patients"),
    "genes.correction": ("none", "fdr_bh"),
    "genes.empty_group": ("error", "skip_group", "keep_top_n"),
    "cab.passes": ("1", "2"),
    "cab.second_attention": (nets.SHARED, nets.OWN),
    "cab.fusion": (nets.MEAN, nets.NO_FUSION, nets.CONCAT),
    "hsb.map": (nets.BOTH, nets.MORPHOLOGY, nets.GENOTYPE, nets.UNIFORM),
    "hsb.map_source": (nets.RAW, nets.PROB),
    "hsb.map_pass": (nets.LAST, nets.FIRST),
    "hsb.readout": (nets.FLATTEN, "mean"),
    "loss.survival": SURVIVAL_LOSSES,
    "loss.ce_clamp": CLAMPS,
    "loss.rec_terms": REC_TERMS,
    "train.remainder": (CARRY, DROP, FLUSH),
    "train.compute_dtype": ("float32", "bfloat16"),
}
"""Allowed values of every enumerated key."""


def null(kind: type) -> ml_collections.FieldReference:
    """A typed key without a value; a fresh reference, because a shared one would tie the keys together."""
    return ml_collections.config_dict.placeholder(kind)


def default_config() -> ml_collections.ConfigDict:
    """All keys that the method, or the data pipeline for it, reads; defaults are the recommended ("corrected") ones.

    Returns:
      A new ConfigDict. Values that may be null use placeholders, so that overrides are type-checked.
    """
    return ml_collections.ConfigDict(
        dict(
            fidelity="corrected",
            # feat_dim: 0 takes the width of the data set.
            data=dict(feat_dim=1024, metadata="by_name", chunk=512, pool="chunked"),
            genes=dict(
                kind="groups",
                signatures="",
                selection="welch_p05",
                p=0.05,
                select_on="unique_patients",
                correction="fdr_bh",
                empty_group="keep_top_n",
                top_n=10,
                clip=null(float),
                suffixes=("_mut", "_cnv", "_rnaseq"),
            ),
            model=dict(dim=512, heads=4, head_dim=128, ffn_mult=4, tokens=6, dropout=0.25),
            cab=dict(enabled=True, passes=2, second_attention=nets.OWN, fusion=nets.MEAN, detach_tokens=False),
            hsb=dict(
                map=nets.BOTH,
                ratio=0.2,
                min_k=1,
                detach_map=True,
                map_source=nets.PROB,
                map_pass=nets.LAST,
                hyper_layer=True,
                self_attention=True,
                ffn=True,
                prenorm=False,
                readout=nets.FLATTEN,
            ),
            loss=dict(survival="nll", alpha=0.0, ce_clamp="both", rec_weight=0.3, rec_terms="sce+mse", sce_power=3.0),
            train=dict(b=32, remainder=DROP, compute_dtype="float32"),
        )
    )


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown values and contradictory switches.

    Args:
      config: with at least the keys of `default_config`.

    Raises:
      ValueError: naming the key, its value, what is expected and how to fix it.
    """
    for key, allowed in CHOICES.items():
        value = str(lookup(config, key))
        if value not in allowed:
            raise ValueError(f"{key} = {value!r} is unknown; use one of {allowed}")
    _validate_ranges(config)
    if not config.cab.enabled and config.hsb.map == nets.GENOTYPE:
        raise ValueError("hsb.map = 'genotype' is the map of CAB, but cab.enabled = False; use 'morphology'")
    if config.loss.survival == COX and config.train.b < 2:
        raise ValueError(
            f"train.b = {config.train.b}: the Cox loss compares the slides of a step and needs train.b >= 2"
        )


def _validate_ranges(config: ml_collections.ConfigDict) -> None:
    for key in ("dim", "heads", "head_dim", "ffn_mult", "tokens"):
        _require(lookup(config, f"model.{key}") >= 1, config, f"model.{key}", "a positive integer")
    _require(config.model.dim % 2 == 0, config, "model.dim", "an even width")
    for key in ("data.chunk", "train.b", "genes.top_n"):
        _require(lookup(config, key) >= 1, config, key, "a positive integer")
    _require(0.0 <= config.model.dropout < 1.0, config, "model.dropout", "a drop probability in [0, 1)")
    _require(0.0 < config.hsb.ratio <= 1.0, config, "hsb.ratio", "a fraction in (0, 1]")
    _require(config.hsb.min_k >= 0, config, "hsb.min_k", "0 (small slides are an error) or a number of patches")
    _require(0.0 <= config.loss.alpha <= 1.0, config, "loss.alpha", "a number in [0, 1]")
    _require(config.loss.rec_weight >= 0.0, config, "loss.rec_weight", "a weight >= 0")
    _require(config.loss.sce_power > 0.0, config, "loss.sce_power", "a power > 0")
    _require(0.0 < config.genes.p <= 1.0, config, "genes.p", "a threshold in (0, 1]")
    _require(config.genes.clip is None or config.genes.clip > 0.0, config, "genes.clip", "a bound > 0, or null")


def _require(condition: bool, config: ml_collections.ConfigDict, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {lookup(config, key)!r} is out of range; expected {expected}")


def network_spec(
    config: ml_collections.ConfigDict, feat_dim: int, outputs: int, groups: tuple[int, ...]
) -> NetworkSpec:
    """The architecture that a validated config asks for.

    Args:
      config: see `validate`.
      feat_dim: patch-embedding width of the data.
      outputs: time bins, or 1 for Cox.
      groups: kept features of each gene group; () where there are no genes (no reconstruction heads).
    """
    model, cab, hsb = config.model, config.cab, config.hsb
    # Without CAB there is no genotype view: G = P (section 9).
    view = nets.MORPHOLOGY if not cab.enabled and hsb.map == nets.BOTH else hsb.map
    return NetworkSpec(
        feat_dim=feat_dim,
        outputs=outputs,
        groups=groups,
        tokens=model.tokens,
        width=model.dim,
        heads=model.heads,
        head_dim=model.head_dim,
        ffn_mult=model.ffn_mult,
        rate=model.dropout,
        cab=cab.enabled,
        passes=cab.passes,
        second_attention=cab.second_attention,
        fusion=cab.fusion,
        detach_tokens=cab.detach_tokens,
        map=view,
        ratio=hsb.ratio,
        min_k=hsb.min_k,
        detach_map=hsb.detach_map,
        map_source=hsb.map_source,
        map_pass=hsb.map_pass,
        hyper_layer=hsb.hyper_layer,
        self_attention=hsb.self_attention,
        ffn=hsb.ffn,
        prenorm=hsb.prenorm,
        readout=hsb.readout,
        dtype=jnp.bfloat16 if config.train.compute_dtype == "bfloat16" else None,
        chunk=config.data.chunk,
        pool=config.data.pool,
    )


def objective_spec(config: ml_collections.ConfigDict, groups: tuple[int, ...]) -> ObjectiveSpec:
    """The objective that a validated config asks for."""
    loss = config.loss
    return ObjectiveSpec(
        groups=groups,
        survival=loss.survival,
        alpha=loss.alpha,
        ce_clamp=loss.ce_clamp,
        rec_weight=loss.rec_weight if config.cab.enabled else 0.0,
        rec_terms=loss.rec_terms,
        sce_power=loss.sce_power,
        window=config.train.b if config.train.remainder == CARRY else None,
    )
