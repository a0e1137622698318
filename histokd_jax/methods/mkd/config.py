"""Configuration of MKD: defaults (specification section 16), faithful preset, validation, split into specs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from histokd_jax.losses.orthogonal import FORMS
from histokd_jax.methods.mkd.networks import NetworkSpec
from histokd_jax.methods.mkd.objective import INTER_LOSSES, NONE, ObjectiveSpec
from histokd_jax.methods.settings import lookup
from histokd_jax.nn.affine import INITIALIZERS
from histokd_jax.nn.fusion import BILINEAR, FUSIONS
from histokd_jax.nn.genes import TokenSpec
from histokd_jax.ops.pooling import IMPLS

ONLINE, TWO_STAGE = "online", "two_stage"

FAITHFUL: Mapping[str, Any] = {
    "fidelity": "faithful",
    "eval.teacher_dropout": True,
    "ckpt.teachers": "last_epoch",
    "train.lr_schedule": "cosine50_periodic",
    "split.stratify": False,
    "genes.ranking_scope": "global",
    "data.slide_choice": "listing_order",
    "data.grouping": "random",
}
"""Dotted overrides that restore the behaviour of the authors' code (specification section 11)."""

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "variant": ("mkd", "gmkdn"),
    "fidelity": ("corrected", "faithful"),
    "data.slide_choice": ("first_sorted", "largest_bag", "listing_order"),
    "data.grouping": ("size_balanced", "random"),
    "data.pool": IMPLS,
    "genes.filter": ("top", "bottom", "random"),
    "genes.ranking": ("cox", "anova", "variance", "table"),
    "genes.ranking_scope": ("per_fold_train", "global"),
    "genes.normalisation": ("precomputed_zscore", "log2p1_then_zscore_train_fold"),
    "genes.nan_policy": ("error", "zero"),
    "labels.her2_equivocal": ("drop", "negative", "fish_resolved"),
    "fusion.type": FUSIONS,
    "init.t_m": INITIALIZERS,
    "mkd.or_form": FORMS,
    "skd.scale": ("b", "1"),
    "inter_loss": (*INTER_LOSSES, NONE),
    "distill.schedule": (ONLINE, TWO_STAGE),
    "train.batching": ("packed", "padded", "grad_cache"),
    "train.lr_schedule": ("cosine50_floor0", "cosine50_periodic", "cosine_to_max_epochs"),
    "train.sampler": ("class_balanced_replacement", "uniform"),
    "train.compute_dtype": ("float32", "bfloat16"),
    "early_stop.monitor": ("mean_auc3", "student_auc"),
    "ckpt.teachers": ("best_joint", "last_epoch"),
    "infer.mode": ("pathology", "both", "genomics"),
    "infer.ensemble": ("none", "mean_prob"),
}
"""Allowed values of every enumerated key."""

_REFUSED_INTER_LOSSES = {
    "crd": "CRD needs two trainable projections and memory banks over the training set, which are not part of a step's "
    "outputs; its memory-free relative is inter_loss='infonce'",
    "at": "attention transfer compares spatial maps and is identically zero on pooled slide embeddings",
}


def null(kind: type) -> ml_collections.FieldReference:
    """A typed key without a value; a fresh reference, because a shared one would tie the keys together."""
    return ml_collections.config_dict.placeholder(kind)


