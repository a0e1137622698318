"""Co-attention of a few tokens per slide (e.g. gene groups) over its patches: scaled dot product, one head.

The key and value layers are linear, so they are moved out of the loop over patches. With h = relu(FC(x)), key
W_k h + b_k, value W_v h + b_v and query u of a token, exactly:

    u . (W_k h + b_k) = (W_k' u) . h + const,  and the softmax over patches drops the constant;
    sum_n a_n (W_v h_n + b_v) = W_v (sum_n a_n h_n) + b_v,  since the weights a_n sum to 1.

Patches cost one product (the projection) and the scores; two products of width H x H per patch are saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import LECUN_NORMAL, Affine, affine_to_columns, known_product, operand
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.ops.dropout import hash_dropout
from histokd_jax.ops.pooling import CHUNKED, attention_pool, attention_weights
from histokd_jax.ops.pooling.softmax import NEG


@dataclasses.dataclass(frozen=True)
class ProjectedPatches:
    """Chunk function of co-attention: the projected patches are keys and values; hashable by value.

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
        """`h = dropout(relu(FC(x)))`, as values and as keys.

        Args:
          params: ColumnParams of the projection.
          aux: (seed,) to draw dropout, () for none.
          x: [n, D] patches.
          segment_ids: [n] int32.
          positions: [n] int32.

        Returns:
          (h, h) [H, n] in the compute dtype.
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
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array]]:
        """`__call__`, and its product FC(x) [H, n], which is not computed again if it is `known`."""
        u = known_product(params, x, known[0], 1, self.dtype) if known else affine_to_columns(params, x, self.dtype)
        h = operand(jax.nn.relu(u), self.dtype)
        if aux:
            h = hash_dropout(h, aux[0], segment_ids, positions, self.rate, self.layer)
        return h, h, (u,)


class CoAttention(nn.Module):
    """Every token of a slide gathers what it attends to among the patches of that slide.

    Attributes:
      feat_dim: patch-embedding width D.
      token_dim: token width E.
      width: width H of queries, keys, values and output.
      features: the chunk function.
      use_bias: whether the query, key, value and output layers have biases. That of the keys has no effect, as in every
        softmax attention; it is kept so that parameters of other implementations fit.
      initializer: see `Affine`.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    token_dim: int
    width: int
    features: ProjectedPatches = ProjectedPatches()
    use_bias: bool = True
    initializer: str = LECUN_NORMAL
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        dtype = self.features.dtype
        self.proj = Affine(self.feat_dim, self.width, self.initializer)
        self.query = Affine(self.token_dim, self.width, self.initializer, dtype, self.use_bias)
        self.key = Affine(self.width, self.width, self.initializer, dtype, self.use_bias)
        self.value = Affine(self.width, self.width, self.initializer, dtype, self.use_bias)
        self.out = Affine(self.width, self.width, self.initializer, dtype, self.use_bias)

    def __call__(self, bags: Bags, tokens: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Attends to the patches of every slide.

        Args:
          bags: the packed patches.
          tokens: [S, Q, E] float.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, Q, H] float32 (float64 for float64 parameters); 0 for an empty slot.

        Raises:
          ValueError: for patches or tokens of another width or number of slots.
        """
        pooled, lse = attention_pool(
            *self._arguments(bags, seed),
            num_slots=bags.num_slots,
            queries=self._queries(bags, tokens),
            chunk=self.chunk,
            impl=self.impl,
        )
        # An empty slot has no weights that sum to 1: without the mask it would show the biases.
        return jnp.where(lse[..., None] > NEG / 2, self.out(self.value(pooled)), 0.0)

    def attention_map(self, bags: Bags, tokens: jax.Array) -> jax.Array:
        """[Q, R, L] float32 attention of every token to the patches of its slide, without dropout; 0 on padding."""
        return attention_weights(
            *self._arguments(bags, None),
            num_slots=bags.num_slots,
            queries=self._queries(bags, tokens),
            chunk=self.chunk,
        )

    def _queries(self, bags: Bags, tokens: jax.Array) -> jax.Array:
        """[S, Q, H]: W_k' (query of the token) / sqrt(H), the query in the space of the projected patches."""
        if tokens.ndim != 3 or tokens.shape[0] != bags.num_slots or tokens.shape[2] != self.token_dim:
            raise ValueError(
                f"tokens are {tokens.shape}; expected [S, Q, E] with S = {bags.num_slots} slots and E = token_dim = "
                f"{self.token_dim}"
            )
        queries, kernel = self.query(tokens), self.key.weights()["kernel"]
        dtype = self.features.dtype
        moved = jnp.einsum(
            "sqk,hk->sqh", operand(queries, dtype), operand(kernel, dtype), preferred_element_type=queries.dtype
        )
        return moved / math.sqrt(self.width)

    def _arguments(self, bags: Bags, seed: jax.Array | None) -> tuple:
        bags.check_width(self.feat_dim)
        aux = () if seed is None else (seed,)
        return self.features, self.proj.columns(), aux, bags.patches, bags.segment_ids, bags.positions
