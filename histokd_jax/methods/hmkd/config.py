"""Configuration of HM-KD: defaults (specification, section 12), presets, validation, split into specs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from histokd_jax.methods.hmkd import encoder
from histokd_jax.methods.hmkd.images import FLIP_MODES, INDEPENDENT, PAIRED
from histokd_jax.methods.hmkd.objective import COS_FEATURES, MAPS, REDUCTIONS, STUDENT, TEACHER, ObjectiveSpec
from histokd_jax.methods.settings import lookup
from histokd_jax.nn.paired.spec import ATTENTION_OUTPUT, BLOCK_INPUT, FFN_SOURCES, NormSpec, PairedSpec
from histokd_jax.ops.depthwise import FORMS
from histokd_jax.ops.image.presets import image_presets
from histokd_jax.ops.token_attention import GATED, GATES

TWO_STAGE, CACHED, TEACHER_ONLY = "two_stage", "cached", "teacher_only"
UNBIASED, BIASED = "unbiased", "biased"
NO_WEIGHTS, BALANCED = "none", "balanced"
FLIPS = "flips"
DTYPES: Mapping[str, Any] = {"float32": None, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

FAITHFUL: Mapping[str, Any] = {
    "student.cross_ffn_source": BLOCK_INPUT,
    "data.flip_mode": INDEPENDENT,
    "loss.cos_reduction": "sum",
    "norm.running_var": UNBIASED,
    "train.decay_bias": True,
    "split.protocol": "published",
}
"""Dotted settings of the release (specification, section 12)."""

CORRECTED: Mapping[str, Any] = {
    "student.cross_ffn_source": ATTENTION_OUTPUT,
    "data.flip_mode": PAIRED,
    "loss.cos_reduction": "mean",
    "loss.cos_weight": 16.0,
    "train.decay_bias": False,
    "split.protocol": "corrected",
}
"""Dotted settings that repair what the release does (D2, D3, D4, D15, D19)."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "data.flip_mode": FLIP_MODES,
    "data.augment": (FLIPS, *image_presets()),
    "model.attention_axis": ("token",),
    "model.attention_gate": GATES,
    "model.depthwise": FORMS,
    "norm.running_var": (UNBIASED, BIASED),
    "student.cross_ffn_source": FFN_SOURCES,
    "loss.cos_reduction": REDUCTIONS,
    "loss.cos_feature": COS_FEATURES,
    "loss.class_weights": (NO_WEIGHTS, BALANCED),
    "distill.schedule": (TWO_STAGE, CACHED, TEACHER_ONLY),
    "train.compute_dtype": tuple(DTYPES),
}
"""Allowed values of every enumerated key."""

WEIGHTS = ("loss.kd_weight", "loss.at_weight", "loss.cos_weight")


def default_config() -> ml_collections.ConfigDict:
    """All keys that this method reads, with the values of the release.

    Returns:
      A new ConfigDict.
    """
    spec = PairedSpec()
    return ml_collections.ConfigDict(
        dict(
            data=dict(flip_mode=INDEPENDENT, augment=FLIPS),
            model=dict(
                widths=spec.widths,
                stem_patch=spec.stem_patch,
                teacher_depths=spec.teacher_depths,
                student_depths=spec.student_depths,
                mlp_ratio=spec.mlp_ratio,
                attn_expand=spec.attn_expand,
                local_reduction=spec.local_reduction,
                local_kernels=spec.local_kernels,
                refine_reduction=spec.refine_reduction,
                refine_min=spec.refine_min,
                head_hidden=spec.head_hidden,
                attention_axis="token",
                attention_gate=GATED,
                bn_eps=spec.norm.eps,
                bn_update=spec.norm.update,
                gn_eps=spec.norm.group_eps,
                # Numbers of one block of an attention plane; larger planes are computed in blocks of rows.
                plane_elements=spec.plane_elements,
                depthwise=spec.depthwise_form,
                folded=spec.folded,
                # A pretrained patch encoder in the place of the stem, see `encoder`.
                encoder=dict(encoder.DEFAULTS),
            ),
            norm=dict(running_var=UNBIASED),
            student=dict(cross_ffn_source=BLOCK_INPUT),
            loss=dict(
                kd_temperature=5.0,
                kd_weight=1.0,
                at_weight=1.0,
                at_maps=("a",),
                cos_weight=1.0,
                cos_reduction="sum",
                cos_feature="f3",
                class_weights=NO_WEIGHTS,
                # Training examples of each class, for class_weights = balanced.
                class_counts=(),
                # Constant loss scale of compute_dtype = float16.
                scale=65536.0,
            ),
            # teacher: model folder of a finished run, in place of the first stage.
            distill=dict(schedule=TWO_STAGE, teacher=""),
            train=dict(b=16, compute_dtype="float32", drop_last=True),
        )
    )


def distils(config: ml_collections.ConfigDict) -> bool:
    """Whether any distillation term has a weight: without one, a student is trained alone and there is no teacher."""
    return any(lookup(config, key) for key in WEIGHTS)


