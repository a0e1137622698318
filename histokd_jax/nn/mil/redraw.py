"""Parameters drawn anew after construction, as some public codes initialise: one rule for every kernel, biases 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen import initializers

KERNELS = {"xavier_normal": initializers.xavier_normal(), "orthogonal": initializers.orthogonal()}
"""Rule of a kernel [in, out] by name."""


def redraw(params: Mapping[str, Any], key: jax.Array, name: str) -> dict[str, Any]:
    """Draws every kernel by one rule and sets every bias to 0; other parameters stay.

    Args:
      params: parameters whose leaves are called "kernel" ([in, out]) and "bias".
      key: random key.
      name: key of `KERNELS`.

    Returns:
      New parameters of the same shapes and dtypes.

    Raises:
      ValueError: unknown name, or a kernel that is no matrix.
    """
    if name not in KERNELS:
        raise ValueError(f"initialiser {name!r} is unknown; use one of {sorted(KERNELS)}")
    flat = flax.traverse_util.flatten_dict(params)
    drawn = {}
    for i, (path, value) in enumerate(sorted(flat.items())):
        drawn[path] = value
        if path[-1] == "bias":
            drawn[path] = jnp.zeros_like(value)
        elif path[-1] == "kernel":
            if value.ndim != 2:
                raise ValueError(f"{'/'.join(path)} has shape {value.shape}; {name!r} is defined for matrices")
            drawn[path] = KERNELS[name](jax.random.fold_in(key, i), value.shape, value.dtype)
    return flax.traverse_util.unflatten_dict(drawn)
