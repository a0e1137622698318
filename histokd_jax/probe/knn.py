"""Nearest neighbours by cosine similarity, for several k and many subsets of the training rows at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

UNIFORM, SIMILARITY = "uniform", "similarity"
VOTES = (UNIFORM, SIMILARITY)
TEMPERATURE = 0.07
"""Of the votes by similarity, exp(cosine / temperature), as self-supervised work weights them (Wu et al. 2018)."""
_CHUNK, _ROUND = 256, 32


def knn_probabilities(
    x: np.ndarray,
    label: np.ndarray,
    masks: np.ndarray,
    queries: np.ndarray,
    ks: Sequence[int],
    num_classes: int,
    votes: str = UNIFORM,
) -> np.ndarray:
    """Votes of the nearest labelled rows.

    Args:
      x: [N, D] features; rows of zeros have similarity 0 to all.
      label: [N] int.
      masks: [S, N] bool, the rows that vote in each subset.
      queries: [Q] rows to classify.
      ks: numbers of neighbours; a subset with fewer rows lets all of them vote.
      num_classes: C.
      votes: "uniform", or "similarity".

    Returns:
      [len(ks), S, Q, C] float32 shares of the votes.

    Raises:
      ValueError: k < 1, or an unknown kind of votes.
    """
    if not ks or min(ks) < 1 or votes not in VOTES:
        raise ValueError(f"--k {list(ks)} with votes {votes!r}: expected k >= 1 and votes in {VOTES}")
    ks = tuple(min(k, len(x)) for k in ks)
    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(label, jnp.int32), jnp.asarray(masks, bool))
    # Folds that differ by a few queries share a program.
    padded = jnp.asarray(np.resize(queries, -(-len(queries) // _ROUND) * _ROUND), jnp.int32)
    found = _vote(*arrays, padded, ks=ks, num_classes=num_classes, votes=votes)
    return np.asarray(found)[:, :, : len(queries)]


@functools.partial(jax.jit, static_argnames=("ks", "num_classes", "votes"))
def _vote(x, label, masks, queries, *, ks: tuple[int, ...], num_classes: int, votes: str):
    unit = x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=1, keepdims=True), 1e-12))

    def one(query):
        """[len(ks), S, C] of one query."""
        seen = jnp.where(masks, (unit @ unit[query])[None], -jnp.inf)
        top, place = jax.lax.top_k(seen, max(ks))
        weight = jnp.exp((top - 1.0) / TEMPERATURE) if votes == SIMILARITY else jnp.isfinite(top).astype(jnp.float32)
        counted = jnp.cumsum(weight[..., None] * jax.nn.one_hot(label[place], num_classes), axis=1)
        found = jnp.stack([counted[:, k - 1] for k in ks])
        return found / jnp.sum(found, axis=-1, keepdims=True)

    with jax.default_matmul_precision("highest"):
        return jnp.moveaxis(jax.lax.map(one, queries, batch_size=_CHUNK), 0, 2)