def groups(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The networks that are trained by a run, in the order of their stages."""
    if config.distill.schedule == TEACHER_ONLY:
        return (TEACHER,)
    own_teacher = distils(config) and not config.distill.teacher
    return (TEACHER, STUDENT) if own_teacher else (STUDENT,)


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown values and contradictory switches.

    Args:
      config: with at least the keys of `default_config`.

    Raises:
      ValueError: naming the key, its value, what is expected and how to fix it.
    """
    for key, allowed in CHOICES.items():
        _require(lookup(config, key) in allowed, config, key, f"one of {allowed}")
    for key in WEIGHTS:
        _require(lookup(config, key) >= 0.0, config, key, "a weight >= 0")
    for key in ("loss.kd_temperature", "loss.scale", "model.bn_eps", "model.gn_eps"):
        _require(lookup(config, key) > 0.0, config, key, "a number > 0")
    _require(0.0 < lookup(config, "model.bn_update") <= 1.0, config, "model.bn_update", "a weight in (0, 1]")
    _require(lookup(config, "train.drop_last"), config, "train.drop_last", "True: a batch norm sees the whole step")
    _require(lookup(config, "train.b") >= 2, config, "train.b", "at least 2: the last batch norm sees only the batch")
    _require_maps(config)
    _validate_sizes(config)
    _validate_combinations(config)
    encoder.validate(config)


def _require_maps(config: ml_collections.ConfigDict) -> None:
    maps = tuple(lookup(config, "loss.at_maps"))
    known = maps and len(set(maps)) == len(maps) and set(maps) <= set(MAPS)
    _require(known, config, "loss.at_maps", f"a selection of {MAPS}")


def _validate_sizes(config: ml_collections.ConfigDict) -> None:
    for key in ("widths", "teacher_depths", "student_depths"):
        _require(len(lookup(config, f"model.{key}")) == 4, config, f"model.{key}", "four numbers, one per level")
    kernels = tuple(lookup(config, "model.local_kernels"))
    _require(kernels and all(k % 2 for k in kernels), config, "model.local_kernels", "odd sides")
    reduction = lookup(config, "model.local_reduction")
    least = 2 * reduction * len(kernels)
    fits = all(width % 2 == 0 and width >= least for width in lookup(config, "model.widths"))
    _require(fits, config, "model.widths", f"even numbers >= {least}: half of each is divided by local_reduction")
    for key in ("stem_patch", "mlp_ratio", "attn_expand", "refine_min", "head_hidden", "plane_elements"):
        _require(lookup(config, f"model.{key}") >= 1, config, f"model.{key}", "a positive integer")


def _validate_combinations(config: ml_collections.ConfigDict) -> None:
    schedule, folder = config.distill.schedule, config.distill.teacher
    if schedule == TEACHER_ONLY and folder:
        raise ValueError(f"distill.schedule = {schedule!r} trains a teacher, but distill.teacher = {folder!r} is one")
    if schedule == CACHED and not folder:
        raise ValueError(
            "distill.schedule = 'cached' computes the outputs of a finished teacher once: give distill.teacher = FOLDER"
        )
    if schedule == CACHED and config.data.augment != FLIPS:
        raise ValueError(
            f"distill.schedule = 'cached' knows all pairs of flips, but data.augment = {config.data.augment!r} draws "
            "numbers without end: set data.augment = 'flips', or run the teacher beside the student"
        )
    if config.loss.class_weights == BALANCED and not all(n > 0 for n in config.loss.class_counts or (0,)):
        raise ValueError(
            f"loss.class_weights = 'balanced' needs loss.class_counts, the training examples of each class, all > 0; "
            f"got {tuple(config.loss.class_counts)}"
        )


def _require(condition: Any, config: ml_collections.ConfigDict, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {lookup(config, key)!r} is not possible; expected {expected}")


def paired_spec(config: ml_collections.ConfigDict, num_classes: int) -> PairedSpec:
    """The architecture that a validated config asks for."""
    model = config.model
    names = ("mlp_ratio", "attn_expand", "local_reduction", "refine_reduction", "refine_min", "head_hidden")
    tuples = ("widths", "teacher_depths", "student_depths", "local_kernels")
    return PairedSpec(
        **{name: model[name] for name in (*names, "stem_patch", "plane_elements")},
        **{name: tuple(model[name]) for name in tuples},
        num_classes=num_classes,
        gate=model.attention_gate,
        cross_ffn_source=config.student.cross_ffn_source,
        norm=NormSpec(model.bn_eps, model.bn_update, config.norm.running_var == UNBIASED, model.gn_eps),
        dtype=DTYPES[config.train.compute_dtype],
        depthwise_form=model.depthwise,
        # Models that were written before this key existed lack it.
        folded=model.get("folded", True),
    )


def objective_spec(config: ml_collections.ConfigDict) -> ObjectiveSpec:
    """The objective that a validated config asks for."""
    loss = config.loss
    counts = tuple(loss.class_counts)
    balanced = tuple(sum(counts) / (len(counts) * n) for n in counts) if loss.class_weights == BALANCED else ()
    return ObjectiveSpec(
        temperature=loss.kd_temperature,
        kd_weight=loss.kd_weight,
        at_weight=loss.at_weight,
        at_maps=tuple(loss.at_maps),
        cos_weight=loss.cos_weight,
        cos_reduction=loss.cos_reduction,
        cos_feature=loss.cos_feature,
        class_weights=balanced,
    )
