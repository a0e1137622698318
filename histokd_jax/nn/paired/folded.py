"""Equal parts of a network as loops over their parameters, so that each is traced and compiled once.

The two streams of a level are the same function of other parameters, and so are its blocks. Written out, CoCoFNet is
22 blocks and 6 sides of cross blocks; folded, it is 4 and 3. Parameters stay where they are: they are stacked on the
way in, and running statistics are divided on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from histokd_jax.nn.paired.block import Block, Level
from histokd_jax.nn.paired.cross import Side

STATISTICS = "batch_stats"
Variables = Mapping[str, Any]
"""{"params", "batch_stats"} of one part."""
Statistics = Mapping[str, Any]
Step = Callable[..., tuple[Any, Statistics]]


def part(variables: Variables, name: str) -> Variables:
    """The variables of a submodule."""
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}


def run(module: nn.Module, variables: Variables, *args: Any, method: Any = None) -> tuple[Any, Statistics]:
    """(outputs, statistics afterwards) of an unbound module, applied to `args`."""
    outputs, new = module.apply(variables, *args, method=method, mutable=[STATISTICS])
    return outputs, new[STATISTICS]


def level(module: Level, variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Statistics]:
    """`module` with its blocks as one loop.

    Args:
      module: unbound.
      variables: its variables.
      x: [B, H, W, inputs].
      train: see `BatchNorm`.

    Returns:
      ([B, H // patch, W // patch, C], statistics afterwards).
    """
    names = [f"block_{i}" for i in range(module.depth)]
    x, first = run(module.patch_embed(parent=None), part(variables, "patch"), x, train)
    block = Block(module.features, module.spec, parent=None)
    x, rest = _in_turn(lambda own, x: run(block, own, x, train), [part(variables, name) for name in names], x)
    return x, {"patch": first, **dict(zip(names, rest))}


def stream_pair(
    module: Level, both: Sequence[Variables], x: jax.Array, train: bool
) -> tuple[jax.Array, tuple[Statistics, Statistics]]:
    """Two streams through levels of one form.

    Args:
      module: unbound.
      both: variables of either stream.
      x: [2, B, H, W, inputs].
      train: see `BatchNorm`.

    Returns:
      ([2, B, H // patch, W // patch, C], statistics of either stream).
    """
    return _beside(lambda own, x: level(module, own, x, train), both, x)


def cross_pair(
    side: Side, both: Sequence[Variables], x: jax.Array, train: bool
) -> tuple[jax.Array, jax.Array, tuple[Statistics, Statistics]]:
    """The teacher's cross block: every side answers the queries of the other.

    Args:
      side: unbound.
      both: variables of either side.
      x: [2, B, H, W, C].
      train: see `BatchNorm`.

    Returns:
      (x [2, B, H, W, C], maps [2, B, N, N], statistics of either side).
    """
    own, stats = _beside(lambda v, x: run(side, v, x, train, method=Side.project), both, x)
    both = [{**variables, STATISTICS: new} for variables, new in zip(both, stats)]
    given = (x, own.queries[::-1], own)
    (x, maps), stats = _beside(lambda v, given: run(side, v, *given, train, method=Side.respond), both, given)
    return x, maps, stats


def _in_turn(step: Step, each: Sequence[Variables], x: jax.Array) -> tuple[jax.Array, list[Statistics]]:
    """One part behind the other."""
    if len(each) > 1:
        x, stats = lax.scan(lambda x, own: step(own, x), x, _stacked(each))
        return x, _divided(stats, len(each))
    found = []
    for own in each:
        x, stats = step(own, x)
        found.append(stats)
    return x, found


def _beside(step: Step, each: Sequence[Variables], inputs: Any) -> tuple[Any, list[Statistics]]:
    """Every part on its own slice of the inputs."""
    outputs, stats = lax.map(lambda one: step(*one), (_stacked(each), inputs))
    return outputs, _divided(stats, len(each))


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _divided(tree: Any, number: int) -> list[Any]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(number)]
