"""DSMIL: an instance stream names critical patches, a bag stream attends to what resembles them (section 8b)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine, ColumnParams, affine_columns, affine_to_columns, operand
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil import selection
from histokd_jax.ops.dropout import hash_dropout
from histokd_jax.ops.pooling import CHUNKED, attention_pool, attention_weights


@dataclasses.dataclass(frozen=True)
class InstanceScores:
    """Chunk function whose scores are the instance logits [C, n]; its values are not used.

    Attributes:
      dtype: compute dtype of the product.
    """

    dtype: jnp.dtype | None = None

    def __call__(
        self, params: ColumnParams, aux: tuple, x: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(logits [C, n], logits [C, n]) of patches x [n, D]."""
        del aux, segment_ids, positions
        scores = affine_to_columns(params, x, self.dtype)
        return scores, scores


@dataclasses.dataclass(frozen=True)
class BagStream:
    """Chunk function of the bag stream: values v(x) and keys q(x).

    Attributes:
      rate: dropout of the patches before the value layer, if there is one.
      layer: number of that dropout layer.
      dtype: compute dtype of the products.
    """

    rate: float = 0.0
    layer: int = 0
    dtype: jnp.dtype | None = None

    def __call__(
        self, params: Mapping, aux: tuple[jax.Array, ...], x: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Values and keys of some patches.

        Args:
          params: {"query": one or two ColumnParams, "value": ColumnParams or absent}.
          aux: (seed,) to draw dropout, () for none.
          x: [n, D] patches.
          segment_ids: [n] int32.
          positions: [n] int32.

        Returns:
          (values [D, n], keys [K, n]) in the compute dtype.
        """
        keys = operand(self.query(params["query"], x), self.dtype)
        if "value" not in params:
            return operand(x, self.dtype).T.astype(keys.dtype), keys
        if aux and self.rate:
            x = hash_dropout(x.T, aux[0], segment_ids, positions, self.rate, self.layer).T
        return operand(jax.nn.relu(affine_to_columns(params["value"], x, self.dtype)), self.dtype), keys

    def query(self, layers: tuple[ColumnParams, ...], x: jax.Array) -> jax.Array:
        """q(x) [K, n]: tanh(FC(relu(FC(x)))), or FC(x) alone where there is one layer."""
        u = affine_to_columns(layers[0], x, self.dtype)
        return jnp.tanh(affine_columns(layers[1], jax.nn.relu(u), self.dtype)) if layers[1:] else u


class DsmilNet(nn.Module):
    """Instance stream and bag stream.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: C.
      query: width K of queries.
      linear_query: one linear layer in place of the two-layer query network.
      passing_value: values are ReLU(FC(dropout(x))) in place of the patches themselves.
      rate: dropout of the patches before the value layer.
      dtype: compute dtype of the products.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    num_outputs: int
    query: int = 128
    linear_query: bool = False
    passing_value: bool = False
    rate: float = 0.0
    dtype: jnp.dtype | None = None
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""

        def dense(fan_in: int, out: int) -> Affine:
            return Affine(fan_in, out, TORCH_DEFAULT, self.dtype)

        self.instance = dense(self.feat_dim, self.num_outputs)
        second = [] if self.linear_query else [dense(self.query, self.query)]
        self.queries = [dense(self.feat_dim, self.query), *second]
        if self.passing_value:
            self.value = dense(self.feat_dim, self.feat_dim)
        self.head = dense(self.num_outputs * self.feat_dim, self.num_outputs)

    def __call__(
        self, bags: Bags, genes: Mapping[str, jax.Array] | None = None, seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Logits of both streams.

        Args:
          bags: the packed patches.
          genes: not read.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          {"embedding" [S, C D], "logits" [S, C] of the bag stream, "max_logits" [S, C], the largest instance logit of
          every class, "pooled" [S, C, D]}.
        """
        del genes
        critical = self._critical(bags)
        pooled, _ = attention_pool(
            *self._arguments(bags, seed),
            num_slots=bags.num_slots,
            queries=self._queries(critical),
            chunk=self.chunk,
            impl=self.impl,
        )
        flat = pooled.reshape(bags.num_slots, -1)
        most = jnp.einsum("scc->sc", self.instance(critical))
        return {"embedding": flat, "logits": self.head(flat), "max_logits": most, "pooled": pooled}

    def attention_map(self, bags: Bags, genes: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[R, L] weight of each patch within its slide: the mean of the maps of the classes."""
        return jnp.mean(self.attention_maps(bags, genes), axis=0)

    def attention_maps(self, bags: Bags, genes: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[C, R, L]: one distribution over the patches of a slide per class."""
        del genes
        return attention_weights(
            *self._arguments(bags, None),
            num_slots=bags.num_slots,
            queries=self._queries(self._critical(bags)),
            chunk=self.chunk,
        )

    def select(self, bags: Bags) -> selection.Selected:
        """The patch with the highest instance logit of every slide and class; the first of equals."""
        bags.check_width(self.feat_dim)
        scores, params = InstanceScores(self.dtype), self.instance.columns()
        return selection.select(scores, params, (), bags, 1, ends=(selection.HIGHEST,), chunk=self.chunk)

    def _critical(self, bags: Bags) -> jax.Array:
        """[S, C, D]: the critical patches; 0 in an empty slot."""
        return self.select(bags).patches[0, :, :, 0]

    def _queries(self, critical: jax.Array) -> jax.Array:
        """[S, C, K]: queries of the critical patches over sqrt(K)."""
        layers = tuple(layer.columns() for layer in self.queries)
        flat = critical.reshape(-1, self.feat_dim)
        found = BagStream(dtype=self.dtype).query(layers, flat).T
        return found.reshape(*critical.shape[:2], -1) / math.sqrt(self.query)

    def _arguments(self, bags: Bags, seed: jax.Array | None) -> tuple:
        params = {"query": tuple(layer.columns() for layer in self.queries)}
        if self.passing_value:
            params["value"] = self.value.columns()
        aux = () if seed is None else (seed,)
        stream = BagStream(self.rate, dtype=self.dtype)
        return stream, params, aux, bags.patches, bags.segment_ids, bags.positions
