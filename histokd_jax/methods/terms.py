"""Named composition of the loss catalogue: `terms = {"kd": 0.9, "sp": 3000, ...}` between any teacher and student.

A term is given as its weight, or as a mapping with `weight`, a schedule (`schedule`, `steps`, ..., see
`term_schedules`), `layers` ("STUDENT>TEACHER" views that it compares), a `connector` where widths differ, and `options`
of the loss. Networks hand over views: name -> [b, C, ...]. `connect` belongs into a method's forward pass, since
connectors are parameters; `values` and `total` into its objective, which sees the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from histokd_jax.losses import catalogue, memory, vid_rho
from histokd_jax.methods.term_schedules import Schedule, parse_schedule, schedule_keys
from histokd_jax.nn.connectors import KINDS, Connector

Views = Mapping[str, jax.Array]
"""Name -> [b, C, ...] of one network, e.g. "logits", "embedding", and of cached teachers the stored arrays."""
Links = Mapping[str, jax.Array]
"""What the objective compares: "TERM/I/student", "TERM/I/teacher", and what else the term needs."""

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


def _view(views: Views, name: str, side: str, term: str) -> jax.Array:
    if name not in views:
        raise ValueError(f"terms.{term}.layers names the {side}'s view {name!r}; it has {sorted(views)}")
    return views[name]


def _shapes(views: Mapping[str, tuple[int, ...]], term: Term, name: str, side: str) -> list[tuple[int, ...]]:
    return [tuple(_view(views, part, side, term.name)) for part in name.split(PLUS)]


def check_views(
    terms: tuple[Term, ...], student: Mapping[str, tuple[int, ...]], teacher: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses, before anything is compiled, views that a term cannot compare.

    Args:
      terms: see `parse_terms`.
      student: view -> shape without the batch axis, channels first.
      teacher: the same of the teacher.

    Raises:
      ValueError: an absent view, a vector where maps are needed, or other widths without a connector.
    """
    for term in terms:
        for own, other in term.layers:
            for s, t in zip(_shapes(student, term, own, "student"), _shapes(teacher, term, other, "teacher")):
                _check_pair(term, own, other, s, t)


def _check_pair(term: Term, own: str, other: str, s: tuple[int, ...], t: tuple[int, ...]) -> None:
    entry = term.entry
    where = f"terms.{term.name} compares the student's {own!r} {s} with the teacher's {other!r} {t}"
    if entry.reads in (catalogue.MAP, catalogue.MAP_PAIR) and min(len(s), len(t)) < 2:
        raise ValueError(f"{where}: {term.name} needs maps [channels, positions ...], and one of them is a vector")
    if entry.reads == catalogue.LOGITS and term.connector:
        raise ValueError(f"terms.{term.name}.connector: logits are compared as they are")
    if entry.reads == catalogue.LOGITS and s != t:
        raise ValueError(f"{where}: logits must be of the same classes")
    if entry.same_width and not term.connector and s[0] != t[0]:
        raise ValueError(
            f"{where}: the widths {s[0]} and {t[0]} differ; set terms.{term.name}.connector = 'linear' or 'mlp', or use "
            "a term that compares relations (sp, cc, rkd, pkt, cka)"
        )


def _connectors(term: Term, i: int, teacher_width: int) -> dict[str, Connector]:
    if not term.connector:
        return {}
    sides = ("student", "teacher") if term.width else ("student",)
    return {side: Connector(term.width or teacher_width, term.connector) for side in sides}


