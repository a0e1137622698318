"""Configuration of self-supervised pre-training: defaults, presets, validation, split into specs (part G)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from histokd_jax.losses.joint_embedding import BATCH_NORM, CONSTANT_OUTSIDE, COVARIANCES
from histokd_jax.methods.settings import lookup
from histokd_jax.methods.ssl import objective as objectives
from histokd_jax.methods.ssl import views as seen
from histokd_jax.methods.ssl.layout import LAYOUTS, SKIP, TRIDENT, Layout, make_layout
from histokd_jax.methods.ssl.objective import ObjectiveSpec
from histokd_jax.nn.encoders.specs import GLOROT, HE, ResNetSpec, Spec, ViTSpec
from histokd_jax.ops.image.presets import image_presets

RESNET, VIT, MLP, AUTO = "resnet", "vit", "mlp", "auto"
GLOBAL, PER_DEVICE = "global", "per_device"
FREEZE, BN_EVAL_ONLY = "freeze", "bn_eval_only"
DTYPES: Mapping[str, Any] = {"float32": None, "bfloat16": jnp.bfloat16}

FAITHFUL: Mapping[str, Any] = {
    "loss.reduction": objectives.SUM,
    "loss.assembly": objectives.BRANCH_SUM,
    "loss.ddof": 0,
    "loss.eps": 1e-5,
    "loss.barlow_off_diagonal": 25.0,
    "loss.barlow_branches": objectives.TWO_ONLY,
    "loss.scope": PER_DEVICE,
    "bn.scope": PER_DEVICE,
    "train.nonfinite": "fill",
    "train.lr_first_step": 0,
    "train.optimizer": "keras_adam",
    "augment.solarise_scale": 1.0,
    "augment.brightness": 0.4,
    "augment.noise": seen.BEFORE_ROTATION,
    "augment.shared_geometry": False,
    "augment.privileged": seen.FULL,
    "augment.validation": seen.AUGMENTED,
    "augment.gene_update": seen.NO_UPDATE,
    "augment.gene_noise": seen.RAW,
    "encoder.input": seen.RAW,
    "train_flags.mode": BN_EVAL_ONLY,
}
"""Dotted settings of the released code (specification, part E)."""

CORRECTED: Mapping[str, Any] = {
    "loss.reduction": objectives.SUM,
    "loss.assembly": objectives.PAIRWISE_ORIGINAL,
    "loss.ddof": 1,
    "loss.eps": 1e-4,
    "loss.barlow_off_diagonal": 0.005,
    "loss.barlow_branches": objectives.ALL_PAIRS,
    "loss.scope": GLOBAL,
    "bn.scope": GLOBAL,
    "train.nonfinite": "skip",
    "train.lr_first_step": 1,
    "train.optimizer": "adamw",
    "augment.solarise_scale": 255.0,
    "augment.brightness": 102.0,
    "augment.noise": seen.AFTER_ROTATION,
    "augment.shared_geometry": True,
    "augment.privileged": seen.GEOMETRIC_ONLY,
    "augment.validation": seen.PLAIN,
    "augment.gene_update": seen.PERMUTE,
    "augment.gene_noise": seen.AFTER_LOG,
    "encoder.input": seen.STANDARDISED,
    "train_flags.mode": FREEZE,
}
"""Dotted settings of the specification's proposals; the sum, clipped at 1, stays: it is the mean clipped at 1/B."""

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "layout.name": LAYOUTS,
    "loss.name": objectives.NAMES,
    "loss.assembly": (objectives.BRANCH_SUM, objectives.PAIRWISE_ORIGINAL),
    "loss.ddof": (0, 1),
    "loss.barlow_branches": (objectives.ALL_PAIRS, objectives.TWO_ONLY),
    "loss.barlow_normalisation": (CONSTANT_OUTSIDE, BATCH_NORM),
    "loss.covariance_form": COVARIANCES,
    "loss.reduction": (objectives.SUM, objectives.MEAN),
    "loss.scope": (GLOBAL, PER_DEVICE),
    "bn.scope": (GLOBAL, PER_DEVICE),
    "encoder.kind": (RESNET, VIT),
    "encoder.kernel_init": (GLOROT, HE),
    "encoder.input": (seen.RAW, seen.STANDARDISED),
    "privileged_encoder.kind": (AUTO, RESNET, VIT, MLP),
    "privileged.source": seen.SOURCES,
    "augment.preset": (seen.A4, *image_presets()),
    "augment.noise": (seen.BEFORE_ROTATION, seen.AFTER_ROTATION),
    "augment.privileged": seen.PRIVILEGED_AUGMENT,
    "augment.validation": (seen.AUGMENTED, seen.PLAIN),
    "augment.gene_update": (seen.NO_UPDATE, seen.PERMUTE),
    "augment.gene_noise": (seen.RAW, seen.AFTER_LOG),
    "train_flags.mode": (FREEZE, BN_EVAL_ONLY),
    "train.compute_dtype": tuple(DTYPES),
}
"""Allowed values of every enumerated key."""


