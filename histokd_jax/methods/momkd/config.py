"""Configuration of MoMKD: defaults, presets, validation, split into specs (specification 2 to 9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from histokd_jax.methods.momkd.graph import CENTRE_TO_NEIGHBOUR, DIRECTIONS
from histokd_jax.methods.momkd.networks import BASELINE_POOLS, GATED, MEMORY_POOL, NetworkSpec
from histokd_jax.methods.momkd.objective import ObjectiveSpec
from histokd_jax.methods.settings import lookup

GRADIENT, EMA, FIXED = "gradient", "ema", "fixed"
KMEANS, RANDOM = "kmeans", "random"
WEIGHTS = ("loss.ce", "loss.alpha_wsi", "loss.alpha_gene", "loss.lambda_rec", "loss.mem", "loss.orth")

FAITHFUL: Mapping[str, Any] = {
    "fidelity": "faithful",
    "genes.ranking_scope": "global_80pct",
    "labels.missing": "negative",
    "early_stop.patience": 1,
    "early_stop.min_epoch": 1,
    "eval.edgeless": "skip",
    "split.stratify": False,
}
"""Dotted overrides that restore the behaviour of the authors' code (section 9) where the default departs from it."""

PAPER_HPARAMS: Mapping[str, Any] = {
    "model.d": 256,
    "model.sphere": 128,
    "loss.lambda_rec": 0.01,
    "memory.kmeans_pool": 10_000,
    "attention.learn_temperature": False,
}
"""Dotted overrides to the numbers that the paper states (section 9)."""

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "fidelity": ("corrected", "faithful"),
    "graph.direction": DIRECTIONS,
    "genes.kind": ("ranked", "none"),
    "genes.filter": ("top", "bottom", "random"),
    "genes.ranking": ("boosted_trees", "anova", "cox", "variance", "table"),
    "genes.ranking_scope": ("per_fold_train", "global", "global_80pct"),
    "genes.normalisation": ("log2p1_then_zscore_train_fold", "precomputed_zscore"),
    "genes.nan_policy": ("error", "zero"),
    "labels.her2_equivocal": ("drop", "negative", "fish_resolved"),
    "labels.missing": ("drop", "negative"),
    "memory.update_by": (GRADIENT, EMA, FIXED),
    "memory.init": (KMEANS, RANDOM),
    "ablate.baseline_pool": BASELINE_POOLS,
    "train.batching": ("packed", "padded", "grad_cache"),
    "train.compute_dtype": ("float32", "bfloat16"),
    "eval.edgeless": ("predict", "skip"),
    "eval.threshold": ("", "val_f1"),
}
"""Allowed values of every enumerated key."""


def null(kind: type) -> ml_collections.FieldReference:
    """A typed key without a value; a fresh reference, because a shared one would tie the keys together."""
    return ml_collections.config_dict.placeholder(kind)