def init_connectors(
    key: jax.Array,
    terms: tuple[Term, ...],
    student: Mapping[str, tuple[int, ...]],
    teacher: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """Parameters of all connectors and variances; trained with the student, not part of the exported one.

    Args:
      key: seed.
      terms: see `parse_terms`.
      student: view -> shape without the batch axis.
      teacher: the same.

    Returns:
      "TERM/I" -> {"student": ..., "teacher": ..., "rho": [C]}, as far as the term has them; {} without any.

    Raises:
      ValueError: see `check_views`.
    """
    check_views(terms, student, teacher)
    params: dict[str, Any] = {}
    for number, term in enumerate(terms):
        for i, (own, other) in enumerate(term.layers):
            key_i = jax.random.fold_in(jax.random.fold_in(key, number), i)
            found = _init_layer(key_i, term, i, student[own.split(PLUS)[0]], teacher[other.split(PLUS)[0]])
            if found:
                params[f"{term.name}{i}"] = found
    return params


def _init_layer(key: jax.Array, term: Term, i: int, s: tuple[int, ...], t: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k, (side, module) in enumerate(_connectors(term, i, t[0]).items()):
        example = jnp.zeros((1, *(s if side == "student" else t)))
        found[side] = module.init(jax.random.fold_in(key, k), example)["params"]
    if catalogue.RHO in term.entry.needs:
        found["rho"] = jnp.full((term.width or t[0],), vid_rho(), jnp.float32)
    return found


def connect(
    terms: tuple[Term, ...],
    params: Mapping[str, Any],
    student: Views,
    teacher: Views,
    *,
    online: bool = False,
    head: Callable[[jax.Array], jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """What the objective compares, behind the connectors; a constant teacher is stopped here.

    Args:
      terms: see `parse_terms`.
      params: see `init_connectors`.
      student: views of the student.
      teacher: views of the teacher; OFD also reads "VIEW_margin" [C], SRRL "logits".
      online: whether the teacher is trained at the same time.
      head: the teacher's frozen classifier of vectors, of SRRL only.

    Returns:
      "TERM/I/student", "TERM/I/teacher", and of pairs of maps, VID, OFD and SRRL the further arrays.

    Raises:
      ValueError: a view or the head is absent.
    """
    links: dict[str, jax.Array] = {}
    for term in terms:
        trained = online and (term.teacher_gradient or term.entry.trains_teacher)
        for i, (own, other) in enumerate(term.layers):
            at, layer = f"{term.name}/{i}", params.get(f"{term.name}{i}", {})
            s = [_view(student, part, "student", term.name) for part in own.split(PLUS)]
            t = [_view(teacher, part, "teacher", term.name) for part in other.split(PLUS)]
            t = t if trained else jax.lax.stop_gradient(t)
            for side, module in _connectors(term, i, t[0].shape[1]).items():
                arrays = s if side == "student" else t
                arrays[0] = module.apply({"params": layer[side]}, arrays[0])
            for k, (a, b) in enumerate(zip(s, t)):
                links |= {f"{at}/student{k or ''}": a, f"{at}/teacher{k or ''}": b}
            links |= _further(term, at, layer, s[0], teacher, other, head)
    return links


def _further(term, at, layer, connected, teacher, view, head) -> dict[str, jax.Array]:
    needs = term.entry.needs
    if catalogue.RHO in needs:
        return {f"{at}/rho": layer["rho"]}
    if catalogue.MARGIN in needs:
        return {f"{at}/margin": jax.lax.stop_gradient(_view(teacher, f"{view}_margin", "teacher", term.name))}
    if catalogue.HEAD_LOGITS in needs:
        if head is None:
            raise ValueError(
                f"term {term.name!r} needs the classifier of the teacher, which this teacher does not offer"
            )
        goal = jax.lax.stop_gradient(_view(teacher, "logits", "teacher", term.name))
        return {f"{at}/student_logits": head(connected), f"{at}/teacher_logits": goal}
    return {}


def init_memory(key: jax.Array, terms: tuple[Term, ...], examples: int, links: Links) -> dict[str, Any]:
    """States of the terms that have one: CRD memories of `examples` rows, queues of as many keys.

    Args:
      key: seed.
      terms: see `parse_terms`.
      examples: training examples n of CRD; length of queues.
      links: as the terms will see them (shapes only).
    """
    states = {}
    for number, term in enumerate(terms):
        if catalogue.MEMORY in term.entry.needs:
            width = links[f"{term.name}/0/teacher"].shape[1]
            crd = term.name == "crd"
            states[term.name] = (
                memory.crd_init(jax.random.fold_in(key, number), examples, width)
                if crd
                else memory.queue_init(examples, width)
            )
    return states


def values(
    terms: tuple[Term, ...],
    links: Links,
    *,
    label: jax.Array | None = None,
    where: jax.Array | None = None,
    states: Mapping[str, Any] | None = None,
    index: jax.Array | None = None,
    contrast: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Every unweighted term: means over valid rows of per-example losses, summed over layers.

    Args:
      terms: see `parse_terms`.
      links: see `connect`.
      label: [b] int32, of terms that read it.
      where: [b] bool, valid rows with a teacher.
      states: of terms with a memory, see `init_memory`.
      index: [b] int32 row of every example in CRD's memory.
      contrast: [b, K + 1] int32 lists of CRD, see `losses.draw_contrast`.

    Returns:
      (name -> [], next states).

    Raises:
      ValueError: an input that a term needs is absent.
    """
    found, states = {}, dict(states or {})
    for term in terms:
        parts = []
        for i, factor in enumerate(term.layer_weights()):
            arguments = _arguments(term, f"{term.name}/{i}", links, label)
            if catalogue.MEMORY in term.entry.needs:
                more = (index, contrast) if term.name == "crd" else ()
                if term.name not in states or any(x is None for x in more):
                    raise ValueError(f"term {term.name!r} has a memory: give its state, and for crd index and contrast")
                value, states[term.name] = term.entry.function(
                    states[term.name], *arguments, *more, where=where, **term.options
                )
            else:
                value = term.entry.function(*arguments, where=where, **term.options)
            parts.append(factor * (_mean(value, where) if term.entry.per_example else value))
        found[term.name] = sum(parts)
    return found, states


def _arguments(term: Term, at: str, links: Links, label: jax.Array | None) -> list[Any]:
    needs = term.entry.needs
    sides: list[Any] = [links[f"{at}/student"], links[f"{at}/teacher"]]
    if term.entry.reads == catalogue.MAP_PAIR:
        sides = [(links[f"{at}/{side}"], links[f"{at}/{side}1"]) for side in ("student", "teacher")]
    if catalogue.LABEL in needs:
        if label is None:
            raise ValueError(f"term {term.name!r} reads labels, and there are none")
        sides.append(label)
    for name in ("rho", "margin", "student_logits", "teacher_logits"):
        if f"{at}/{name}" in links:
            sides.append(links[f"{at}/{name}"])
    return sides


def _mean(each: jax.Array, where: jax.Array | None) -> jax.Array:
    if where is None:
        return jnp.mean(each)
    return jnp.sum(jnp.where(where, each, 0.0)) / jnp.maximum(jnp.sum(where), 1).astype(each.dtype)


def total(
    terms: tuple[Term, ...], found: Mapping[str, jax.Array], step: jax.Array | float = 0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum at a step, and what to log.

    Args:
      terms: see `parse_terms`.
      found: unweighted values, see `values`.
      step: optimizer step, from 0.

    Returns:
      ([] sum, {"NAME": unweighted, "weighted_NAME": weighted}).
    """
    weighted = {term.name: term.weight * term.schedule.share(step) * found[term.name] for term in terms}
    log = {**found, **{f"weighted_{name}": value for name, value in weighted.items()}}
    return sum(weighted.values(), jnp.zeros((), jnp.float32)), log
