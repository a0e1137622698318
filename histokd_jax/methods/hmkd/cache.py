"""Outputs of a finished teacher, computed once: the second stage then never runs the teacher.

A teacher in inference mode is a function of the pair and its flips, and flips are few: 1, 4 (`data.flip_mode=paired`)
or 16 (`independent`). The table holds all of them, so that a student trained from it equals one trained beside the
teacher. At 256 pixels an example takes 19 KB per variant; at 1024 pixels 4.5 MB, where running the teacher is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.methods.hmkd import images

Table = Mapping[str, np.ndarray]
"""Output of the teacher -> [n, V, ...]: by number of the example and `images.variants`."""


def variant_outputs(
    network: nn.Module, flip_mode: str, wanted: tuple[str, ...]
) -> Callable[[Mapping[str, Any], jax.Array, jax.Array], dict[str, jax.Array]]:
    """A pure function that asks a teacher about every variant of some pairs.

    Args:
      network: the teacher.
      flip_mode: see `images.draw_flips`.
      wanted: outputs to keep, see `ObjectiveSpec.teacher_outputs`.

    Returns:
      (variables, image, partner [B, H, W, 3] uint8) -> {output: [B, V, ...]}.
    """
    flags = np.asarray(images.variants(flip_mode))

    def ask(variables, image, partner):
        def one(flag):
            tiles = (
                images.standardise(images.apply_flips(x, jnp.broadcast_to(f, (x.shape[0], 2))))
                for x, f in zip((image, partner), flag)
            )
            found = network.apply(variables, *tiles)
            return {name: found[name] for name in wanted}

        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), jax.lax.map(one, jnp.asarray(flags)))

    return ask


def fill_table(
    ask: Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]],
    batches: Iterable[Mapping[str, np.ndarray]],
    examples: int,
    dtype: type = np.float32,
) -> dict[str, np.ndarray]:
    """Asks a teacher about a data set.

    Args:
      ask: (image, partner) -> {output: [B, V, ...]}.
      batches: steps of image pairs that cover the data set; fillers and examples without partner are skipped.
      examples: n of the data set.
      dtype: of the table; float16 halves it.

    Returns:
      The table; rows of examples without partner are 0.

    Raises:
      ValueError: no example has a partner, or values beyond the range of `dtype`.
    """
    table: dict[str, np.ndarray] = {}
    for batch in batches:
        real = (np.asarray(batch["weight"]) > 0) & np.asarray(batch["has_partner"])
        rows = np.asarray(batch["example"])[real]
        for name, value in ask(batch["image"], batch["partner"]).items():
            value = np.asarray(value)[real].astype(dtype)
            if not np.isfinite(value).all():
                raise ValueError(f"outputs {name!r} of the teacher are not finite as {np.dtype(dtype)}: use float32")
            target = table.setdefault(name, np.zeros((examples, *value.shape[1:]), dtype))
            target[rows] = value
    if not table or not any(value.any() for value in table.values()):
        raise ValueError("no example of the data set has a partner: there is nothing to ask the teacher about")
    return table
