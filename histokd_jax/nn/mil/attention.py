"""Attention pooling with dropout inside the attention, one or several attention maps, gated or plain.

The specification is survival_baselines, notation: `GatedAttn(L, D)`. `histokd_jax.nn.gated_attention` is the MKD form:
one map, gated, no dropout on the branches, dropout of the projection only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import (
    TORCH_DEFAULT,
    Affine,
    ColumnParams,
    affine_columns,
    affine_to_columns,
    known_product,
    operand,
)
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.ops.dropout import hash_dropout, slot_dropout
from histokd_jax.ops.pooling import CHUNKED, attention_pool, attention_weights

HeadParams = Mapping[str, ColumnParams]
"""{"gate": tanh layer, above the sigmoid layer if the head is gated, "score": ...}."""

DROPOUT_LAYERS = 4
"""Dropout layers of one `AttentionFeatures` or `AttentionHead`, for numbering."""
_TANH, _SIGMOID, _INPUT = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class AttentionFeatures:
    """Chunk function of an attention bag network; hashable by value, so equal networks share one trace.

    Attributes:
      rate: dropout after the projection.
      branch_rate: dropout of the tanh branch, and of the sigmoid branch if there is one.
      input_rate: dropout of the patches themselves.
      gated: whether the tanh branch is multiplied by a sigmoid branch.
      layer: number of the first dropout layer; `DROPOUT_LAYERS` are used.
      dtype: compute dtype of the products.
    """

    rate: float = 0.0
    branch_rate: float = 0.0
    input_rate: float = 0.0
    gated: bool = True
    layer: int = 0
    dtype: jnp.dtype | None = None

    def __call__(
        self, params: Mapping, aux: tuple[jax.Array, ...], x: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`h = dropout(relu(FC(x)))` and its scores before the softmax.

        Args:
          params: {"proj": ColumnParams, "attention": HeadParams}.
          aux: (seed,) to draw dropout, () for none.
          x: [n, D] patches.
          segment_ids: [n] int32.
          positions: [n] int32.

        Returns:
          (h [H, n] in the compute dtype, scores [Q, n] in at least float32).
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
        """`__call__`, and its products FC(x) [H, n] and the gate; those in `known` are not computed again."""

        def drop(h: jax.Array, rate: float, offset: int) -> jax.Array:
            return hash_dropout(h, aux[0], segment_ids, positions, rate, self.layer + offset) if aux else h

        h, u = self.hidden(params["proj"], aux, x, segment_ids, positions, known)
        head = params["attention"]
        v = known_product(head["gate"], h, known[1], 0, self.dtype) if known[1:] else self._gate(head, h)
        branches = jnp.split(v, 2, axis=0) if self.gated else (v,)
        gate = drop(jnp.tanh(branches[0]), self.branch_rate, _TANH)
        if self.gated:
            gate = gate * drop(jax.nn.sigmoid(branches[1]), self.branch_rate, _SIGMOID)
        return h, affine_columns(head["score"], gate, self.dtype), (u, v)

    def hidden(
        self,
        params: ColumnParams,
        aux: tuple[jax.Array, ...],
        x: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        known: tuple[jax.Array, ...] = (),
    ) -> tuple[jax.Array, jax.Array]:
        """(h [H, n], FC(x) [H, n]) of some patches, with the dropout that the whole bag draws for them.

        Args:
          params: the projection.
          aux: see `__call__`.
          x: see `__call__`.
          segment_ids: see `__call__`.
          positions: see `__call__`.
          known: FC(x), if it was computed before.

        Returns:
          The activations of the patches and the product before the ReLU.
        """
        if aux and self.input_rate:
            x = hash_dropout(x.T, aux[0], segment_ids, positions, self.input_rate, self.layer + _INPUT).T
        u = known_product(params, x, known[0], 1, self.dtype) if known else affine_to_columns(params, x, self.dtype)
        h = operand(jax.nn.relu(u), self.dtype)
        return (hash_dropout(h, aux[0], segment_ids, positions, self.rate, self.layer) if aux else h), u

    def _gate(self, head: HeadParams, h: jax.Array) -> jax.Array:
        return affine_columns(head["gate"], h, self.dtype)


class AttentionHead(nn.Module):
    """The layers of an attention network, and its use on a fixed number of tokens.

    Attributes:
      width: token width H.
      hidden: attention width A.
      outputs: attention maps Q.
      gated: whether there is a sigmoid branch.
      rate: dropout of the branches when called on tokens.
      layer: number of the first dropout layer when called on tokens; `DROPOUT_LAYERS` are used.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    width: int
    hidden: int
    outputs: int = 1
    gated: bool = True
    rate: float = 0.0
    layer: int = 0
    initializer: str = TORCH_DEFAULT
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.tanh = Affine(self.width, self.hidden, self.initializer, self.dtype)
        if self.gated:
            self.sigmoid = Affine(self.width, self.hidden, self.initializer, self.dtype)
        self.score = Affine(self.hidden, self.outputs, self.initializer, self.dtype)

    def __call__(self, tokens: jax.Array, seed: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Pools tokens.

        Args:
          tokens: [S, T, H] float.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          (pooled [S, Q, H], weights [S, Q, T] summing to 1 over the tokens).
        """

        def drop(v: jax.Array, offset: int) -> jax.Array:
            return v if seed is None else slot_dropout(v, seed, self.rate, self.layer + offset)

        gate = drop(jnp.tanh(self.tanh(tokens)), _TANH)
        if self.gated:
            gate = gate * drop(jax.nn.sigmoid(self.sigmoid(tokens)), _SIGMOID)
        weights = jax.nn.softmax(jnp.swapaxes(self.score(gate), 1, 2), axis=-1)
        return jnp.einsum("sqt,sth->sqh", weights, tokens), weights

    def columns(self) -> HeadParams:
        """The parameters, for `AttentionFeatures` inside a chunk loop."""
        gate = self.tanh.columns()
        if self.gated:
            gate = jax.tree.map(lambda *parts: jnp.concatenate(parts), gate, self.sigmoid.columns())
        return {"gate": gate, "score": self.score.columns()}


class AttentionBag(nn.Module):
    """Patches to one vector per slide and attention map: linear layer, ReLU, dropout, attention pooling.

    Attributes:
      feat_dim: patch-embedding width D.
      width: output width H.
      hidden: attention width A.
      outputs: attention maps Q.
      features: the chunk function.
      initializer: see `Affine`.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    width: int
    hidden: int
    outputs: int = 1
    features: AttentionFeatures = AttentionFeatures()
    initializer: str = TORCH_DEFAULT
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        self.proj = Affine(self.feat_dim, self.width, self.initializer)
        self.attention = AttentionHead(
            self.width, self.hidden, self.outputs, self.features.gated, initializer=self.initializer
        )

    def __call__(self, bags: Bags, seed: jax.Array | None = None) -> jax.Array:
        """Pools every slide.

        Args:
          bags: the packed patches.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, Q, H] float32 (float64 for float64 parameters); 0 for an empty slot.
        """
        pooled, _ = attention_pool(
            *self.arguments(bags, seed), num_slots=bags.num_slots, chunk=self.chunk, impl=self.impl
        )
        return pooled

    def attention_map(self, bags: Bags) -> jax.Array:
        """[Q, R, L] attention of every patch within its slide, without dropout; 0 on padding."""
        return attention_weights(*self.arguments(bags, None), num_slots=bags.num_slots, chunk=self.chunk)

    def arguments(self, bags: Bags, seed: jax.Array | None) -> tuple:
        """The leading arguments of `attention_pool`: chunk function, its parameters, its seed, and the patches."""
        bags.check_width(self.feat_dim)
        params = {"proj": self.proj.columns(), "attention": self.attention.columns()}
        aux = () if seed is None else (seed,)
        return self.features, params, aux, bags.patches, bags.segment_ids, bags.positions
