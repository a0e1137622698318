"""Values of the terms and their weighted sum, over the whole batch of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from histokd_jax.losses import catalogue, memory
from histokd_jax.methods.terms.spec import Term
from histokd_jax.methods.terms.views import Links


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
