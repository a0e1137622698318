"""MCAT (Chen et al., ICCV 2021; baselines specification, section 9) on packed bags.

Gene groups are tokens that attend to the patches of their slide; two small transformers and gated attention pools
reduce what they gathered, and the tokens themselves, to one vector each, which are fused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn import grouped_snn, post_norm
from histokd_jax.nn.affine import TORCH_DEFAULT, Affine, affine, operand
from histokd_jax.nn.coattention import ProjectedPatches
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil import attention as mil_attention
from histokd_jax.nn.mil.readout import BILINEAR, CONCAT, LateBilinear, LateConcat
from histokd_jax.ops.dropout import slot_dropout
from histokd_jax.ops.pooling import CHUNKED, NEG, attention_pool, attention_weights

FUSIONS = (CONCAT, BILINEAR)
_TOKENS, _PATCHES = 0, grouped_snn.DROPOUT_LAYERS
_PATH = _PATCHES + 1
STREAM_DEPTH = 2
STREAM_DROPOUTS = STREAM_DEPTH * post_norm.LAYER_DROPOUTS + mil_attention.DROPOUT_LAYERS + 1
_OMIC = _PATH + STREAM_DROPOUTS
_FUSION = _OMIC + STREAM_DROPOUTS


class TokenCoAttention(nn.Module):
    """Tokens of a slide attend to its patches; one head, biases, packed projection, output projection.

    As in `histokd_jax.nn.coattention`, key and value layers are moved out of the loop over patches, exactly.

    Attributes:
      feat_dim: patch-embedding width D.
      width: width H of projected patches, tokens and output.
      features: the chunk function.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    width: int
    features: ProjectedPatches
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        self.proj = Affine(self.feat_dim, self.width, TORCH_DEFAULT)
        self.qkv = self.param("qkv", post_norm.packed_projection_init(self.width))
        self.out = self.param("out", post_norm.attention_output_init(self.width))

    def __call__(self, bags: Bags, tokens: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Attends to the patches of every slide.

        Args:
          bags: the packed patches.
          tokens: [S, Q, H] float.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, Q, H] float32 (float64 for float64 parameters); 0 for an empty slot.
        """
        queries, _ = self._queries(tokens)
        pooled, lse = attention_pool(
            *self._arguments(bags, seed), num_slots=bags.num_slots, queries=queries, chunk=self.chunk, impl=self.impl
        )
        dtype = self.features.dtype
        mixed = affine(self.out, affine(self._part(2), pooled, dtype), dtype)
        return jnp.where(lse[..., None] > NEG / 2, mixed, 0.0)

    def attention_map(self, bags: Bags, tokens: jax.Array) -> jax.Array:
        """[Q, R, L] attention of every token to the patches of its slide; 0 on padding."""
        queries, _ = self._queries(tokens)
        arguments = self._arguments(bags, None)
        return attention_weights(*arguments, num_slots=bags.num_slots, queries=queries, chunk=self.chunk)

    def scores(self, bags: Bags, tokens: jax.Array) -> jax.Array:
        """[Q, R, L] scores q k / sqrt(H) before the softmax, which the authors' code returns; 0 on padding."""
        queries, shift = self._queries(tokens)
        features, params, _, x, segment_ids, positions = self._arguments(bags, None)
        flat = segment_ids.reshape(-1)
        x = jnp.where(flat[:, None] > 0, x.reshape(-1, self.feat_dim), 0)
        h, _ = features(params, (), x, flat, positions.reshape(-1))
        scores = jnp.einsum("sqh,hn->sqn", queries, h.astype(queries.dtype)) + shift[..., None]
        own = flat[None, :] == jnp.arange(1, bags.num_slots + 1)[:, None]
        return jnp.sum(jnp.where(own[:, None], scores, 0.0), axis=0).reshape(-1, *segment_ids.shape)

    def _part(self, i: int) -> dict[str, jax.Array]:
        """The query (0), key (1) or value (2) layer."""
        cut = slice(i * self.width, (i + 1) * self.width)
        return {"kernel": self.qkv["kernel"][:, cut], "bias": self.qkv["bias"][cut]}

    def _queries(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries [S, Q, H] in the space of the projected patches, and what the key bias adds to the scores [S, Q]."""
        dtype, key = self.features.dtype, self._part(1)
        queries = affine(self._part(0), tokens, dtype) / math.sqrt(self.width)
        moved = jnp.einsum(
            "sqk,hk->sqh", operand(queries, dtype), operand(key["kernel"], dtype), preferred_element_type=queries.dtype
        )
        return moved, queries @ key["bias"]

    def _arguments(self, bags: Bags, seed: jax.Array | None) -> tuple:
        bags.check_width(self.feat_dim)
        aux = () if seed is None else (seed,)
        return self.features, self.proj.columns(), aux, bags.patches, bags.segment_ids, bags.positions


class TokenStream(nn.Module):
    """Tokens to one vector: post-norm encoder, gated attention pool with dropout, linear layer, ReLU, dropout.

    Attributes:
      width: token width H.
      rate: every dropout.
      layer: number of the first dropout layer; `STREAM_DROPOUTS` are used.
      dtype: compute dtype of the products.
    """

    width: int
    rate: float
    layer: int
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        pool = self.layer + STREAM_DEPTH * post_norm.LAYER_DROPOUTS
        self.encoder = post_norm.PostNormEncoder(
            self.width, depth=STREAM_DEPTH, rate=self.rate, layer=self.layer, dtype=self.dtype
        )
        self.attention = mil_attention.AttentionHead(
            self.width, self.width, rate=self.rate, layer=pool, dtype=self.dtype
        )
        self.rho = Affine(self.width, self.width, TORCH_DEFAULT, self.dtype)

    def __call__(self, tokens: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """[S, T, H] to [S, H], non-negative; `seed` draws dropout."""
        encoded = self.encoder(tokens, seed)
        self.sow("intermediates", "encoded", encoded)
        pooled, _ = self.attention(encoded, seed)
        v = jax.nn.relu(self.rho(pooled[:, 0]))
        return v if seed is None else slot_dropout(v, seed, self.rate, self.layer + STREAM_DROPOUTS - 1)


class Mcat(nn.Module):
    """Co-attention of gene groups with patches, two token streams, fusion.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: logits C.
      gene_groups: genes of each group.
      width: width H of everything.
      fusion: "concat" or "bilinear".
      rate: every dropout, alpha dropout of the gene groups included.
      dtype: compute dtype of the products.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    num_outputs: int
    gene_groups: tuple[int, ...]
    width: int = 256
    fusion: str = CONCAT
    rate: float = 0.25
    dtype: jnp.dtype | None = None
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        width, rate, dtype = self.width, self.rate, self.dtype
        self.groups = grouped_snn.GroupedSelfNormalising(self.gene_groups, width, rate, _TOKENS)
        features = ProjectedPatches(rate, _PATCHES, dtype)
        self.coattention = TokenCoAttention(self.feat_dim, width, features, self.chunk, self.impl)
        self.path_stream = TokenStream(width, rate, _PATH, dtype)
        self.omic_stream = TokenStream(width, rate, _OMIC, dtype)
        if self.fusion == CONCAT:
            self.fuse = LateConcat(width, width, width, dtype=dtype)
        else:
            self.fuse = LateBilinear(width, width, width, rate=rate, encoder_rate=rate, layer=_FUSION, dtype=dtype)
        self.head = Affine(width, self.num_outputs, TORCH_DEFAULT, dtype)

    def __call__(
        self, bags: Bags, genes: Mapping[str, jax.Array], seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predicts for every slide.

        Args:
          bags: the packed patches.
          genes: {"genes": [S, K] float, groups side by side}.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          "embedding" [S, H] (fused), "logits" [S, C], "path" and "omic" [S, H] (the fused vectors), "group_tokens" and
          "coattended" [S, Q, H], all float32 (float64 for float64 parameters).
        """
        tokens = self.groups(genes["genes"], seed)
        gathered = self.coattention(bags, tokens, seed)
        path, omic = self.path_stream(gathered, seed), self.omic_stream(tokens, seed)
        fused = self.fuse(path, omic, seed)
        named = {"path": path, "omic": omic, "group_tokens": tokens, "coattended": gathered}
        return {"embedding": fused, "logits": self.head(fused), **named}

    def attention_map(self, bags: Bags, genes: Mapping[str, jax.Array]) -> jax.Array:
        """[R, L] co-attention to every patch, mean over the groups; 0 on padding."""
        return jnp.mean(self.coattention.attention_map(bags, self.groups(genes["genes"])), axis=0)

    def coattention_scores(self, bags: Bags, genes: Mapping[str, jax.Array]) -> jax.Array:
        """[Q, R, L] raw score of every group and patch, **before** the softmax; 0 on padding."""
        return self.coattention.scores(bags, self.groups(genes["genes"]))