def default_config() -> ml_collections.ConfigDict:
    """All keys of specification section 16 with their defaults, and those of the switches it names elsewhere.

    Returns:
      A new ConfigDict. Values that may be null use placeholders, so that overrides are type-checked.
    """
    return ml_collections.ConfigDict(
        dict(
            variant="mkd",
            fidelity="corrected",
            task="ER",
            # feat_dim: 0 takes the width of the data set.
            data=dict(
                feat_dim=1024,
                slide_choice="first_sorted",
                max_patches_train=null(int),
                grouping="size_balanced",
                chunk=512,
                pool="chunked",
            ),
            genes=dict(
                top_k=8192,
                token_size=512,
                filter="top",
                ranking="cox",
                ranking_scope="per_fold_train",
                normalisation="precomputed_zscore",
                exclude=(),
                nan_policy="error",
                clip=null(float),
            ),
            labels=dict(her2_equivocal="drop"),
            split=dict(stratify=True),
            # gene_dropout: null means model.dropout.
            model=dict(d=256, attn=128, dropout=0.25, gene_dropout=null(float), gene_input_dropout=0.0),
            fusion=dict(type="bilinear"),
            init=dict(t_m="torch_default"),
            teachers=("M", "G"),
            loss=dict(lambda_coral=1.0, lambda_or=1.0, lambda_skd=1.0, lambda_clod=1.0),
            mkd=dict(alpha=1.0 / 6.0, or_form="inner_abs_of_mean"),
            skd=dict(scale="b", stop_grad_teacher=False),
            clod=dict(temperature=4.0),
            inter_loss="sp",
            distill=dict(schedule="online"),
            train=dict(
                b=16,
                batching="packed",
                lr=2e-4,
                wd=1e-5,
                decay_bias=True,
                lr_schedule="cosine50_floor0",
                max_epochs=100,
                sampler="class_balanced_replacement",
                drop_last=True,
                compute_dtype="float32",
            ),
            early_stop=dict(monitor="mean_auc3", patience=5, min_epoch=5),
            ckpt=dict(teachers="best_joint"),
            eval=dict(teacher_dropout=False),
            infer=dict(mode="pathology", ensemble="none"),
        )
    )


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown values and contradictory switches.

    Args:
      config: with at least the keys of `default_config`.

    Raises:
      ValueError: naming the key, its value, what is expected and how to fix it.
    """
    _validate_inter_loss(config)
    for key, allowed in CHOICES.items():
        value = str(lookup(config, key))
        if value not in allowed:
            raise ValueError(f"{key} = {value!r} is unknown; use one of {allowed}")
    _validate_ranges(config)
    _validate_combinations(config)


def _validate_inter_loss(config: ml_collections.ConfigDict) -> None:
    reason = _REFUSED_INTER_LOSSES.get(lookup(config, "inter_loss"))
    if reason:
        raise ValueError(
            f"inter_loss = {config.inter_loss!r} cannot replace SKD: {reason}. Use one of {CHOICES['inter_loss']}"
        )


def _validate_ranges(config: ml_collections.ConfigDict) -> None:
    for key in ("model.d", "model.attn", "data.chunk", "genes.token_size", "genes.top_k"):
        _require(lookup(config, key) >= 1, config, key, "a positive integer")
    for key in ("model.dropout", "model.gene_dropout", "model.gene_input_dropout"):
        rate = lookup(config, key)
        _require(rate is None or 0.0 <= rate < 1.0, config, key, "a drop probability in [0, 1)")
    for key in ("lambda_coral", "lambda_or", "lambda_skd", "lambda_clod"):
        _require(lookup(config, f"loss.{key}") >= 0.0, config, f"loss.{key}", "a weight >= 0")
    _require(lookup(config, "clod.temperature") > 0.0, config, "clod.temperature", "a temperature > 0")
    clip = lookup(config, "genes.clip")
    _require(clip is None or clip > 0.0, config, "genes.clip", "a bound > 0, or null for no clipping")


def _require(condition: bool, config: ml_collections.ConfigDict, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {lookup(config, key)!r} is out of range; expected {expected}")


def _validate_combinations(config: ml_collections.ConfigDict) -> None:
    teachers = tuple(config.teachers)
    if len(set(teachers)) != len(teachers) or not set(teachers) <= {"M", "G"}:
        raise ValueError(f"teachers = {teachers} is not a selection from ('M', 'G') without repetition")
    weights = dict(config.loss)
    active = sorted(k for k in ("lambda_coral", "lambda_or", "lambda_skd", "lambda_clod") if weights[k])
    if not teachers and active:
        raise ValueError(
            f"teachers is empty, but loss.{active[0]} = {weights[active[0]]}: set loss.lambda_* = 0 for {active}"
        )
    if not teachers and config.distill.schedule == TWO_STAGE:
        raise ValueError("distill.schedule = 'two_stage' trains teachers first, but teachers is empty; use 'online'")
    if config.genes.top_k % config.genes.token_size:
        raise ValueError(
            f"genes.top_k = {config.genes.top_k} is not divisible by genes.token_size = {config.genes.token_size}"
        )
    if config.train.b < (2 if active else 1):
        raise ValueError(
            f"train.b = {config.train.b}: the distillation terms {active} couple the slides of a step and need "
            "train.b >= 2; or set their weights to 0"
        )
    if config.variant == "gmkdn" and config.fusion.type != BILINEAR:
        raise ValueError(f"variant = 'gmkdn' is defined with fusion.type = 'bilinear' only, got {config.fusion.type!r}")
    _validate_modes(config, teachers)


def _validate_modes(config: ml_collections.ConfigDict, teachers: tuple[str, ...]) -> None:
    needs = {"both": "M", "genomics": "G"}.get(config.infer.mode)
    if needs and needs not in teachers:
        raise ValueError(f"infer.mode = {config.infer.mode!r} needs teacher {needs!r}, but teachers = {teachers}")


def network_spec(config: ml_collections.ConfigDict, feat_dim: int, num_classes: int) -> NetworkSpec:
    """The architecture that a validated config asks for.

    Args:
      config: see `validate`.
      feat_dim: patch-embedding width of the data.
      num_classes: C of the data.

    Returns:
      A `NetworkSpec`.
    """
    model = config.model
    gene_rate = model.dropout if model.gene_dropout is None else model.gene_dropout
    return NetworkSpec(
        feat_dim=feat_dim,
        num_classes=num_classes,
        variant=config.variant,
        width=model.d,
        hidden=model.attn,
        fusion=config.fusion.type,
        init_t_m=config.init.t_m,
        tokens=TokenSpec(config.genes.token_size, gene_rate, model.gene_input_dropout, config.genes.clip),
        rate=model.dropout,
        gene_rate=gene_rate,
        dtype=jnp.bfloat16 if config.train.compute_dtype == "bfloat16" else None,
        chunk=config.data.chunk,
        pool=config.data.pool,
    )


def objective_spec(config: ml_collections.ConfigDict) -> ObjectiveSpec:
    """The objective that a validated config asks for."""
    return ObjectiveSpec(
        teachers=tuple(config.teachers),
        lambda_coral=config.loss.lambda_coral,
        lambda_or=config.loss.lambda_or,
        lambda_skd=config.loss.lambda_skd,
        lambda_clod=config.loss.lambda_clod,
        alpha=config.mkd.alpha,
        or_form=config.mkd.or_form,
        inter_loss=config.inter_loss,
        skd_scale=str(config.skd.scale),
        stop_grad_teacher=config.skd.stop_grad_teacher,
        temperature=config.clod.temperature,
    )