def default_config() -> ml_collections.ConfigDict:
    """All keys that this method reads, with the defaults of the specification (bold in its part E).

    Returns:
      A new ConfigDict.
    """
    return ml_collections.ConfigDict(
        dict(
            layout=dict(name=TRIDENT, share_primary=True, encoders=(), projectors=()),
            encoder=dict(
                kind=RESNET,
                blocks=(3, 4, 6, 3),
                width=64,
                stride_in_3x3=False,
                conv_bias=True,
                bn_eps=1.001e-5,
                bn_momentum=0.99,
                kernel_init=GLOROT,
                patch=16,
                token_width=384,
                depth=12,
                heads=6,
                input=seen.RAW,
                init="",
            ),
            privileged_encoder=dict(kind=AUTO, widths=(2048, 2048, 2048), init=""),
            projector=dict(widths=(8192, 8192, 8192), bn_eps=1e-3, bn_momentum=0.99, last_bias=True),
            bn=dict(scope=GLOBAL, mask_missing=True),
            loss=dict(
                name=objectives.VICREG,
                assembly=objectives.BRANCH_SUM,
                invariance=25.0,
                variance=25.0,
                covariance=1.0,
                gamma=1.0,
                eps=1e-5,
                ddof=0,
                temperature=0.5,
                barlow_off_diagonal=0.005,
                barlow_branches=objectives.ALL_PAIRS,
                barlow_normalisation=CONSTANT_OUTSIDE,
                covariance_form="auto",
                split_dims=(),
                reduction=objectives.SUM,
                scope=GLOBAL,
            ),
            privileged=dict(source=seen.REAL, blank=128.0),
            augment=dict(
                preset=seen.A4,
                solarise_scale=1.0,
                brightness=0.4,
                noise=seen.BEFORE_ROTATION,
                shared_geometry=False,
                privileged=seen.FULL,
                validation=seen.AUGMENTED,
                gene_update=seen.PERMUTE,
                gene_noise=seen.RAW,
            ),
            train_flags=dict(frozen=(), mode=FREEZE),
            export=dict(privileged=False),
            train=dict(b=256, compute_dtype="float32", drop_last=True),
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
        _require(lookup(config, key) in allowed, config, key, f"one of {allowed}")
    for key in ("invariance", "variance", "covariance", "barlow_off_diagonal"):
        _require(lookup(config, f"loss.{key}") >= 0.0, config, f"loss.{key}", "a weight >= 0")
    for key in ("loss.eps", "loss.temperature", "loss.gamma", "projector.bn_eps", "encoder.bn_eps"):
        _require(lookup(config, key) > 0.0, config, key, "a number > 0")
    _require(0.0 <= config.privileged.blank <= 255.0, config, "privileged.blank", "a grey level in 0..255")
    _require(lookup(config, "train.drop_last"), config, "train.drop_last", "True: statistics are over whole steps")
    least = "at least 2: a joint-embedding loss and its batch norms compare the examples of a step"
    _require(lookup(config, "train.b") >= 2, config, "train.b", least)
    layout = layout_of(config)
    _validate_loss(config, layout)
    _validate_views(config, layout)
    unknown = sorted(set(config.train_flags.frozen) - set(layout.groups()))
    _require(not unknown, config, "train_flags.frozen", f"some of {layout.groups()}")
    trained = set(layout.groups()) - set(config.train_flags.frozen)
    _require(bool(trained), config, "train_flags.frozen", "not all of them: nothing would be trained")


def _validate_loss(config: ml_collections.ConfigDict, layout: Layout) -> None:
    loss, split = config.loss, tuple(config.loss.split_dims)
    if loss.name == objectives.BARLOW and loss.barlow_branches == objectives.TWO_ONLY and layout.branches > 2:
        raise ValueError(
            f"loss.barlow_branches = {objectives.TWO_ONLY!r} is the released form for two branches, layout "
            f"{config.layout.name} has {layout.branches}: set loss.barlow_branches={objectives.ALL_PAIRS}"
        )
    if not split:
        return
    if loss.name == objectives.BARLOW or loss.assembly == objectives.PAIRWISE_ORIGINAL:
        raise ValueError(
            f"loss.split_dims = {split} is defined for infonce, and for vicreg with loss.assembly=branch_sum (section "
            f"C5), not for {loss.name}, {loss.assembly}"
        )
    if len(split) != layout.branches - 1:
        raise ValueError(
            f"loss.split_dims = {split}: layout {config.layout.name} has {layout.branches - 1} branches beside the "
            "first, and each needs a chunk"
        )
    widths = tuple(config.projector.widths)
    if widths and sum(split) != widths[-1]:
        raise ValueError(
            f"loss.split_dims = {split} sum to {sum(split)}, the embedding is {widths[-1]} wide (projector.widths): it "
            "cannot be divided so"
        )


def _validate_views(config: ml_collections.ConfigDict, layout: Layout) -> None:
    augment = config.augment
    if not layout.reads_partner() and config.privileged.source != seen.REAL:
        raise ValueError(
            f"privileged.source = {config.privileged.source!r}, but layout {config.layout.name} has no privileged view"
        )
    if augment.shared_geometry and augment.preset == seen.A4 and augment.privileged == seen.NO_AUGMENT:
        raise ValueError(
            "augment.shared_geometry=True moves all views alike, augment.privileged='none' does not move the "
            "privileged one: choose one of them"
        )


def _require(condition: Any, config: ml_collections.ConfigDict, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {lookup(config, key)!r} is not possible; expected {expected}")


def layout_of(config: ml_collections.ConfigDict) -> Layout:
    """The branches that a config asks for."""
    layout = config.layout
    none = () if config.projector.widths else (SKIP,)
    return make_layout(
        layout.name,
        share_primary=layout.share_primary,
        encoders=tuple(layout.encoders),
        projectors=none or tuple(layout.projectors),
        own_projectors=bool(config.loss.split_dims),
    )


def encoder_spec(config: ml_collections.ConfigDict, kind: str, edge: int) -> Spec:
    """Architecture of an image encoder.

    Args:
      config: with the section `encoder`.
      kind: "resnet" or "vit".
      edge: of its images.
    """
    own = config.encoder
    if kind == VIT:
        return ViTSpec(own.patch, own.token_width, own.depth, own.heads, 4 * own.token_width, edge)
    names = ("width", "stride_in_3x3", "conv_bias", "bn_eps", "bn_momentum", "kernel_init")
    return ResNetSpec(tuple(own.blocks), image=edge, **{name: own[name] for name in names})


def objective_spec(config: ml_collections.ConfigDict, devices: int) -> ObjectiveSpec:
    """The loss that a validated config asks for, on some devices."""
    loss = config.loss
    names = (
        "name",
        "assembly",
        "invariance",
        "variance",
        "covariance",
        "gamma",
        "eps",
        "ddof",
        "temperature",
        "reduction",
    )
    return ObjectiveSpec(
        **{name: loss[name] for name in names},
        off_diagonal=loss.barlow_off_diagonal,
        normalisation=loss.barlow_normalisation,
        barlow_branches=loss.barlow_branches,
        form=loss.covariance_form,
        split=tuple(loss.split_dims),
        shards=devices if loss.scope == PER_DEVICE else 1,
    )
