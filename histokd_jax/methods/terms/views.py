"""From the views of two networks to what a term compares: checks of shapes, connectors, stopped gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from histokd_jax.losses import catalogue, vid_rho
from histokd_jax.methods.terms.spec import PLUS, Term
from histokd_jax.nn.connectors import Connector

Views = Mapping[str, jax.Array]
"""Name -> [b, C, ...] of one network, e.g. "logits", "embedding", and of cached teachers the stored arrays."""
Links = Mapping[str, jax.Array]
"""What the objective compares: "TERM/I/student", "TERM/I/teacher", and what else the term needs."""


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
            f"{where}: the widths {s[0]} and {t[0]} differ; set terms.{term.name}.connector = 'linear' or 'mlp', or "
            "use a term that compares relations (sp, cc, rkd, pkt, cka)"
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
            raise ValueError(f"term {term.name!r} needs the teacher's classifier, which this teacher does not offer")
        goal = jax.lax.stop_gradient(_view(teacher, "logits", "teacher", term.name))
        return {f"{at}/student_logits": head(connected), f"{at}/teacher_logits": goal}
    return {}
