"""PORPOISE MMF (Chen et al., Cancer Cell 2022; baselines specification, section 10) on packed bags."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.attention import DROPOUT_LAYERS, AttentionBag, AttentionFeatures
from histokd_jax.nn.mil.readout import LateBilinear
from histokd_jax.nn.snn import SelfNormalising
from histokd_jax.ops.dropout import slot_dropout
from histokd_jax.ops.pooling import CHUNKED

OMIC_BLOCKS = 2
_RHO = DROPOUT_LAYERS
_OMICS = _RHO + 1
_FUSION = _OMICS + OMIC_BLOCKS


class OmicMlp(nn.Module):
    """Blocks of linear layer, ReLU and dropout: the plain form of `SelfNormalising`.

    Attributes:
      in_features: input width.
      widths: width of every block.
      rate: dropout of every block.
      layer: number of the first dropout layer; one per block is used.
      dtype: compute dtype of the products.
    """

    in_features: int
    widths: tuple[int, ...]
    rate: float = 0.25
    layer: int = 0
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        inputs = (self.in_features, *self.widths[:-1])
        self.blocks = [Affine(i, o, TORCH_DEFAULT, self.dtype) for i, o in zip(inputs, self.widths)]

    def __call__(self, x: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """[S, in_features] to [S, widths[-1]]; `seed` draws dropout."""
        for i, block in enumerate(self.blocks):
            x = jax.nn.relu(block(x))
            x = x if seed is None else slot_dropout(x, seed, self.rate, self.layer + i)
        return x


class PorpoiseMmf(nn.Module):
    """Gated attention over patches, an omic encoder, gated bilinear fusion with skip connections.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: logits C.
      num_genes: omic features K.
      width: width H of both vectors and of the result.
      patch_width: width of the projected patches.
      hidden: attention width A.
      scale: each factor of the outer product is H / scale wide.
      gates: whether the image factor and the omic factor are gated.
      skip: whether both vectors are appended before the last layer.
      use_mlp: ReLU and dropout in the omic encoder in place of ELU and alpha dropout.
      rate: every dropout but that of the input.
      input_rate: dropout of the patches.
      dtype: compute dtype of the products.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    num_outputs: int
    num_genes: int
    width: int = 256
    patch_width: int = 512
    hidden: int = 256
    scale: int = 8
    gates: tuple[bool, bool] = (True, True)
    skip: bool = True
    use_mlp: bool = False
    rate: float = 0.25
    input_rate: float = 0.1
    dtype: jnp.dtype | None = None
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        width, rate, dtype = self.width, self.rate, self.dtype
        features = AttentionFeatures(rate, rate, self.input_rate, dtype=dtype)
        self.bag = AttentionBag(
            self.feat_dim, self.patch_width, self.hidden, features=features, chunk=self.chunk, impl=self.impl
        )
        self.rho = Affine(self.patch_width, width, TORCH_DEFAULT, dtype)
        encoder = OmicMlp if self.use_mlp else SelfNormalising
        self.omics = encoder(self.num_genes, (width,) * OMIC_BLOCKS, rate, _OMICS, dtype=dtype)
        self.fuse = LateBilinear(
            *(width, width, width, self.scale, rate),
            encoder_rate=0.0,
            gates=self.gates,
            skip=self.skip,
            layer=_FUSION,
            dtype=dtype,
        )
        self.head = Affine(width, self.num_outputs, TORCH_DEFAULT, dtype)

    def __call__(
        self, bags: Bags, genes: Mapping[str, jax.Array], seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predicts for every slide.

        Args:
          bags: the packed patches.
          genes: {"genes": [S, K] float}.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          "embedding" [S, H] (fused), "logits" [S, C], "path" and "omic" [S, H] (the fused vectors), all float32
          (float64 for float64 parameters).
        """
        path = jax.nn.relu(self.rho(self.bag(bags, seed)[:, 0]))
        path = path if seed is None else slot_dropout(path, seed, self.rate, _RHO)
        omic = self.omics(genes["genes"], seed)
        fused = self.fuse(path, omic, seed)
        return {"embedding": fused, "logits": self.head(fused), "path": path, "omic": omic}

    def attention_map(self, bags: Bags, genes: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[R, L] weight of every patch within its slide; `genes` are not read."""
        del genes
        return self.bag.attention_map(bags)[0]
