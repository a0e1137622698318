"""CLAM, single- and multi-branch: attention pooling with instance heads on extreme patches (survival_baselines, 7)."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil import selection
from histokd_jax.nn.mil.attention import AttentionBag, AttentionFeatures
from histokd_jax.nn.mil.deepsets import patch_counts
from histokd_jax.ops.pooling import CHUNKED


class ClamNet(nn.Module):
    """Attention pooling, bag head, and one instance head per class.

    Which instances train which head, and with which label, is the objective's: the network gives the logits of every
    class's head on the patches of highest and lowest attention.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: C.
      multi_branch: one attention map, vector and bag head per class (CLAM-MB) or one for all (CLAM-SB).
      width: width H of the projected patches.
      hidden: attention width A.
      instances: B, patches per end; of a bag with N patches min(B, N // 2) count.
      gated: gated or plain attention.
      rate: every dropout, also that of both attention branches.
      dtype: compute dtype of the products.
      chunk: patches per chunk of the pool.
      impl: implementation of the pool, see `attention_pool`.
    """

    feat_dim: int
    num_outputs: int
    multi_branch: bool = False
    width: int = 512
    hidden: int = 256
    instances: int = 8
    gated: bool = True
    rate: float = 0.25
    dtype: jnp.dtype | None = None
    chunk: int = 512
    impl: str = CHUNKED

    def setup(self) -> None:
        """Declares the layers."""

        def dense(out: int) -> Affine:
            return Affine(self.width, out, TORCH_DEFAULT, self.dtype)

        classes = range(self.num_outputs)
        features = AttentionFeatures(self.rate, self.rate, gated=self.gated, dtype=self.dtype)
        self.bag = AttentionBag(
            self.feat_dim,
            self.width,
            self.hidden,
            self.num_outputs if self.multi_branch else 1,
            features,
            chunk=self.chunk,
            impl=self.impl,
        )
        self.heads = [dense(1) for _ in classes] if self.multi_branch else [dense(self.num_outputs)]
        self.instance = [dense(2) for _ in classes]

    def __call__(
        self, bags: Bags, genes: Mapping[str, jax.Array] | None = None, seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Logits of every slide and of its extreme patches.

        Args:
          bags: the packed patches.
          genes: not read.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          {"embedding" [S, H] (CLAM-MB: [S, C H]), "logits" [S, C], "pooled" [S, Q, H],
          "instance_logits" [S, C, 2 B, 2] (highest attention first, then the lowest, lowest first),
          "instance_valid" [S, 2 B], 1 where the bag has the instance}.
        """
        del genes
        pooled = self.bag(bags, seed)
        logits = jnp.concatenate([head(pooled[:, i]) for i, head in enumerate(self.heads)], axis=-1)
        instances = self._instance_vectors(bags, seed)
        per_class = [head(instances[:, i % instances.shape[1]]) for i, head in enumerate(self.instance)]
        return {
            "embedding": pooled.reshape(pooled.shape[0], -1),
            "logits": logits,
            "pooled": pooled,
            "instance_logits": jnp.stack(per_class, axis=1),
            "instance_valid": self._instance_valid(bags),
        }

    def attention_map(self, bags: Bags, genes: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[R, L] weight of each patch within its slide; CLAM-MB: the mean of the maps of the classes."""
        return jnp.mean(self.attention_maps(bags, genes), axis=0)

    def attention_maps(self, bags: Bags, genes: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[Q, R, L]: Q = C distributions of CLAM-MB, one of CLAM-SB."""
        del genes
        return self.bag.attention_map(bags)

    def select(self, bags: Bags, seed: jax.Array | None = None) -> selection.Selected:
        """The `instances` patches of highest and of lowest attention of every slide and map."""
        fn, params, aux, *_ = self.bag.arguments(bags, seed)
        return selection.select(fn, params, aux, bags, self.instances, chunk=self.chunk)

    def _instance_vectors(self, bags: Bags, seed: jax.Array | None) -> jax.Array:
        """[S, Q, 2 B, H]: activations of the selected patches, with the dropout of the bag."""
        chosen = self.select(bags, seed)
        fn, params, aux, *_ = self.bag.arguments(bags, seed)
        h, _ = fn.hidden(params["proj"], aux, *chosen.identity())
        h = jnp.moveaxis(h.T.reshape(*chosen.valid.shape, -1), 0, 2)
        return h.reshape(*h.shape[:2], 2 * self.instances, -1)

    def _instance_valid(self, bags: Bags) -> jax.Array:
        held = jnp.minimum(jnp.floor(patch_counts(bags) / 2.0), self.instances)
        valid = jnp.arange(self.instances)[None, :] < held[:, None]
        return jnp.concatenate([valid, valid], axis=1).astype(jnp.float32)