def default_config() -> ml_collections.ConfigDict:
    """All keys that the method, or the data pipeline and the trainer for it, reads.

    Returns:
      A new ConfigDict.
    """
    return ml_collections.ConfigDict(
        dict(
            fidelity="corrected",
            # feat_dim: 0 takes the width of the data set.
            data=dict(feat_dim=1536),
            graph=dict(k=8, direction=CENTRE_TO_NEIGHBOUR),
            genes=dict(
                kind="ranked",
                top_k=768,
                token_size=1,
                filter="top",
                ranking="boosted_trees",
                ranking_scope="per_fold_train",
                ranking_table="",
                normalisation="log2p1_then_zscore_train_fold",
                exclude=(),
                nan_policy="error",
                clip=null(float),
            ),
            labels=dict(her2_equivocal="drop", missing="drop"),
            split=dict(stratify=True),
            model=dict(
                d=512,
                d_gene=512,
                gene_hidden=512,
                sphere=64,
                codes=16,
                heads=2,
                head_hidden=128,
                dropout=0.5,
                edge_dropout=0.5,
                head_dropout=0.5,
                gene_dropout=0.25,
            ),
            attention=dict(temperature=0.2, learn_temperature=True, grad_to_memory=False),
            memory=dict(
                update_by=GRADIENT,
                momentum=0.99,
                renormalise=False,
                weight_decay=True,
                init=KMEANS,
                kmeans_pool=50_000,
                kmeans_iterations=20,
            ),
            commit=dict(move_codes=False),
            align=dict(tau=5.0, beta=20.0, margin=0.3),
            loss=dict(ce=0.5, alpha_wsi=0.2, alpha_gene=0.05, lambda_rec=0.05, mem=0.1, orth=10.0),
            # baseline: pools without the memories, for the ablations of section 8.
            ablate=dict(baseline=False, baseline_pool=GATED),
            train=dict(
                b=1,
                batching="packed",
                lr=2e-4,
                wd=1e-4,
                decay_bias=True,
                clip_norm=16.0,
                lr_schedule="plateau",
                plateau_factor=0.2,
                plateau_patience=5,
                max_epochs=100,
                sampler="class_balanced_replacement",
                compute_dtype="float32",
            ),
            early_stop=dict(monitor="student_auc", patience=10, min_epoch=10, ties_improve=True),
            eval=dict(edgeless="predict", threshold="val_f1"),
            infer=dict(mode="pathology"),
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
    _validate_combinations(config)


def _validate_ranges(config: ml_collections.ConfigDict) -> None:
    sizes = ("d", "d_gene", "gene_hidden", "sphere", "codes", "heads", "head_hidden")
    counts = ("graph.k", "genes.top_k", "memory.kmeans_pool", "memory.kmeans_iterations", "train.b")
    for key in (*(f"model.{size}" for size in sizes), *counts):
        _require(lookup(config, key) >= 1, config, key, "a positive integer")
    _require(config.model.d % config.model.heads == 0, config, "model.d", "a multiple of model.heads")
    for key in ("dropout", "edge_dropout", "head_dropout", "gene_dropout"):
        _require(0.0 <= lookup(config, f"model.{key}") < 1.0, config, f"model.{key}", "a drop probability in [0, 1)")
    for key in WEIGHTS:
        _require(lookup(config, key) >= 0.0, config, key, "a weight >= 0")
    for key in ("align.tau", "align.beta", "train.plateau_patience"):
        _require(lookup(config, key) > 0, config, key, "a number > 0")
    _require(0.0 < config.train.plateau_factor < 1.0, config, "train.plateau_factor", "a factor in (0, 1)")
    _require(config.train.clip_norm >= 0.0, config, "train.clip_norm", "a norm > 0, or 0 for no clipping")
    _require(0.01 <= config.attention.temperature <= 2.0, config, "attention.temperature", "a number in [0.01, 2]")
    _require(0.0 <= config.memory.momentum <= 1.0, config, "memory.momentum", "a share in [0, 1]")
    _require(config.genes.clip is None or config.genes.clip > 0.0, config, "genes.clip", "a bound > 0, or null")


def _require(condition: bool, config: ml_collections.ConfigDict, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {lookup(config, key)!r} is out of range; expected {expected}")


def _validate_combinations(config: ml_collections.ConfigDict) -> None:
    memory, weights = config.memory, config.loss
    used = [key for key in ("alpha_gene", "lambda_rec") if weights[key]]
    if config.genes.kind == "none" and used:
        raise ValueError(
            f"loss.{used[0]} = {weights[used[0]]} compares with genes, but genes.kind = 'none': set it to 0"
        )
    if memory.update_by != GRADIENT and config.commit.move_codes:
        raise ValueError(
            f"commit.move_codes = True moves codes by gradients, but memory.update_by = {memory.update_by!r}; use "
            "'gradient'"
        )
    if memory.update_by == EMA and config.train.batching == "grad_cache":
        raise ValueError(
            "memory.update_by = 'ema' follows the patches of a step, which train.batching = 'grad_cache' does not "
            "keep; use 'packed'"
        )
    if memory.update_by != GRADIENT and memory.renormalise:
        raise ValueError(
            f"memory.renormalise = True follows updates by gradients, but memory.update_by = {memory.update_by!r}, "
            "which keeps unit norms anyway: set it to False"
        )


def network_spec(config: ml_collections.ConfigDict, feat_dim: int, num_genes: int, num_classes: int = 2) -> NetworkSpec:
    """The architecture that a validated config asks for.

    Args:
      config: see `validate`.
      feat_dim: patch-embedding width of the data.
      num_genes: K of the data; 0: no gene branch.
      num_classes: outputs of the classifier.
    """
    model, attention = config.model, config.attention
    return NetworkSpec(
        feat_dim=feat_dim,
        num_classes=num_classes,
        num_genes=num_genes,
        width=model.d,
        gene_width=model.d_gene,
        gene_hidden=model.gene_hidden,
        sphere=model.sphere,
        codes=model.codes,
        heads=model.heads,
        head_hidden=model.head_hidden,
        node_rate=model.dropout,
        edge_rate=model.edge_dropout,
        head_rate=model.head_dropout,
        gene_rate=model.gene_dropout,
        direction=config.graph.direction,
        pool=config.ablate.baseline_pool if config.ablate.baseline else MEMORY_POOL,
        tau=attention.temperature,
        learn_tau=attention.learn_temperature,
        attention_grad_to_memory=attention.grad_to_memory,
        dtype=jnp.bfloat16 if config.train.compute_dtype == "bfloat16" else None,
    )


def objective_spec(config: ml_collections.ConfigDict) -> ObjectiveSpec:
    """The objective that a validated config asks for."""
    loss, align = config.loss, config.align
    return ObjectiveSpec(
        ce=loss.ce,
        alpha_wsi=loss.alpha_wsi,
        alpha_gene=loss.alpha_gene,
        lambda_rec=loss.lambda_rec,
        mem=loss.mem,
        orth=loss.orth,
        beta=align.beta,
        margin=align.margin,
    )
