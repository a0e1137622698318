"""Deep Sets: the sum or the mean of projected patches (survival_baselines, section 3)."""

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
from histokd_jax.nn.mil.readout import NONE, Readout
from histokd_jax.ops.dropout import hash_dropout
from histokd_jax.ops.pooling import CHUNKED, attention_pool

SUM, MEAN = "sum", "mean"
POOLS = (SUM, MEAN)


def patch_counts(bags: Bags) -> jax.Array:
    """[S] float32: how many patches every slot has."""
    slots = jnp.arange(1, bags.num_slots + 1, dtype=bags.segment_ids.dtype)
    return jnp.sum(bags.segment_ids[None] == slots[:, None, None], axis=(1, 2)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PatchLayers:
    """Chunk function of a mean: one linear layer or several, each with ReLU and dropout, and equal scores.

    Nothing is kept for the backward pass; see `EqualWeights`.

    Attributes:
      rate: dropout of every layer.
      layer: number of the first dropout layer; one per linear layer is used.
      dtype: compute dtype of the products.
    """

    rate: float = 0.0
    layer: int = 0
    dtype: jnp.dtype | None = None

    def __call__(
        self,
        params: tuple[ColumnParams, ...],
        aux: tuple[jax.Array, ...],
        x: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """`dropout(relu(FC(...)))` of every patch.

        Args:
          params: the linear layers in order.
          aux: (seed,) to draw dropout, () for none.
          x: [n, D] patches.
          segment_ids: [n] int32.
          positions: [n] int32.

        Returns:
          (h [H, n] in the compute dtype, scores [1, n], all 0).
        """
        return self._run(params, aux, x, segment_ids, positions, ())[:2]

    def _run(self, params, aux, x, segment_ids, positions, known) -> tuple[jax.Array, jax.Array, tuple]:
        h, products = x, ()
        for i, layer in enumerate(params):
            # Patches come row by row, activations feature by feature.
            axis = 0 if i else 1
            if known[i:]:
                u = known_product(layer, h, known[i], axis, self.dtype)
            else:
                u = affine_to_columns(layer, h, self.dtype) if axis else affine_columns(layer, h, self.dtype)
            h, products = operand(jax.nn.relu(u), self.dtype), (*products, u)
            if aux:
                h = hash_dropout(h, aux[0], segment_ids, positions, self.rate, self.layer + i)
        return h, jnp.zeros((1, h.shape[1]), products[-1].dtype), products


@dataclasses.dataclass(frozen=True)
class EqualWeights(PatchLayers):
    """`PatchLayers` whose products may be kept for the backward pass, see `histokd_jax.ops.pooling.features`."""

    def with_products(
        self,
        params: tuple[ColumnParams, ...],
        aux: tuple[jax.Array, ...],
        x: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        known: tuple[jax.Array, ...] = (),
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """`__call__`, and its products [., n]; those in `known` are not computed again."""
        return self._run(params, aux, x, segment_ids, positions, known)


class DeepSetsNet(nn.Module):
    """phi of every patch, sum or mean, readout.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: C.
      width: width of phi.
      rho: width of rho and of the embedding.
      pool: "sum" as published, which saturates the hazards of large bags, or "mean".
      fusion: late fusion with molecular features, see `readout.FUSIONS`.
      num_genes: K, for a fusion.
      rate: every dropout.
      dtype: compute dtype of the products.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    num_outputs: int
    width: int = 512
    rho: int = 256
    pool: str = SUM
    fusion: str = NONE
    num_genes: int = 0
    rate: float = 0.25
    dtype: jnp.dtype | None = None
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        self.phi = Affine(self.feat_dim, self.width, TORCH_DEFAULT)
        self.readout = Readout(
            self.width, self.rho, self.num_outputs, self.fusion, self.num_genes, self.rate, layer=1, dtype=self.dtype
        )

    def __call__(
        self, bags: Bags, genes: Mapping[str, jax.Array] | None = None, seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """{"embedding" [S, H], "logits" [S, C], "rho" [S, H], "pooled" [S, width]}."""
        bags.check_width(self.feat_dim)
        mean, _ = attention_pool(
            EqualWeights(self.rate, dtype=self.dtype),
            (self.phi.columns(),),
            () if seed is None else (seed,),
            bags.patches,
            bags.segment_ids,
            bags.positions,
            num_slots=bags.num_slots,
            chunk=self.chunk,
            impl=self.impl,
        )
        pooled = mean[:, 0]
        if self.pool == SUM:
            pooled = pooled * patch_counts(bags).astype(pooled.dtype)[:, None]
        return {**self.readout(pooled, genes, seed), "pooled": pooled}

    def attention_map(self, bags: Bags, genes: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[R, L] float32: 1 / bag size on every patch, 0 on padding; every patch counts the same."""
        del genes
        counts = jnp.concatenate([jnp.ones(1), patch_counts(bags)])
        return jnp.where(bags.segment_ids > 0, 1.0 / jnp.maximum(counts, 1.0)[bags.segment_ids], 0.0)
