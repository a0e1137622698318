"""The self-normalising network on molecular features (survival_baselines, section 2)."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import LECUN_NORMAL, TORCH_DEFAULT, Affine
from histokd_jax.ops.dropout import slot_alpha_dropout


class SelfNormalising(nn.Module):
    """Blocks of linear layer, ELU and alpha dropout.

    Attributes:
      in_features: input width.
      widths: width of every block.
      rate: alpha dropout of every block.
      layer: number of the first dropout layer; one per block is used.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    in_features: int
    widths: tuple[int, ...]
    rate: float = 0.25
    layer: int = 0
    initializer: str = TORCH_DEFAULT
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        inputs = (self.in_features, *self.widths[:-1])
        self.blocks = [Affine(i, o, self.initializer, self.dtype) for i, o in zip(inputs, self.widths)]

    def __call__(self, x: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Runs all blocks.

        Args:
          x: [S, in_features] float.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, widths[-1]] float32 (float64 for float64 parameters).
        """
        for i, block in enumerate(self.blocks):
            x = jax.nn.elu(block(x))
            if seed is not None:
                x = slot_alpha_dropout(x, seed, self.rate, self.layer + i)
        return x


class SnnNet(nn.Module):
    """Genomics only: self-normalising blocks and a linear head, every kernel Normal(0, 1/sqrt(fan_in)), biases 0.

    Attributes:
      num_genes: input width K.
      num_outputs: C.
      widths: width of every block.
      rate: alpha dropout of every block.
      dtype: compute dtype of the products.
    """

    num_genes: int
    num_outputs: int
    widths: tuple[int, ...] = (256, 256, 256, 256)
    rate: float = 0.25
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.body = SelfNormalising(self.num_genes, self.widths, self.rate, initializer=LECUN_NORMAL, dtype=self.dtype)
        self.head = Affine(self.widths[-1], self.num_outputs, LECUN_NORMAL, self.dtype)

    def __call__(
        self, bags: None, genes: Mapping[str, jax.Array], seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """{"embedding" [S, H], "logits" [S, C]}; `bags` is not read."""
        del bags
        features = self.body(genes["genes"], seed)
        return {"embedding": features, "logits": self.head(features)}
