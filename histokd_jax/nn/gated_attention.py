"""Gated attention pooling (Ilse et al., ICML 2018; MKD specification 4.1) of patches and of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import (
    LECUN_NORMAL,
    Affine,
    ColumnParams,
    affine_columns,
    affine_to_columns,
    known_product,
    operand,
)
from histokd_jax.ops.dropout import hash_dropout
from histokd_jax.ops.pooling import CHUNKED, attention_pool, attention_weights

AttentionParams = Mapping[str, ColumnParams]


class Bags(NamedTuple):
    """The patches of one step, packed into rows (see `histokd_jax.types.Batch`)."""

    patches: jax.Array  # [R, L, D]
    segment_ids: jax.Array  # [R, L] int32
    positions: jax.Array  # [R, L] int32
    num_slots: int

    def check_width(self, feat_dim: int) -> None:
        """Refuses patches of another width than a network was built for.

        Raises:
          ValueError: naming both widths.
        """
        if self.patches.shape[-1] != feat_dim:
            raise ValueError(
                f"patches are {self.patches.shape[-1]} wide, but the network was built for data.feat_dim = "
                f"{feat_dim}: use the patch encoder it was trained with, or set data.feat_dim"
            )


def gated_scores(params: AttentionParams, gate: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Attention scores `w (tanh(V h + c_v) * sigmoid(U h + c_u)) + c_w`, before the softmax.

    Args:
      params: the "score" (w) layer.
      gate: [2 A, n], V h + c_v above U h + c_u: one product of the "gate" layer with the activations h [H, n].
      dtype: compute dtype of the product.

    Returns:
      [1, n] float32 (float64 for float64 parameters).
    """
    tanh, sigmoid = jnp.split(gate, 2, axis=0)
    return affine_columns(params["score"], jnp.tanh(tanh) * jax.nn.sigmoid(sigmoid), dtype)


class GatedAttention(nn.Module):
    """Parameters of one gated attention head, and its use on a fixed number of tokens.

    Attributes:
      width: token width H.
      hidden: attention width A.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    width: int
    hidden: int
    initializer: str = LECUN_NORMAL
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.tanh = Affine(self.width, self.hidden, self.initializer, self.dtype)
        self.sigmoid = Affine(self.width, self.hidden, self.initializer, self.dtype)
        self.score = Affine(self.hidden, 1, self.initializer, self.dtype)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pools tokens.

        Args:
          tokens: [S, T, H] float.

        Returns:
          (pooled [S, H], weights [S, T] summing to 1).
        """
        scores = self.score(jnp.tanh(self.tanh(tokens)) * jax.nn.sigmoid(self.sigmoid(tokens)))[..., 0]
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.sum(weights[..., None] * tokens, axis=1), weights

    def columns(self) -> AttentionParams:
        """The parameters, for `gated_scores` inside a chunk loop."""
        gate = jax.tree.map(lambda *parts: jnp.concatenate(parts), self.tanh.columns(), self.sigmoid.columns())
        return {"gate": gate, "score": self.score.columns()}


@dataclasses.dataclass(frozen=True)
class PatchFeatures:
    """Chunk function of a gated-attention bag network; hashable by value, so equal networks share one trace.

    Attributes:
      rate: dropout after the projection.
      layer: number of the dropout layer.
      dtype: compute dtype of the products.
    """

    rate: float = 0.0
    layer: int = 0
    dtype: jnp.dtype | None = None

    def __call__(
        self, params: Mapping, aux: tuple[jax.Array, ...], x: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`h = dropout(relu(FC(x)))` and its attention scores.

        Args:
          params: {"proj": ColumnParams, "attention": AttentionParams}.
          aux: (seed,) to draw dropout, () for none.
          x: [n, D] patches.
          segment_ids: [n] int32.
          positions: [n] int32.

        Returns:
          (h [H, n] in the compute dtype, scores [1, n] in at least float32).
        """
        return self.with_products(params, aux, x, segment_ids, positions)[:2]

    def with_products(
        self,
        params: Mapping,
        aux: tuple[jax.Array, ...],
        x: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        known: tuple[jax.Array, ...] = (),
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """`__call__`, and its two large products: FC(x) [H, n] and the gate [2 A, n].

        Args:
          params: see `__call__`.
          aux: see `__call__`.
          x: see `__call__`.
          segment_ids: see `__call__`.
          positions: see `__call__`.
          known: the first products, if they were computed before; they are not computed again.

        Returns:
          (h, scores, products).
        """
        proj, gate = params["proj"], params["attention"]["gate"]
        u = known_product(proj, x, known[0], 1, self.dtype) if known else affine_to_columns(proj, x, self.dtype)
        h = operand(jax.nn.relu(u), self.dtype)
        if aux:
            h = hash_dropout(h, aux[0], segment_ids, positions, self.rate, self.layer)
        v = known_product(gate, h, known[1], 0, self.dtype) if len(known) > 1 else affine_columns(gate, h, self.dtype)
        return h, gated_scores(params["attention"], v, self.dtype), (u, v)


class BagEncoder(nn.Module):
    """Patches to one vector per slide: linear layer, ReLU, dropout, gated attention pooling.

    Attributes:
      feat_dim: patch-embedding width D.
      width: output width H.
      hidden: attention width A.
      features: the chunk function.
      initializer: see `Affine`.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    width: int
    hidden: int
    features: PatchFeatures
    initializer: str = LECUN_NORMAL
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        self.proj = Affine(self.feat_dim, self.width, self.initializer)
        self.attention = GatedAttention(self.width, self.hidden, self.initializer)

    def __call__(self, bags: Bags, seed: jax.Array | None = None) -> jax.Array:
        """Pools every slide.

        Args:
          bags: the packed patches.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, H] float32 (float64 for float64 parameters); 0 for an empty slot.
        """
        pooled, _ = attention_pool(
            *self._arguments(bags, seed), num_slots=bags.num_slots, chunk=self.chunk, impl=self.impl
        )
        return pooled[:, 0]

    def attention_map(self, bags: Bags) -> jax.Array:
        """[R, L] float32 attention of every patch within its slide, without dropout; 0 on padding."""
        return attention_weights(*self._arguments(bags, None), num_slots=bags.num_slots, chunk=self.chunk)[0]

    def _arguments(self, bags: Bags, seed: jax.Array | None) -> tuple:
        bags.check_width(self.feat_dim)
        params = {"proj": self.proj.columns(), "attention": self.attention.columns()}
        aux = () if seed is None else (seed,)
        return self.features, params, aux, bags.patches, bags.segment_ids, bags.positions
