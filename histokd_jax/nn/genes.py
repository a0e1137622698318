"""Gene vectors as tokens: reshape, shared self-normalising layer, gated attention (MKD specification 4.3, 4.4, 12)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import LECUN_NORMAL, Affine
from histokd_jax.nn.fusion import DROPOUT_LAYERS, BilinearFusion
from histokd_jax.nn.gated_attention import GatedAttention
from histokd_jax.ops.dropout import slot_alpha_dropout, slot_dropout


def tokenise(genes: jax.Array, token_size: int) -> jax.Array:
    """Cuts a gene vector in rank order into tokens: gene r goes to token r // size, position r % size.

    Args:
      genes: [S, K] float.
      token_size: genes per token; must divide K.

    Returns:
      [S, K / token_size, token_size].

    Raises:
      ValueError: if `token_size` does not divide K.
    """
    slots, total = genes.shape
    if token_size < 1 or total % token_size or not total:
        raise ValueError(
            f"{total} genes cannot be cut into tokens of {token_size}: genes.top_k must be a positive multiple of "
            "genes.token_size"
        )
    return genes.reshape(slots, total // token_size, token_size)


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """What happens to a gene vector before it is pooled.

    Attributes:
      token_size: genes per token.
      rate: alpha dropout of the token embedding.
      input_rate: inverted dropout of the genes.
      clip: genes are clipped to +-clip first; None leaves them.
    """

    token_size: int = 512
    rate: float = 0.0
    input_rate: float = 0.0
    clip: float | None = None


TOKEN_DROPOUT_LAYERS = 2
"""Dropout layers of one `TokenEncoder`, for numbering."""


class TokenEncoder(nn.Module):
    """Token embedding shared by all tokens: clip, input dropout, linear layer, ELU, alpha dropout.

    Attributes:
      spec: token size, dropout rates, clipping.
      width: output width H.
      layer: number of the first dropout layer; `TOKEN_DROPOUT_LAYERS` are used.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    spec: TokenSpec
    width: int
    layer: int = 0
    initializer: str = LECUN_NORMAL
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.proj = Affine(self.spec.token_size, self.width, self.initializer, self.dtype)

    def __call__(self, genes: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Embeds genes.

        Args:
          genes: [S, K] float in rank order.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, K / token_size, H] float32 (float64 for float64 parameters).
        """
        spec = self.spec
        if spec.clip is not None:
            genes = jnp.clip(genes, -spec.clip, spec.clip)
        if seed is not None:
            genes = slot_dropout(genes, seed, spec.input_rate, self.layer)
        tokens = jax.nn.elu(self.proj(tokenise(genes, spec.token_size)))
        return tokens if seed is None else slot_alpha_dropout(tokens, seed, spec.rate, self.layer + 1)


class GeneEncoder(nn.Module):
    """One gene stream to one vector per slide: tokens, then gated attention over them.

    Attributes:
      spec: token size, dropout rates, clipping.
      width: output width H.
      hidden: attention width A.
      layer: number of the first dropout layer.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    spec: TokenSpec
    width: int
    hidden: int
    layer: int = 0
    initializer: str = LECUN_NORMAL
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.tokens = TokenEncoder(self.spec, self.width, self.layer, self.initializer, self.dtype)
        self.attention = GatedAttention(self.width, self.hidden, self.initializer, self.dtype)

    def __call__(self, streams: Mapping[str, jax.Array], seed: jax.Array | None = None) -> jax.Array:
        """Pools the genes of every slide.

        Args:
          streams: {"genes": [S, K] float in rank order}; other fields are ignored.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, H] float32 (float64 for float64 parameters).
        """
        pooled, weights = self.attention(self.tokens(streams["genes"], seed))
        self.sow("intermediates", "weights", weights)
        self.sow("intermediates", "pooled", pooled)
        return pooled


class TwoStreamGeneEncoder(nn.Module):
    """mRNA and copy number to one vector per slide (MKD specification 12).

    Each stream has its own token embedding, one pool serves both, and a bilinear fusion (copy number first) joins them.

    Attributes:
      spec: token size, dropout rates, clipping, for both streams.
      width: output width H.
      hidden: attention width A.
      fusion_rate: dropout of the fusion.
      layer: number of the first dropout layer; `TWO_STREAM_DROPOUT_LAYERS` are used.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    spec: TokenSpec
    width: int
    hidden: int
    fusion_rate: float = 0.0
    layer: int = 0
    initializer: str = LECUN_NORMAL
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        common = (self.initializer, self.dtype)
        self.mrna = TokenEncoder(self.spec, self.width, self.layer, *common)
        self.cnv = TokenEncoder(self.spec, self.width, self.layer + TOKEN_DROPOUT_LAYERS, *common)
        self.attention = GatedAttention(self.width, self.hidden, *common)
        first = self.layer + 2 * TOKEN_DROPOUT_LAYERS
        self.fusion = BilinearFusion(
            self.width, rate=self.fusion_rate, layer=first, initializer=self.initializer, dtype=self.dtype
        )

    def __call__(self, streams: Mapping[str, jax.Array], seed: jax.Array | None = None) -> jax.Array:
        """Fuses the two streams of every slide.

        Args:
          streams: {"genes": [S, K] float expression, "cnv": [S, K'] float copy number}, each in its rank order.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, H] float32 (float64 for float64 parameters), non-negative.
        """
        mrna, _ = self.attention(self.mrna(streams["genes"], seed))
        cnv, _ = self.attention(self.cnv(streams["cnv"], seed))
        self.sow("intermediates", "pooled_mrna", mrna)
        self.sow("intermediates", "pooled_cnv", cnv)
        fused = self.fusion(cnv, mrna, seed)
        self.sow("intermediates", "pooled", fused)
        return fused


TWO_STREAM_DROPOUT_LAYERS = 2 * TOKEN_DROPOUT_LAYERS + DROPOUT_LAYERS
"""Dropout layers of one `TwoStreamGeneEncoder`, for numbering."""
