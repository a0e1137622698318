"""Initial variables of a network without running it, and with one draw of random numbers.

`Module.init` would trace the network and draw every kernel on its own: hundreds of generators that take a minute to
compile. The distributions are those of the modules.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.paired.primitives import CONV_STD, LINEAR_STD

_ONES = ("scale", "var")


def init_variables(module: nn.Module, key: jax.Array, *shapes: tuple[int, ...]) -> dict[str, Any]:
    """The variables of a paired network.

    Args:
      module: `Teacher` or `Student`.
      key: typed PRNG key.
      *shapes: of its inputs.

    Returns:
      {"params", "batch_stats"}, float32: kernels normal with the stated spread (section 7), scales and running
      variances 1, all else 0.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(dict(_variable_shapes(module, shapes)))
    sizes = [leaf.size if leaf.ndim >= 2 else 0 for _, leaf in leaves]
    drawn, start, found = jax.random.normal(key, (sum(sizes),)), 0, []
    for (path, leaf), size in zip(leaves, sizes):
        if size:
            std = CONV_STD if leaf.ndim == 4 else LINEAR_STD
            value = std * drawn[start : start + size].reshape(leaf.shape)
        else:
            value = jnp.full(leaf.shape, 1.0 if path[-1].key in _ONES else 0.0)
        found.append(value.astype(jnp.float32))
        start += size
    return jax.tree.unflatten(tree, found)


@functools.lru_cache(maxsize=16)
def _variable_shapes(module: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Shapes of the variables; found by tracing, which takes seconds for the full networks, so once per process."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)
