"""What every method does with its configuration: reading keys, and replacing constants of an objective by data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections


def lookup(config: ml_collections.ConfigDict, key: str) -> Any:
    """Value at a dotted key.

    Raises:
      ValueError: if the config has no such key.
    """
    node = config
    for part in key.split("."):
        if part not in node:
            raise ValueError(f"config key {key!r} is missing; the method needs every key of its default_config()")
        node = node[part]
    return node


def with_traced(spec: Any, traced: Mapping[str, str], values: Mapping[str, jax.Array]) -> Any:
    """An objective with some numbers replaced by data, see `histokd_jax.types.Method.traced`.

    Args:
      spec: a dataclass.
      traced: config key -> its field, of the numbers that may be data.
      values: config key -> [] float32.

    Returns:
      A dataclass like `spec`.

    Raises:
      ValueError: for a key that cannot be data.
    """
    refuse_untraced(traced, values)
    return dataclasses.replace(spec, **{traced[key]: value for key, value in values.items()})


def refuse_untraced(known: Any, values: Mapping[str, Any]) -> None:
    """Refuses to vary what is part of the compiled program.

    Args:
      known: config keys of numbers that may be data.
      values: by config key.

    Raises:
      ValueError: for a key that cannot be data.
    """
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{unknown} cannot vary between replicas of one program; only {sorted(known)} can")
