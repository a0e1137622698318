"""SurvPath (Jaume, Vaidya et al., CVPR 2024; baselines specification, section 11) on packed bags.

Pathway tokens attend to all tokens of their slide, patches attend to the pathways only. So a patch row never needs
another patch, and everything happens in **one pass** of the attention pool over the patches: a patch gives its value
and, beside it, its finished output row. Pathway queries collect the values; one more query, which is zero, weighs all
patches alike and so takes the mean of the output rows. The attention among pathways is joined to what came from patches
through the normalisers of both.

The cost of a chunk grows with the number of slots S: scores against the pathways of all slides are computed and masked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine, affine_columns, affine_to_columns, known_product, operand
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.grouped_snn import DROPOUT_LAYERS, GroupedSelfNormalising
from histokd_jax.nn.layer_norm import LayerNorm, layer_norm
from histokd_jax.ops.dropout import hash_dropout, slot_dropout
from histokd_jax.ops.pooling import CHUNKED, NEG, attention_pool, attention_weights

_PATHWAY_ROWS, _PATCH_ROWS = DROPOUT_LAYERS, DROPOUT_LAYERS + 1

Pooled = tuple[jax.Array, jax.Array]
"""(values [S, Q, V], log of the normaliser [S, Q]) of a softmax over some of the tokens."""


class PatchRows(NamedTuple):
    """What happens to patches, step by step; columns are patches."""

    tokens: jax.Array  # [H, n] after the first norm
    queries: jax.Array  # [A, n] scaled
    keys: jax.Array  # [A, n]
    values: jax.Array  # [A, n]
    attended: jax.Array  # [A, n] step 5
    fed: jax.Array  # [A, n] feed-forward of step 6
    final: jax.Array  # [A, n] last norm of step 6


@dataclasses.dataclass(frozen=True)
class PathwayPatches:
    """Chunk function: values of the patches above their finished rows, and keys; hashable by value.

    Attributes:
      rate: dropout of the feed-forward.
      layer: number of the dropout layer.
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
          params: "proj", "qkv", "fc1", "fc2": ColumnParams; "norm1", "norm2", "norm3": NormParams; "keys" and "values"
            [S, P, A] of the pathways.
          aux: (seed,) to draw dropout, () for none.
          x: [n, D] patches.
          segment_ids: [n] int32.
          positions: [n] int32.

        Returns:
          ([2 A, n] values above output rows, [A, n] keys) in the compute dtype.
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
        """`__call__`, and the product FC(x) [H, n], which is not computed again if it is `known`."""
        proj = params["proj"]
        u = known_product(proj, x, known[0], 1, self.dtype) if known else affine_to_columns(proj, x, self.dtype)
        rows = self.rows(params, aux, u, segment_ids, positions)
        both = jnp.concatenate([rows.values, rows.final])
        return operand(both, self.dtype), operand(rows.keys, self.dtype), (u,)

    def rows(
        self, params: Mapping, aux: tuple[jax.Array, ...], u: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> PatchRows:
        """Every step of projected patches `u` [H, n]; see `__call__`."""
        tokens = layer_norm(params["norm1"], u, axis=0)
        q, k, v = jnp.split(affine_columns(params["qkv"], tokens, self.dtype), 3)
        q = q / math.sqrt(q.shape[0])
        attended = self._attend(q, params["keys"], params["values"], segment_ids)
        h = affine_columns(params["fc1"], layer_norm(params["norm2"], attended, axis=0), self.dtype)
        h = jax.nn.gelu(h, approximate=False)
        if aux:
            h = hash_dropout(h, aux[0], segment_ids, positions, self.rate, self.layer)
        fed = affine_columns(params["fc2"], h, self.dtype)
        return PatchRows(tokens, q, k, v, attended, fed, layer_norm(params["norm3"], fed, axis=0))

    def _attend(self, q: jax.Array, keys: jax.Array, values: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Softmax over the pathways of the own slide; pathways of the others get weight 0."""
        slots, pathways, _ = keys.shape
        own = (segment_ids[None, :] == jnp.arange(1, slots + 1, dtype=segment_ids.dtype)[:, None])[:, None, :]
        scores = jnp.einsum(
            "spk,kn->spn", operand(keys, self.dtype), operand(q, self.dtype), preferred_element_type=q.dtype
        )
        weights = jax.nn.softmax(jnp.where(own, scores, NEG).reshape(slots * pathways, -1), axis=0)
        flat = values.reshape(slots * pathways, -1)
        return jnp.einsum(
            "sk,sn->kn", operand(flat, self.dtype), operand(weights, self.dtype), preferred_element_type=q.dtype
        )


def join(parts: list[Pooled]) -> jax.Array:
    """The softmax over all tokens from softmaxes over disjoint sets of them.

    Args:
      parts: (values [S, Q, V], lse [S, Q]) each; `NEG` where a set is empty.

    Returns:
      [S, Q, V]; 0 where all sets are empty.
    """
    weights = jax.nn.softmax(jnp.stack([lse for _, lse in parts]), axis=0)
    return sum(weight[..., None] * values for weight, (values, _) in zip(weights, parts))


def missing_patches(bags: Bags, pad_to: int) -> Bags:
    """Zero patches that fill every bag up to `pad_to`, one row per slot; positions go on behind those of the bag."""
    slots = jnp.arange(1, bags.num_slots + 1, dtype=jnp.int32)[:, None]
    count = jnp.sum(bags.segment_ids.reshape(1, -1) == slots, axis=1, keepdims=True)
    place = jnp.arange(pad_to, dtype=jnp.int32)[None, :]
    needed = (place >= count) & (count > 0)
    shape = (bags.num_slots, pad_to)
    return Bags(
        jnp.zeros((*shape, bags.patches.shape[-1]), bags.patches.dtype),
        jnp.where(needed, slots, 0),
        jnp.broadcast_to(place, shape),
        bags.num_slots,
    )


class SurvPath(nn.Module):
    """Pathway tokens and patches in one attention without patch-to-patch scores.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: logits C.
      gene_groups: genes of each of the P pathways.
      width: token width H.
      attention: width A of queries, keys, values and of the rows behind the attention.
      hidden: width of the layer before the logits.
      rate: alpha dropout of the pathway blocks.
      feed_rate: dropout of the feed-forward.
      pad_to: 0 (padding does not exist), or the bag size up to which zero patches are added **in training**, where they
        enter attention and mean, as in the authors' code: 4096 there, which also cuts larger bags down to it. They are
        computed like patches, with memory for S x `pad_to` of them.
      dtype: compute dtype of the products.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    num_outputs: int
    gene_groups: tuple[int, ...]
    width: int = 256
    attention: int = 128
    hidden: int = 64
    rate: float = 0.25
    feed_rate: float = 0.1
    pad_to: int = 0
    dtype: jnp.dtype | None = None
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""

        def dense(fan_in: int, out: int, use_bias: bool = True) -> Affine:
            return Affine(fan_in, out, TORCH_DEFAULT, self.dtype, use_bias)

        self.pathways = GroupedSelfNormalising(self.gene_groups, self.width, self.rate)
        self.proj = dense(self.feat_dim, self.width)
        self.qkv = dense(self.width, 3 * self.attention, use_bias=False)
        self.fc1, self.fc2 = (dense(self.attention, self.attention) for _ in range(2))
        self.norm1, self.norm2, self.norm3 = (LayerNorm(w) for w in (self.width, self.attention, self.attention))
        self.encode = dense(2 * self.attention, self.hidden)
        self.head = dense(self.hidden, self.num_outputs)

    def __call__(
        self, bags: Bags, genes: Mapping[str, jax.Array], seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predicts for every slide.

        Args:
          bags: the packed patches.
          genes: {"genes": [S, K] float, pathways side by side}.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          "embedding" [S, 2 A], the mean pathway row and the mean patch row (0 for an empty slot), and "logits" [S, C],
          both float32 (float64 for float64 parameters).
        """
        q, k, v = self._pathway_projections(genes, seed)
        parts = [self._pool(b, q, k, v, seed) for b in self._bag_parts(bags, seed)]
        patches = join([(pooled[:, -1:, self.attention :], lse[:, -1:]) for pooled, lse in parts])[:, 0]
        scores = jnp.einsum("sqk,spk->sqp", q, k)
        among = jnp.einsum("sqp,spk->sqk", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, axis=-1)
        attended = join([among, *((pooled[:, :-1, : self.attention], lse[:, :-1]) for pooled, lse in parts)])
        rows = self._feed_forward(attended, seed)
        embedding = jnp.concatenate([jnp.mean(rows, axis=1), patches], axis=-1)
        self.sow("intermediates", "pathway_rows", {"scores": scores, "attended": attended, "final": rows})
        return {"embedding": embedding, "logits": self.head(jax.nn.relu(self.encode(embedding)))}

    def attention_map(self, bags: Bags, genes: Mapping[str, jax.Array]) -> jax.Array:
        """[R, L] attention of the pathways to every patch, relative to all patches, mean over pathways."""
        q, k, v = self._pathway_projections(genes, None)
        weights = attention_weights(
            *self._arguments(bags, k, v, None), num_slots=bags.num_slots, queries=q, chunk=self.chunk
        )
        return jnp.mean(weights, axis=0)

    def patch_rows(self, bags: Bags, genes: Mapping[str, jax.Array]) -> PatchRows:
        """Every step of all patches at once, columns in packed order; to look into the network, not to train it."""
        _, k, v = self._pathway_projections(genes, None)
        features, params, aux, x, segment_ids, positions = self._arguments(bags, k, v, None)
        segment_ids = segment_ids.reshape(-1)
        x = jnp.where(segment_ids[:, None] > 0, x.reshape(-1, self.feat_dim), 0)
        u = affine_to_columns(params["proj"], x, self.dtype)
        return features.rows(params, aux, u, segment_ids, positions.reshape(-1))

    def _bag_parts(self, bags: Bags, seed: jax.Array | None) -> tuple[Bags, ...]:
        return (bags, missing_patches(bags, self.pad_to)) if self.pad_to and seed is not None else (bags,)

    def _pathway_projections(self, genes, seed) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens = self.pathways(genes["genes"], seed)
        self.sow("intermediates", "pathway_tokens", tokens)
        q, k, v = jnp.split(self.qkv(self.norm1(tokens)), 3, axis=-1)
        return q / math.sqrt(self.attention), k, v

    def _pool(self, bags: Bags, q: jax.Array, k: jax.Array, v: jax.Array, seed: jax.Array | None) -> Pooled:
        mean = jnp.zeros((*q.shape[:1], 1, *q.shape[2:]), q.dtype)
        return attention_pool(
            *self._arguments(bags, k, v, seed),
            num_slots=bags.num_slots,
            queries=jnp.concatenate([q, mean], axis=1),
            chunk=self.chunk,
            impl=self.impl,
        )

    def _arguments(self, bags: Bags, k: jax.Array, v: jax.Array, seed: jax.Array | None) -> tuple:
        bags.check_width(self.feat_dim)
        params = {name: getattr(self, name).columns() for name in ("proj", "qkv", "fc1", "fc2")}
        params |= {name: getattr(self, name).weights() for name in ("norm1", "norm2", "norm3")}
        aux = () if seed is None else (seed,)
        features = PathwayPatches(self.feed_rate, _PATCH_ROWS, self.dtype)
        return features, params | {"keys": k, "values": v}, aux, bags.patches, bags.segment_ids, bags.positions

    def _feed_forward(self, x: jax.Array, seed: jax.Array | None) -> jax.Array:
        h = jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False)
        h = h if seed is None else slot_dropout(h, seed, self.feed_rate, _PATHWAY_ROWS)
        return self.norm3(self.fc2(h))
