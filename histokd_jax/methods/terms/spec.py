"""What a configuration says about every term: weight, schedule, layers, connector, options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from histokd_jax.losses import catalogue
from histokd_jax.methods.terms.schedules import Schedule, parse_schedule, schedule_keys
from histokd_jax.nn.connectors import KINDS

DEFAULT_VIEWS = {catalogue.LOGITS: "logits", catalogue.VECTOR: "embedding"}
ARROW, PLUS = ">", "+"
_KEYS = ("weight", "layers", "connector", "width", "teacher_gradient", "options", *schedule_keys())


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a composition.

    Attributes:
      name: in the catalogue.
      weight: of its value; may be a traced scalar.
      schedule: share of the weight over the steps.
      layers: (student view, teacher view) pairs; a pair of maps is "LOWER+UPPER".
      connector: "" for none, "linear" or "mlp": trained map of the student's channels.
      width: 0: to the teacher's width, on the student alone; else both sides are mapped to it by connectors of their
        own, as CRD does.
      teacher_gradient: of online training only: whether the term may train the teacher. Losses that are made to train
        both sides do so anyway.
      options: keyword arguments of the loss.
    """

    name: str
    weight: float | jax.Array
    schedule: Schedule = Schedule()
    layers: tuple[tuple[str, str], ...] = ()
    connector: str = ""
    width: int = 0
    teacher_gradient: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def entry(self) -> catalogue.Entry:
        """The loss in the catalogue."""
        return catalogue.entry(self.name)

    def layer_weights(self) -> tuple[float, ...]:
        """Factor of every layer pair."""
        weigh = self.entry.layer_weights
        return weigh(len(self.layers)) if weigh else (1.0,) * len(self.layers)


def parse_terms(given: Mapping[str, Any], *, online: bool = False) -> tuple[Term, ...]:
    """Reads the section `terms` of a configuration; terms of weight 0 are left out and never computed.

    Args:
      given: name -> weight, or mapping.
      online: whether the teacher is trained at the same time.

    Returns:
      The terms, in the order given.

    Raises:
      ValueError: an unknown term (with the nearest name), key, view or option, or a term that trains a teacher which
        does not learn.
    """
    terms = [_parse(str(name), value) for name, value in given.items()]
    terms = [term for term in terms if isinstance(term.weight, jax.Array) or term.weight]
    for term in terms:
        if not online and term.name in ("dml", "kdcl"):
            raise ValueError(f"term {term.name!r} trains teacher and student together: train online, or use 'kd'")
        if not online and term.teacher_gradient:
            raise ValueError(f"terms.{term.name}.teacher_gradient: a frozen or cached teacher has no gradient")
    return tuple(terms)


def _parse(name: str, value: Any) -> Term:
    entry = catalogue.entry(name)
    settings = {"weight": value} if isinstance(value, (int, float, jax.Array)) else dict(value)
    unknown = sorted(set(settings) - set(_KEYS))
    if unknown:
        raise ValueError(f"terms.{name} has no key {unknown[0]!r}; it has {sorted(_KEYS)}")
    weight = settings.get("weight", entry.weight)
    if not isinstance(weight, jax.Array) and weight < 0.0:
        raise ValueError(f"terms.{name}.weight = {weight} is possible as a weight >= 0 only")
    connector = str(settings.get("connector", "") or "")
    if connector and connector not in KINDS:
        raise ValueError(f"terms.{name}.connector = {connector!r} is unknown; use one of {KINDS} or '' for none")
    width = int(settings.get("width", 0))
    if width and not connector:
        raise ValueError(f"terms.{name}.width = {width} is the width of connectors: set terms.{name}.connector")
    return Term(
        name,
        weight,
        parse_schedule(name, settings),
        _parse_layers(name, entry, settings.get("layers", ())),
        connector,
        width,
        bool(settings.get("teacher_gradient", False)),
        catalogue.checked_options(name, settings.get("options", {})),
    )


def _parse_layers(name: str, entry: catalogue.Entry, given: Any) -> tuple[tuple[str, str], ...]:
    texts = (given,) if isinstance(given, str) and given else tuple(given or ())
    if not texts:
        if entry.reads not in DEFAULT_VIEWS:
            raise ValueError(f"terms.{name}.layers is empty: {name} compares maps; name them, as STUDENT{ARROW}TEACHER")
        view = DEFAULT_VIEWS[entry.reads]
        return ((view, view),)
    pairs = []
    for text in texts:
        student, arrow, teacher = str(text).partition(ARROW)
        pair = (student.strip(), teacher.strip() if arrow else student.strip())
        if not all(pair) or any((PLUS in view) != (entry.reads == catalogue.MAP_PAIR) for view in pair):
            form = f"LOWER{PLUS}UPPER" if entry.reads == catalogue.MAP_PAIR else "VIEW"
            raise ValueError(f"terms.{name}.layers holds {text!r}; expected {form}{ARROW}{form}, student first")
        pairs.append(pair)
    return tuple(pairs)


def with_weights(terms: tuple[Term, ...], weights: Mapping[str, jax.Array]) -> tuple[Term, ...]:
    """The same terms with some weights replaced by data; one program then serves several settings."""
    unknown = sorted(set(weights) - {term.name for term in terms})
    if unknown:
        raise ValueError(f"weights of {unknown} are given, but the terms are {[term.name for term in terms]}")
    return tuple(dataclasses.replace(term, weight=weights.get(term.name, term.weight)) for term in terms)
