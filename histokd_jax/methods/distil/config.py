"""Configuration of distillation with named terms: defaults, validation, and each network as a supervised run."""

from __future__ import annotations

from collections.abc import Mapping

import ml_collections

from histokd_jax.losses import catalogue
from histokd_jax.methods import terms as compositions
from histokd_jax.methods.distil.objective import STUDENT, TEACHER, ObjectiveSpec
from histokd_jax.methods.settings import lookup
from histokd_jax.methods.supervised import config as supervised
from histokd_jax.methods.supervised.networks import GENES, PATCHES
from histokd_jax.methods.supervised.objective import COX
from histokd_jax.types import SURVIVAL

ONLINE, TWO_STAGE = "online", "two_stage"
SCHEDULES = (ONLINE, TWO_STAGE)
GROUPS = (STUDENT, TEACHER)
_HAZARDS = ("hazard", "event")
REFUSED: Mapping[str, str] = {
    "crd": "its memory has one row per training example, which a step of slides does not carry",
    "queue_infonce": "its queue is a state that lies between steps, which the objective of a step does not carry",
    "srrl": "the networks of this method do not offer their classifier apart from their embedding",
    "ofd": "it needs the batch norm in front of the teacher's last activation, which these networks lack",
}
"""Terms of the catalogue that slide networks cannot use, and why."""


def default_config() -> ml_collections.ConfigDict:
    """All keys that this method reads; `terms.NAME` holds the settings of term NAME.

    Returns:
      A new ConfigDict.
    """
    base = supervised.default_config().to_dict()
    networks = base["model"]
    return ml_collections.ConfigDict(
        dict(
            data=base["data"],
            teacher={**networks, "name": "porpoise_mmf"},
            student={**networks, "name": "abmil"},
            loss={**base["loss"], "teacher_l1": 0.0, "own_weight": 1.0, "lambda_terms": 1.0},
            distill=dict(schedule=ONLINE),
            terms={},
            train=dict(**base["train"], b=32),
        )
    )


def as_supervised(config: ml_collections.ConfigDict, group: str) -> ml_collections.ConfigDict:
    """The supervised run of one network on its own.

    Args:
      config: with the keys of `default_config`.
      group: "teacher" or "student".
    """
    loss = {name: lookup(config, f"loss.{name}") for name in supervised.default_config().loss}
    if group == TEACHER:
        loss["l1"] = lookup(config, "loss.teacher_l1")
    data = {name: lookup(config, f"data.{name}") for name in ("feat_dim", "chunk", "pool")}
    return ml_collections.ConfigDict(
        dict(
            data=data,
            model=lookup(config, group).to_dict(),
            loss=loss,
            infer=dict(average_max=False),
            train=dict(compute_dtype=lookup(config, "train.compute_dtype")),
        )
    )


def renamed(error: ValueError, group: str) -> ValueError:
    """An error of the supervised method in the keys of this one, e.g. "student.name" for "model.name"."""
    text = str(error).replace("model.", f"{group}.")
    return ValueError(text.replace("loss.l1 =", "loss.teacher_l1 =") if group == TEACHER else text)


def active_terms(config: ml_collections.ConfigDict) -> tuple[compositions.Term, ...]:
    """The terms with a weight; none if `loss.lambda_terms` is 0."""
    terms = compositions.parse_terms(lookup(config, "terms"), online=config.distill.schedule == ONLINE)
    return terms if lookup(config, "loss.lambda_terms") else ()


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown values and contradictory switches.

    Args:
      config: with at least the keys of `default_config`.

    Raises:
      ValueError: naming the key, its value, what is expected and how to fix it.
    """
    _require(lookup(config, "distill.schedule") in SCHEDULES, config, "distill.schedule", f"one of {SCHEDULES}")
    for key in ("loss.own_weight", "loss.lambda_terms"):
        _require(lookup(config, key) >= 0.0, config, key, "a weight >= 0")
    for group in GROUPS:
        _validate_network(config, group)
    terms = active_terms(config)
    for term in terms:
        if term.name in REFUSED:
            raise ValueError(f"terms.{term.name} cannot distil slide networks: {REFUSED[term.name]}")
    coupled = [term.name for term in terms if term.entry.couples_batch]
    if coupled and lookup(config, "train.b") < 2:
        raise ValueError(
            f"train.b = {config.train.b}: terms.{coupled[0]} couples the slides of a step; use train.b >= 2"
        )


def validate_task(terms: tuple[compositions.Term, ...], task: str, survival: str) -> None:
    """Refuses terms on logits that mean something else in a task.

    Args:
      terms: see `active_terms`.
      task: "classification" or "survival".
      survival: loss of a survival task.

    Raises:
      ValueError: a softmax of hazards, hazards of classes, or those of a Cox head, which has none.
    """
    for term in terms:
        reads_logits = term.entry.reads == catalogue.LOGITS
        if task == SURVIVAL and reads_logits and term.name not in _HAZARDS:
            raise ValueError(f"terms.{term.name} distils class probabilities, and a survival network has hazards: use "
                             "terms.hazard or terms.event")  # fmt: skip
        if task != SURVIVAL and term.name in _HAZARDS:
            raise ValueError(f"terms.{term.name} distils hazards, and the task is {task!r}: use terms.kd")
        if task == SURVIVAL and reads_logits and survival == COX:
            raise ValueError(
                f"terms.{term.name} distils hazards, and loss.survival = 'cox' has none: use terms on embeddings, or "
                "loss.survival = 'nll'"
            )


def _validate_network(config: ml_collections.ConfigDict, group: str) -> None:
    run = as_supervised(config, group)
    try:
        supervised.validate(run)
    except ValueError as error:
        raise renamed(error, group) from None
    entry, options = supervised.selected(run)
    reads = tuple(entry.reads(options))
    if group == STUDENT and (GENES in reads or PATCHES not in reads):
        raise ValueError(
            f"student.name = {run.model.name!r} with these options reads {', '.join(reads)}: a student reads slides "
            "only; choose another network, or fusion = 'none' where it has this option"
        )


def _require(condition: bool, config: ml_collections.ConfigDict, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {lookup(config, key)!r} is not possible; expected {expected}")


def objective_spec(config: ml_collections.ConfigDict, task: str, reads_genes: Mapping[str, bool]) -> ObjectiveSpec:
    """The objective that a validated config asks for.

    Args:
      config: see `validate`.
      task: of the data.
      reads_genes: by group.
    """
    own = {g: supervised.objective_spec(as_supervised(config, g), task, reads_genes[g]) for g in GROUPS}
    return ObjectiveSpec(
        student=own[STUDENT],
        teacher=own[TEACHER],
        terms=active_terms(config),
        own_weight=config.loss.own_weight,
        lambda_terms=config.loss.lambda_terms,
    )
