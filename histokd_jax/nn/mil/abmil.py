"""ABMIL: one attention-weighted mean per slide (survival_baselines, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.attention import DROPOUT_LAYERS, AttentionBag, AttentionFeatures
from histokd_jax.nn.mil.readout import NONE, Readout
from histokd_jax.ops.pooling import CHUNKED


class AbmilNet(nn.Module):
    """Linear layer, ReLU, dropout; attention pooling; readout.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: C.
      width: width of the projected patches.
      hidden: attention width A.
      rho: width of rho and of the embedding; 0 for none.
      gated: gated or plain attention.
      fusion: late fusion with molecular features, see `readout.FUSIONS`.
      num_genes: K, for a fusion.
      rate: every dropout, also that of both attention branches.
      dtype: compute dtype of the products.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    num_outputs: int
    width: int = 512
    hidden: int = 256
    rho: int = 256
    gated: bool = True
    fusion: str = NONE
    num_genes: int = 0
    rate: float = 0.25
    dtype: jnp.dtype | None = None
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        features = AttentionFeatures(self.rate, self.rate, gated=self.gated, dtype=self.dtype)
        self.bag = AttentionBag(
            self.feat_dim, self.width, self.hidden, features=features, chunk=self.chunk, impl=self.impl
        )
        self.readout = Readout(
            self.width,
            self.rho,
            self.num_outputs,
            self.fusion,
            self.num_genes,
            self.rate,
            layer=DROPOUT_LAYERS,
            dtype=self.dtype,
        )

    def __call__(
        self, bags: Bags, genes: Mapping[str, jax.Array] | None = None, seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """{"embedding" [S, H], "logits" [S, C], "rho" [S, H], "pooled" [S, width]}."""
        pooled = self.bag(bags, seed)[:, 0]
        return {**self.readout(pooled, genes, seed), "pooled": pooled}

    def attention_map(self, bags: Bags, genes: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[R, L] weight of each patch within its slide; `genes` are not read."""
        del genes
        return self.bag.attention_map(bags)[0]
