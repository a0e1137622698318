"""The three networks of MKD: student S_P, multimodal teacher T_M, genomic teacher T_G (specification 4 and 12)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import LECUN_NORMAL, TORCH_DEFAULT, Affine
from histokd_jax.nn.fusion import BILINEAR, BilinearFusion, ConcatFusion
from histokd_jax.nn.gated_attention import BagEncoder, Bags, PatchFeatures
from histokd_jax.nn.genes import TWO_STREAM_DROPOUT_LAYERS, GeneEncoder, TokenSpec, TwoStreamGeneEncoder
from histokd_jax.ops.dropout import slot_dropout
from histokd_jax.ops.pooling import CHUNKED

STUDENT, MULTIMODAL, GENOMIC = "S_P", "T_M", "T_G"
NETWORKS = (STUDENT, MULTIMODAL, GENOMIC)
GMKDN = "gmkdn"

# Numbers of the dropout layers within one network; equal numbers would draw equal masks.
_PATCH_LAYER, _HEAD_LAYER, _GENE_LAYER = 0, 1, 2
_FUSION_LAYER = _GENE_LAYER + TWO_STREAM_DROPOUT_LAYERS


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """Everything that fixes the architecture.

    Attributes:
      feat_dim: patch-embedding width D.
      num_classes: C.
      variant: "mkd" or "gmkdn" (two gene streams).
      width: embedding width H.
      hidden: attention width A.
      fusion: "bilinear" or "concat".
      init_t_m: initialiser of the linear layers of T_M.
      tokens: token size, alpha dropout, gene input dropout and clipping.
      rate: dropout of every other layer.
      gene_rate: dropout in front of the classifier of T_G.
      dtype: compute dtype of matrix products; None keeps the parameters'.
      chunk: patches per chunk of the attention pool.
      pool: implementation of the attention pool, see `histokd_jax.ops.pooling.attention_pool`.
    """

    feat_dim: int = 1024
    num_classes: int = 2
    variant: str = "mkd"
    width: int = 256
    hidden: int = 128
    fusion: str = BILINEAR
    init_t_m: str = TORCH_DEFAULT
    tokens: TokenSpec = TokenSpec(rate=0.25)
    rate: float = 0.25
    gene_rate: float = 0.25
    dtype: jnp.dtype | None = None
    chunk: int = 512
    pool: str = CHUNKED

    @property
    def two_streams(self) -> bool:
        """Whether genes come as expression and copy number."""
        return self.variant == GMKDN


def _bag_encoder(spec: NetworkSpec, rate: float, initializer: str) -> BagEncoder:
    features = PatchFeatures(rate=rate, layer=_PATCH_LAYER, dtype=spec.dtype)
    return BagEncoder(spec.feat_dim, spec.width, spec.hidden, features, initializer, spec.chunk, spec.pool)


def _gene_encoder(spec: NetworkSpec, initializer: str) -> nn.Module:
    common = dict(layer=_GENE_LAYER, initializer=initializer, dtype=spec.dtype)
    if spec.two_streams:
        return TwoStreamGeneEncoder(spec.tokens, spec.width, spec.hidden, fusion_rate=spec.rate, **common)
    return GeneEncoder(spec.tokens, spec.width, spec.hidden, **common)


def _fusion(spec: NetworkSpec) -> nn.Module:
    if spec.fusion == BILINEAR:
        return BilinearFusion(
            spec.width, rate=spec.rate, layer=_FUSION_LAYER, initializer=spec.init_t_m, dtype=spec.dtype
        )
    return ConcatFusion(spec.width, spec.init_t_m, spec.dtype)


class StudentNet(nn.Module):
    """S_P: gated-attention MIL on patches (section 4.2).

    Dropout sits only in front of the classifier, so the embedding is free of dropout noise.

    Attributes:
      spec: the architecture.
    """

    spec: NetworkSpec

    def setup(self) -> None:
        """Declares the layers."""
        self.bag = _bag_encoder(self.spec, 0.0, LECUN_NORMAL)
        self.head = Affine(self.spec.width, self.spec.num_classes, LECUN_NORMAL, self.spec.dtype)

    def __call__(
        self, bags: Bags, streams: Mapping[str, jax.Array] | None = None, seed: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(embedding [S, H], logits [S, C]) in at least float32; `streams` is not read, `seed` draws dropout."""
        del streams
        pooled = self.bag(bags, seed)
        dropped = pooled if seed is None else slot_dropout(pooled, seed, self.spec.rate, _HEAD_LAYER)
        return pooled, self.head(dropped)

    def attention_map(self, bags: Bags) -> jax.Array:
        """[R, L] float32 weight of each patch within its slide."""
        return self.bag.attention_map(bags)


class GenomicNet(nn.Module):
    """T_G: self-normalising token embedding and gated attention over gene tokens (section 4.3).

    In the `gmkdn` variant the embedding is the fusion of two gene streams and nothing is dropped before the classifier.

    Attributes:
      spec: the architecture.
    """

    spec: NetworkSpec

    def setup(self) -> None:
        """Declares the layers."""
        self.genes = _gene_encoder(self.spec, LECUN_NORMAL)
        self.head = Affine(self.spec.width, self.spec.num_classes, LECUN_NORMAL, self.spec.dtype)

    def __call__(
        self, bags: Bags | None, streams: Mapping[str, jax.Array], seed: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(embedding [S, H], logits [S, C]) in at least float32; `bags` is not read, `seed` draws dropout."""
        del bags
        pooled = self.genes(streams, seed)
        if seed is None or self.spec.two_streams:
            return pooled, self.head(pooled)
        return pooled, self.head(slot_dropout(pooled, seed, self.spec.gene_rate, _HEAD_LAYER))


class MultimodalNet(nn.Module):
    """T_M: its own bag and gene encoders, then fusion (section 4.4); no dropout before the classifier.

    Attributes:
      spec: the architecture.
    """

    spec: NetworkSpec

    def setup(self) -> None:
        """Declares the layers."""
        spec = self.spec
        self.bag = _bag_encoder(spec, spec.rate, spec.init_t_m)
        self.genes = _gene_encoder(spec, spec.init_t_m)
        self.fusion = _fusion(spec)
        self.head = Affine(spec.width, spec.num_classes, spec.init_t_m, spec.dtype)

    def __call__(
        self, bags: Bags, streams: Mapping[str, jax.Array], seed: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(embedding [S, H], logits [S, C]) in at least float32; `seed` draws dropout."""
        pathology, genomic = self.bag(bags, seed), self.genes(streams, seed)
        self.sow("intermediates", "pooled_path", pathology)
        # Argument order of the sources: (pathology, genes) in MKD, (genomic, pathology) in GMKDN.
        pair = (genomic, pathology) if self.spec.two_streams else (pathology, genomic)
        fused = self.fusion(*pair, seed)
        return fused, self.head(fused)

    def attention_map(self, bags: Bags) -> jax.Array:
        """[R, L] float32 weight of each patch within its slide."""
        return self.bag.attention_map(bags)


def build(spec: NetworkSpec, teachers: tuple[str, ...] = ("M", "G")) -> dict[str, nn.Module]:
    """The networks of a run, by parameter group.

    Args:
      spec: the architecture.
      teachers: any of "M" and "G".

    Returns:
      {"S_P": ..., "T_M": ..., "T_G": ...} without the absent teachers.
    """
    networks = {STUDENT: StudentNet(spec)}
    if "M" in teachers:
        networks[MULTIMODAL] = MultimodalNet(spec)
    if "G" in teachers:
        networks[GENOMIC] = GenomicNet(spec)
    return networks
