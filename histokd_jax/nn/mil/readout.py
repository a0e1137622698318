"""From a pooled slide vector to logits: rho, late fusion with molecular features, head (survival_baselines, 3 to 6)."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.nn.snn import SelfNormalising
from histokd_jax.ops.dropout import slot_dropout

NONE, CONCAT, BILINEAR = "none", "concat", "bilinear"
FUSIONS = (NONE, CONCAT, BILINEAR)

OMIC_BLOCKS = 2
BILINEAR_LAYERS = 5
"""Dropout layers of one `LateBilinear`, for numbering."""
DROPOUT_LAYERS = 1 + OMIC_BLOCKS + BILINEAR_LAYERS
"""Dropout layers of one `Readout`, for numbering."""


class LateConcat(nn.Module):
    """`ReLU(FC(ReLU(FC([p, o]))))`, both layers as wide as the result, no dropout (section 6).

    Attributes:
      image_width: width of the image vector p.
      omic_width: width of the molecular vector o.
      width: output width.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    image_width: int
    omic_width: int
    width: int
    initializer: str = TORCH_DEFAULT
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.encode = Affine(self.image_width + self.omic_width, self.width, self.initializer, self.dtype)
        self.merge = Affine(self.width, self.width, self.initializer, self.dtype)

    def __call__(self, image: jax.Array, omic: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """[S, image_width], [S, omic_width] to [S, width], non-negative; `seed` is not used."""
        del seed
        return jax.nn.relu(self.merge(jax.nn.relu(self.encode(jnp.concatenate([image, omic], axis=-1)))))


class LateBilinear(nn.Module):
    """Gated outer product of two vectors (section 6); unlike MKD's, its gates are linear in [image, omic].

    Attributes:
      image_width: width of the image vector p.
      omic_width: width of the molecular vector o.
      width: output width.
      scale: each factor is its vector's width divided by this.
      rate: dropout of the two factors and of the outer product.
      encoder_rate: dropout of the two encoder layers.
      gates: whether the image factor and the omic factor are gated.
      skip: whether both vectors are appended before the last layer.
      layer: number of the first dropout layer; `BILINEAR_LAYERS` are used.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    image_width: int
    omic_width: int
    width: int
    scale: int = 8
    rate: float = 0.25
    encoder_rate: float = 0.25
    gates: tuple[bool, bool] = (True, True)
    skip: bool = False
    layer: int = 0
    initializer: str = TORCH_DEFAULT
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""

        def dense(fan_in: int, out: int) -> Affine:
            return Affine(fan_in, out, self.initializer, self.dtype)

        joint = self.image_width + self.omic_width
        inner1, inner2 = self.image_width // self.scale, self.omic_width // self.scale
        self.h1, self.h2 = dense(self.image_width, inner1), dense(self.omic_width, inner2)
        self.z1 = dense(joint, inner1) if self.gates[0] else None
        self.z2 = dense(joint, inner2) if self.gates[1] else None
        self.o1, self.o2 = dense(inner1, inner1), dense(inner2, inner2)
        self.encode = dense((inner1 + 1) * (inner2 + 1), self.width)
        self.merge = dense(self.width + (joint if self.skip else 0), self.width)

    def __call__(self, image: jax.Array, omic: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Fuses two vectors per slide; the order of the arguments matters.

        Args:
          image: [S, image_width] float.
          omic: [S, omic_width] float.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, width] float32 (float64 for float64 parameters), non-negative.
        """

        def drop(v: jax.Array, rate: float, offset: int) -> jax.Array:
            return v if seed is None else slot_dropout(v, seed, rate, self.layer + offset)

        flat = self.outer(image, omic, seed)
        self.sow("intermediates", "outer", flat)
        encoded = drop(jax.nn.relu(self.encode(drop(flat, self.rate, 2))), self.encoder_rate, 3)
        if self.skip:
            encoded = jnp.concatenate([encoded, image, omic], axis=-1)
        return drop(jax.nn.relu(self.merge(encoded)), self.encoder_rate, 4)

    def outer(self, image: jax.Array, omic: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """[S, (inner1 + 1)(inner2 + 1)], row-major: every product of [o1, 1] and [o2, 1]; the last element is 1."""
        both = jnp.concatenate([image, omic], axis=-1)
        factors = []
        parts = ((self.h1, self.z1, self.o1, image), (self.h2, self.z2, self.o2, omic))
        for offset, (h, z, o, own) in enumerate(parts):
            value = jax.nn.relu(h(own)) if z is None else jax.nn.sigmoid(z(both)) * jax.nn.relu(h(own))
            factor = jax.nn.relu(o(value))
            if seed is not None:
                factor = slot_dropout(factor, seed, self.rate, self.layer + offset)
            factors.append(jnp.concatenate([factor, jnp.ones((factor.shape[0], 1), factor.dtype)], axis=-1))
        return (factors[0][:, :, None] * factors[1][:, None, :]).reshape(image.shape[0], -1)


class Readout(nn.Module):
    """rho (linear layer, ReLU, dropout), late fusion if asked for, and the head.

    Attributes:
      in_features: width of the pooled vector.
      width: width of rho, of the omic blocks and of the embedding; 0: no rho, the head reads the pooled vector.
      num_outputs: C.
      fusion: one of `FUSIONS`.
      num_genes: input width K of the omic blocks, if there is a fusion.
      rate: every dropout of this module.
      layer: number of the first dropout layer; `DROPOUT_LAYERS` are used.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    in_features: int
    width: int
    num_outputs: int
    fusion: str = NONE
    num_genes: int = 0
    rate: float = 0.25
    layer: int = 0
    initializer: str = TORCH_DEFAULT
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        width, common = self.width or self.in_features, dict(initializer=self.initializer, dtype=self.dtype)
        if self.width:
            self.rho = Affine(self.in_features, width, **common)
        if self.fusion != NONE:
            widths = (width,) * OMIC_BLOCKS
            self.omics = SelfNormalising(self.num_genes, widths, self.rate, self.layer + 1, **common)
        if self.fusion == CONCAT:
            self.fuse = LateConcat(width, width, width, **common)
        if self.fusion == BILINEAR:
            first = self.layer + 1 + OMIC_BLOCKS
            self.fuse = LateBilinear(width, width, width, rate=self.rate, encoder_rate=self.rate, layer=first, **common)
        self.head = Affine(width, self.num_outputs, **common)

    def __call__(
        self, pooled: jax.Array, genes: Mapping[str, jax.Array] | None = None, seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Logits of every slide.

        Args:
          pooled: [S, in_features] float.
          genes: {"genes": [S, K]} if there is a fusion.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          {"embedding" [S, H] (what the head reads), "logits" [S, C], "rho" [S, H] (the image vector)}.
        """
        image = pooled
        if self.width:
            image = jax.nn.relu(self.rho(pooled))
            image = image if seed is None else slot_dropout(image, seed, self.rate, self.layer)
        embedding = image
        if self.fusion != NONE:
            embedding = self.fuse(image, self.omics(genes["genes"], seed), seed)
        return {"embedding": embedding, "logits": self.head(embedding), "rho": image}
