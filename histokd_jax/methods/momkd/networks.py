"""The networks of MoMKD: slide branch and gene branch (specification 3.1 to 3.3, 3.6)."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.methods.momkd import memory
from histokd_jax.methods.momkd.graph import CENTRE_TO_NEIGHBOUR, GraphAttention, make_edges
from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.nn.gated_attention import GatedAttention
from histokd_jax.nn.layer_norm import LayerNorm
from histokd_jax.ops.dropout import hash_dropout, slot_dropout

SLIDE, GENES, MEMORY = "SLIDE", "GENES", "MEMORY"
MEMORY_POOL, GATED, MEAN = "memory", "gated_attention", "mean"
BASELINE_POOLS = (GATED, MEAN)

# Numbers of the dropout layers; equal numbers would draw equal masks.
_EDGE_1, _EDGE_2, _NODE_1, _NODE_2, _HEAD = range(5)
_GATE_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """Everything that fixes the architecture.

    Attributes:
      feat_dim: patch-embedding width.
      num_classes: outputs of the classifier. The losses know two classes only.
      num_genes: K; 0: there is no gene branch.
      width: D of the slide encoder.
      gene_width: D_r, width of the gene embedding.
      gene_hidden: hidden width of gene encoder and decoder.
      sphere: S, dimension in which slides, genes and codes are compared.
      codes: n codes per class.
      heads: heads of the graph attention.
      head_hidden: hidden width of the classifier.
      node_rate: dropout of patch features.
      edge_rate: dropout of graph attention weights.
      head_rate: dropout in the classifier.
      gene_rate: dropout in gene encoder and decoder.
      direction: see `graph.make_edges`.
      pool: how patches are pooled: by the memories, or "gated_attention" or "mean" as a baseline without them.
      tau: initial temperature of the memory attention.
      learn_tau: whether it is trained.
      attention_grad_to_memory: lets the gradient of the attention reach the codes (section 5.1).
      dtype: compute dtype of matrix products; None keeps the parameters'.
    """

    feat_dim: int = 1536
    num_classes: int = 2
    num_genes: int = 768
    width: int = 512
    gene_width: int = 512
    gene_hidden: int = 512
    sphere: int = 64
    codes: int = 16
    heads: int = 2
    head_hidden: int = 128
    node_rate: float = 0.5
    edge_rate: float = 0.5
    head_rate: float = 0.5
    gene_rate: float = 0.25
    direction: str = CENTRE_TO_NEIGHBOUR
    pool: str = MEMORY_POOL
    tau: float = 0.2
    learn_tau: bool = True
    attention_grad_to_memory: bool = False
    dtype: jnp.dtype | None = None


class Graphs(NamedTuple):
    """The patches of one step with their graph (see `histokd_jax.types.Batch`)."""

    patches: jax.Array  # [R, L, feat_dim]; anything on padding
    segment_ids: jax.Array  # [R, L] int32
    positions: jax.Array  # [R, L] int32
    neighbours: jax.Array  # [R, L, k] int32
    num_slots: int


class Encoded(NamedTuple):
    """What the slide branch knows of every patch, flat over the rows of the step."""

    features: jax.Array  # [N, D] F
    sphere: jax.Array  # [N, S] q, unit vectors
    attention: jax.Array  # [N], sums to 1 over a slide; 0 on padding
    segment_ids: jax.Array  # [N] int32
    first: jax.Array  # [N, D] output of the first graph layer


class SlideNet(nn.Module):
    """Graph encoder, patch projector, memory-guided pool, classifier and slide projector.

    Attributes:
      spec: the architecture.
    """

    spec: NetworkSpec

    def setup(self) -> None:
        """Declares the layers."""
        spec = self.spec
        options = {"rate": spec.edge_rate, "dtype": spec.dtype}
        self.gat_1 = GraphAttention(spec.feat_dim, spec.width, spec.heads, layer=_EDGE_1, **options)
        self.gat_2 = GraphAttention(spec.width, spec.width, spec.heads, layer=_EDGE_2, **options)
        self.norm_1, self.norm_2 = LayerNorm(spec.width), LayerNorm(spec.width)
        self.residual = self._affine(spec.feat_dim, spec.width)
        self.patch_proj = self._affine(spec.width, spec.sphere)
        self.slide_proj = self._affine(spec.width, spec.sphere)
        self.head_norm = LayerNorm(spec.width)
        self.head_dense = self._affine(spec.width, spec.head_hidden)
        self.head_out = self._affine(spec.head_hidden, spec.num_classes)
        if spec.pool == MEMORY_POOL and spec.learn_tau:
            self.log_tau = self.param("log_tau", nn.initializers.constant(math.log(spec.tau)), ())
        if spec.pool == GATED:
            self.gate = GatedAttention(spec.width, _GATE_WIDTH, TORCH_DEFAULT, spec.dtype)

    def _affine(self, fan_in: int, features: int) -> Affine:
        return Affine(fan_in, features, TORCH_DEFAULT, self.spec.dtype)

    def __call__(
        self, graphs: Graphs, codes: jax.Array, seed: jax.Array | None = None
    ) -> dict[str, jax.Array | Encoded]:
        """Pools and classifies every slide.

        Args:
          graphs: patches with their graph.
          codes: [2, n, S] memories.
          seed: draws dropout; None: none.

        Returns:
          {"logits" [slots, 2], "pooled" [slots, D], "slide" [slots, S] unit vectors, "patches": `Encoded`}.
        """
        encoded = self.encode(graphs, codes, seed)
        pooled = jax.ops.segment_sum(
            encoded.attention[:, None] * encoded.features, encoded.segment_ids, graphs.num_slots + 1
        )[1:]
        hidden = jax.nn.relu(self.head_dense(self.head_norm(pooled)))
        hidden = hidden if seed is None else slot_dropout(hidden, seed, self.spec.head_rate, _HEAD)
        slide = memory.normalise(self.slide_proj(pooled))
        return {"logits": self.head_out(hidden), "pooled": pooled, "slide": slide, "patches": encoded}

    def encode(self, graphs: Graphs, codes: jax.Array, seed: jax.Array | None = None) -> Encoded:
        """Features, sphere vectors and attention of every patch; arguments as in `__call__`."""
        slots = graphs.segment_ids.reshape(-1)
        features, first = self._features(graphs, seed)
        sphere = memory.normalise(self.patch_proj(features))
        return Encoded(
            features, sphere, self._attention(features, sphere, codes, slots, graphs.num_slots), slots, first
        )

    def _features(self, graphs: Graphs, seed: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        if graphs.patches.shape[-1] != self.spec.feat_dim:
            raise ValueError(
                f"patches are {graphs.patches.shape[-1]} wide, but the network was built for data.feat_dim = "
                f"{self.spec.feat_dim}: use the patch encoder it was trained with, or set data.feat_dim"
            )
        edges = make_edges(graphs.neighbours, graphs.segment_ids, graphs.positions, self.spec.direction)
        x = graphs.patches.reshape(-1, self.spec.feat_dim)
        x = jnp.where((edges.slot > 0)[:, None], x, jnp.zeros((), x.dtype))
        first = self.gat_1(x, edges, seed)
        h_1 = self._dropped(jax.nn.elu(self.norm_1(first)), graphs, seed, _NODE_1) + self.residual(x)
        h_2 = self._dropped(jax.nn.elu(self.norm_2(self.gat_2(h_1, edges, seed))), graphs, seed, _NODE_2) + h_1
        # Where both are equal the gradient goes to the first.
        return jnp.where(h_1 >= h_2, h_1, h_2), first

    def _dropped(self, h: jax.Array, graphs: Graphs, seed: jax.Array | None, layer: int) -> jax.Array:
        if seed is None:
            return h
        slots, positions = graphs.segment_ids.reshape(-1), graphs.positions.reshape(-1)
        return hash_dropout(h.T, seed, slots, positions, self.spec.node_rate, layer).T

    def _attention(
        self, features: jax.Array, sphere: jax.Array, codes: jax.Array, slots: jax.Array, num_slots: int
    ) -> jax.Array:
        if self.spec.pool == MEAN:
            return memory.segment_softmax(jnp.zeros_like(sphere[:, 0]), slots, num_slots)
        if self.spec.pool == GATED:
            scores = self.gate.score(jnp.tanh(self.gate.tanh(features)) * jax.nn.sigmoid(self.gate.sigmoid(features)))
            return memory.segment_softmax(scores[:, 0], slots, num_slots)
        codes = codes if self.spec.attention_grad_to_memory else jax.lax.stop_gradient(codes)
        return memory.memory_attention(sphere, codes, self._tau(), slots, num_slots)

    def _tau(self) -> jax.Array | float:
        return memory.temperature(self.log_tau) if self.spec.learn_tau else self.spec.tau


class GeneNet(nn.Module):
    """Gene encoder, projector and decoder (section 3.3).

    Attributes:
      spec: the architecture.
    """

    spec: NetworkSpec

    def setup(self) -> None:
        """Declares the layers."""
        spec = self.spec
        self.encode_dense = self._affine(spec.num_genes, spec.gene_hidden)
        self.encode_norm = LayerNorm(spec.gene_hidden)
        self.encode_out = self._affine(spec.gene_hidden, spec.gene_width)
        self.decode_dense = self._affine(spec.gene_width, spec.gene_hidden)
        self.decode_norm = LayerNorm(spec.gene_hidden)
        self.decode_out = self._affine(spec.gene_hidden, spec.num_genes)
        self.gene_proj = self._affine(spec.gene_width, spec.sphere)

    def _affine(self, fan_in: int, features: int) -> Affine:
        return Affine(fan_in, features, TORCH_DEFAULT, self.spec.dtype)

    def __call__(self, genes: jax.Array, seed: jax.Array | None = None) -> dict[str, jax.Array]:
        """{"gene" [slots, S] unit vectors, "gene_embedding" [slots, D_r], "reconstruction" [slots, K]}."""
        hidden = self._dropped(jax.nn.relu(self.encode_norm(self.encode_dense(genes))), seed, 0)
        embedding = self.encode_out(hidden)
        back = self._dropped(jax.nn.relu(self.decode_norm(self.decode_dense(embedding))), seed, 1)
        return {
            "gene": memory.normalise(self.gene_proj(embedding)),
            "gene_embedding": embedding,
            "reconstruction": self.decode_out(back),
        }

    def _dropped(self, h: jax.Array, seed: jax.Array | None, layer: int) -> jax.Array:
        return h if seed is None else slot_dropout(h, seed, self.spec.gene_rate, layer)


def initial_codes(key: jax.Array, spec: NetworkSpec) -> jax.Array:
    """[2, n, S] float32 random unit codes."""
    return memory.normalise(jax.random.normal(key, (2, spec.codes, spec.sphere)))
