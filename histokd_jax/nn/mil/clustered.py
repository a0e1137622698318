"""DeepAttnMISL: patches pooled by cluster, then attention over the clusters (survival_baselines, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.attention import DROPOUT_LAYERS, AttentionHead
from histokd_jax.nn.mil.deepsets import PatchLayers
from histokd_jax.nn.mil.readout import NONE, Readout
from histokd_jax.ops.dropout import slot_dropout
from histokd_jax.ops.pooling import CHUNKED, attention_pool, layout

# Numbers of the dropout layers: two of the patches, one of the cluster vectors, the attention's, the readout's.
_CLUSTER_LAYER, _ATTENTION_LAYER = 2, 3
_READOUT_LAYER = _ATTENTION_LAYER + DROPOUT_LAYERS


class ClusteredBags(NamedTuple):
    """`Bags` whose patches also have a cluster each."""

    patches: jax.Array  # [R, L, D]
    segment_ids: jax.Array  # [R, L] int32
    positions: jax.Array  # [R, L] int32
    num_slots: int
    clusters: jax.Array  # [R, L] int32 in [0, k); anything on padding

    def bags(self) -> Bags:
        """The same patches without clusters."""
        return Bags(*self[:4])


class DeepAttnMislNet(nn.Module):
    """Per cluster two linear layers of its own and a mean; attention over the clusters; readout.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: C.
      num_clusters: k.
      width: width of the patch and cluster layers.
      hidden: attention width A.
      rho: width of rho and of the embedding.
      fusion: late fusion with molecular features, see `readout.FUSIONS`.
      num_genes: K, for a fusion.
      rate: every dropout.
      dtype: compute dtype of the products.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    num_outputs: int
    num_clusters: int = 10
    width: int = 512
    hidden: int = 256
    rho: int = 256
    fusion: str = NONE
    num_genes: int = 0
    rate: float = 0.25
    dtype: jnp.dtype | None = None
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""
        clusters = range(self.num_clusters)
        self.first = [Affine(self.feat_dim, self.width, TORCH_DEFAULT) for _ in clusters]
        self.second = [Affine(self.width, self.width, TORCH_DEFAULT) for _ in clusters]
        self.proj = Affine(self.width, self.width, TORCH_DEFAULT, self.dtype)
        self.attention = AttentionHead(
            self.width, self.hidden, rate=self.rate, layer=_ATTENTION_LAYER, initializer=TORCH_DEFAULT, dtype=self.dtype
        )
        self.readout = Readout(
            self.width,
            self.rho,
            self.num_outputs,
            self.fusion,
            self.num_genes,
            self.rate,
            layer=_READOUT_LAYER,
            dtype=self.dtype,
        )

    def __call__(
        self, bags: ClusteredBags, genes: Mapping[str, jax.Array] | None = None, seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Logits of every slide.

        Args:
          bags: packed patches with their clusters.
          genes: {"genes": [S, K]} if there is a fusion.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          {"embedding" [S, H], "logits" [S, C], "rho" [S, H], "pooled" [S, width], "cluster_means" [S, k, width],
          "cluster_attention" [S, k]}; the mean of an empty cluster is 0.

        Raises:
          ValueError: patches of another width, or (where they are known) cluster ids outside [0, k).
        """
        means = self._means(bags, seed)
        tokens = jax.nn.relu(self.proj(means))
        if seed is not None:
            tokens = slot_dropout(tokens, seed, self.rate, _CLUSTER_LAYER)
        pooled, weights = self.attention(tokens, seed)
        outputs = self.readout(pooled[:, 0], genes, seed)
        extras = {"pooled": pooled[:, 0], "cluster_means": means, "cluster_attention": weights[:, 0]}
        return {**outputs, **extras}

    def attention_map(self, bags: ClusteredBags, genes: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[R, L] weight of each patch within its slide: its cluster's weight over the cluster's size.

        The weights of empty clusters belong to no patch, so the patches of a slide share what is left.
        """
        del genes
        weights = self.attention(jax.nn.relu(self.proj(self._means(bags, None))))[1][:, 0]
        sizes = self._sizes(bags)
        share = jnp.where(sizes > 0, weights / jnp.maximum(sizes, 1.0), 0.0)
        share = share / jnp.maximum(jnp.sum(share * sizes, axis=1, keepdims=True), jnp.finfo(share.dtype).tiny)
        slot = jnp.maximum(bags.segment_ids - 1, 0)
        cluster = jnp.clip(bags.clusters, 0, self.num_clusters - 1)
        return jnp.where(bags.segment_ids > 0, share[slot, cluster], 0.0)

    def _means(self, bags: ClusteredBags, seed: jax.Array | None) -> jax.Array:
        """[S, k, width]: one pool per cluster, in one loop over the stacked layers of the clusters."""
        self._check(bags)
        layers = (self.first, self.second)
        stacked = tuple(jax.tree.map(lambda *p: jnp.stack(p), *(a.columns() for a in part)) for part in layers)
        bags = _by_cluster(bags, self.num_clusters)

        def pool(carry: None, cluster: tuple) -> tuple[None, jax.Array]:
            index, params = cluster
            mean, _ = attention_pool(
                # Products kept for the backward pass would be kept once per cluster.
                PatchLayers(self.rate, dtype=self.dtype),
                params,
                () if seed is None else (seed,),
                bags.patches,
                jnp.where(bags.clusters == index, bags.segment_ids, 0),
                bags.positions,
                num_slots=bags.num_slots,
                chunk=self.chunk,
                impl=self.impl,
            )
            return carry, mean[:, 0]

        _, means = jax.lax.scan(pool, None, (jnp.arange(self.num_clusters), stacked))
        return jnp.swapaxes(means, 0, 1)

    def _sizes(self, bags: ClusteredBags) -> jax.Array:
        """[S, k] float32: patches of every cluster of every slot."""
        flat = jnp.where(bags.segment_ids > 0, (bags.segment_ids - 1) * self.num_clusters + bags.clusters, -1)
        total = bags.num_slots * self.num_clusters
        counts = jnp.zeros(total).at[jnp.where(flat < 0, total, flat).reshape(-1)].add(1.0, mode="drop")
        return counts.reshape(bags.num_slots, self.num_clusters)

    def _check(self, bags: ClusteredBags) -> None:
        bags.bags().check_width(self.feat_dim)
        if bags.clusters.shape != bags.segment_ids.shape:
            raise ValueError(f"clusters {bags.clusters.shape} and segment_ids {bags.segment_ids.shape} do not fit")
        if isinstance(bags.clusters, jax.core.Tracer) or isinstance(bags.segment_ids, jax.core.Tracer):
            return
        used = np.asarray(bags.clusters)[np.asarray(bags.segment_ids) > 0]
        if used.size and not 0 <= used.min() <= used.max() < self.num_clusters:
            raise ValueError(
                f"cluster ids lie in {used.min()}..{used.max()}, but the network has {self.num_clusters} clusters: fit "
                "the clusters again with that number, or set model.deepattnmisl.clusters"
            )


def _by_cluster(bags: ClusteredBags, num_clusters: int) -> ClusteredBags:
    """The patches of every device in the order of their clusters, padding last.

    The pool skips chunks without a patch of its cluster. In stored order nearly every chunk holds every cluster, and
    every patch would run through the layers of all of them; sorted, it costs one copy of the patches.
    """

    def local(*fields: jax.Array) -> tuple[jax.Array, ...]:
        _, segment_ids, _, clusters = fields
        order = jnp.argsort(jnp.where(segment_ids > 0, clusters, num_clusters).reshape(-1))

        def ordered(t: jax.Array) -> jax.Array:
            # A permutation is within bounds; the check would cost a second copy.
            flat = t.reshape(-1, *t.shape[2:]).at[order]
            return flat.get(mode="promise_in_bounds", unique_indices=True).reshape(t.shape)

        return tuple(map(ordered, fields))

    if layout.axes():
        rows = layout.patch_spec()
        local = layout.on_shards(local, (rows,) * 4, (rows,) * 4)
    patches, segment_ids, positions, clusters = local(
        *map(jnp.asarray, (bags.patches, bags.segment_ids, bags.positions, bags.clusters))
    )
    return ClusteredBags(patches, segment_ids, positions, bags.num_slots, clusters)
