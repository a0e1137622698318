"""Configuration of survival distillation: defaults, validation, and what each network is told as a supervised run."""

from __future__ import annotations

from collections.abc import Mapping

import ml_collections

from histokd_jax.methods.settings import lookup
from histokd_jax.methods.supervised import config as supervised
from histokd_jax.methods.supervised.networks import GENES, PATCHES
from histokd_jax.methods.supervised.objective import COX
from histokd_jax.methods.survival_kd import objective
from histokd_jax.methods.survival_kd.objective import STUDENT, TEACHER, ObjectiveSpec
from histokd_jax.types import SURVIVAL

ONLINE, TWO_STAGE, CACHED = "online", "two_stage", "cached"
SCHEDULES = (ONLINE, TWO_STAGE, CACHED)
ROWS = ("same_fold", "out_of_sample")
LEAKAGE = ("error", "mark")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "distill.schedule": SCHEDULES,
    "distill.rows": ROWS,
    "distill.leakage": LEAKAGE,
}
"""Allowed values of every enumerated key of this method's own."""
LAMBDAS = ("loss.lambda_hazard", "loss.lambda_event", "loss.lambda_order")
_LOSSES = ("survival", "alpha", "clamp", "ties", "l1", "l1_scaling", "instance_weight", "instance_loss")
_LOSSES += ("instance_on", "subtyping", "max_weight")


def default_config() -> ml_collections.ConfigDict:
    """All keys that this method reads; `teacher.NAME` and `student.NAME` hold the options of network NAME.

    Returns:
      A new ConfigDict.
    """
    base = supervised.default_config().to_dict()
    networks = base["model"]
    loss = {name: base["loss"][name] for name in _LOSSES}
    return ml_collections.ConfigDict(
        dict(
            data=base["data"],
            teacher={**networks, "name": "porpoise_mmf"},
            student={**networks, "name": "abmil"},
            loss={**loss, "teacher_l1": 0.0, "lambda_hazard": 1.0, "lambda_event": 0.0, "lambda_order": 0.0},
            distill=dict(
                schedule=ONLINE,
                temperature=1.0,
                order_temperature=1.0,
                at_risk=True,
                # Of the cached schedule: predictions of the teacher, the run they come from, and what is taken.
                table="",
                table_mode="",
                teacher_run="",
                rows="same_fold",
                leakage="error",
                allow_missing=False,
            ),
            train=dict(**base["train"], b=32),
        )
    )


def as_supervised(config: ml_collections.ConfigDict, group: str) -> ml_collections.ConfigDict:
    """The supervised run of one network on its own.

    Args:
      config: with the keys of `default_config`.
      group: "teacher" or "student".
    """
    loss = {name: lookup(config, f"loss.{name}") for name in _LOSSES}
    if group == TEACHER:
        loss["l1"] = lookup(config, "loss.teacher_l1")
    data = {name: lookup(config, f"data.{name}") for name in ("feat_dim", "chunk", "pool")}
    return ml_collections.ConfigDict(
        dict(
            data=data,
            model=lookup(config, group).to_dict(),
            loss={**loss, "classification": "ce"},
            infer=dict(average_max=False),
            train=dict(compute_dtype=lookup(config, "train.compute_dtype")),
        )
    )


def groups(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The networks that a run holds: a cached teacher is a table."""
    return (STUDENT,) if config.distill.schedule == CACHED else (STUDENT, TEACHER)


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown values and contradictory switches.

    Args:
      config: with at least the keys of `default_config`.

    Raises:
      ValueError: naming the key, its value, what is expected and how to fix it.
    """
    for key, allowed in CHOICES.items():
        _require(lookup(config, key) in allowed, config, key, f"one of {allowed}")
    for key in LAMBDAS:
        _require(lookup(config, key) >= 0.0, config, key, "a weight >= 0")
    for key in ("distill.temperature", "distill.order_temperature"):
        _require(lookup(config, key) > 0.0, config, key, "a temperature > 0")
    for group in groups(config):
        _validate_network(config, group)
    _validate_combinations(config)


def renamed(error: ValueError, group: str) -> ValueError:
    """An error of the supervised method in the keys of this one, e.g. "student.name" for "model.name"."""
    text = str(error).replace("model.", f"{group}.")
    return ValueError(text.replace("loss.l1 =", "loss.teacher_l1 =") if group == TEACHER else text)


def _validate_network(config: ml_collections.ConfigDict, group: str) -> None:
    run = as_supervised(config, group)
    try:
        supervised.validate(run)
    except ValueError as error:
        raise renamed(error, group) from None
    entry, options = supervised.selected(run)
    reads = tuple(entry.reads(options))
    name = run.model.name
    if group == STUDENT and (GENES in reads or PATCHES not in reads):
        raise ValueError(
            f"student.name = {name!r} with these options reads {', '.join(reads)}: a student reads slides only; choose "
            f"another network, or student.{name}.fusion = 'none' where it has this option"
        )
    if group == TEACHER and GENES not in reads:
        raise ValueError(
            f"teacher.name = {name!r} with these options reads {', '.join(reads)}: a teacher reads genes as well; set "
            f"teacher.{name}.fusion where it has this option, or choose snn, mcat, porpoise_mmf or survpath"
        )


def _validate_combinations(config: ml_collections.ConfigDict) -> None:
    active = [key for key in LAMBDAS if lookup(config, key)]
    hazards = [key for key in active if key != "loss.lambda_order"]
    if config.loss.survival == COX and hazards:
        raise ValueError(
            f"{hazards[0]} = {lookup(config, hazards[0])} compares hazards, but loss.survival = 'cox' has none: set "
            f"{' and '.join(hazards)} to 0 and use loss.lambda_order, or loss.survival = 'nll'"
        )
    if "loss.lambda_order" in active and lookup(config, "train.b") < 2:
        raise ValueError(
            f"train.b = {config.train.b}: loss.lambda_order compares pairs and needs train.b >= 2; or set it to 0"
        )
    if config.distill.schedule == CACHED and not config.distill.table:
        raise ValueError(
            "distill.schedule = 'cached' needs distill.table = FILE, the predictions of a teacher, see the README"
        )


def _require(condition: bool, config: ml_collections.ConfigDict, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {lookup(config, key)!r} is not possible; expected {expected}")


def objective_spec(config: ml_collections.ConfigDict) -> ObjectiveSpec:
    """The objective that a validated config asks for."""
    own = {
        group: supervised.objective_spec(as_supervised(config, group), SURVIVAL, group == TEACHER)
        for group in groups(config)
    }
    return ObjectiveSpec(
        student=own[STUDENT],
        teacher=own.get(TEACHER),
        at_risk=config.distill.at_risk,
        **{field: lookup(config, key) for key, field in objective.TRACED.items()},
    )
